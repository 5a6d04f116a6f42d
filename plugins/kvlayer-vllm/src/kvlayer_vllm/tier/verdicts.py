"""What is known of chunks that requests ask for: there, not there, or being asked.

For the scheduler's thread. What is asked of one step goes to the tiers together when the step has
been scheduled; answers come back by a queue, and are taken with the next question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue

__all__ = ["Answers", "Verdicts"]

Answers = Sequence[tuple[bytes, bool]]
"""Chunks, and whether a tier says it has them."""


class Verdicts:
    """By chunk, as long as a request that has asked for it goes on.

    ``ask`` is given what to ask; :meth:`hear` may be called from any thread, once for all of it.
    """

    def __init__(self, ask: Callable[[Sequence[bytes]], None]) -> None:
        self._ask = ask
        self._known: dict[bytes, bool | None] = {}
        """None: not known yet."""
        self._waiting: dict[bytes, set[str]] = {}
        """By chunk, who has asked for it."""
        self._asked: dict[str, set[bytes]] = {}
        """By request, what it has asked for."""
        self._new: list[bytes] = []
        self._heard: SimpleQueue[Answers] = SimpleQueue()

    def __len__(self) -> int:
        """Chunks of which something is remembered."""
        return len(self._known)

    def of(self, key: bytes, request_id: str) -> bool | None:
        """Whether a chunk is there; None while that is being asked."""
        self.take()
        if key not in self._known:
            self._known[key] = None
            self._new.append(key)
        self._waiting.setdefault(key, set()).add(request_id)
        self._asked.setdefault(request_id, set()).add(key)
        return self._known[key]

    def send(self) -> None:
        """The step is scheduled: ask what is new."""
        self.take()
        new, self._new = [key for key in self._new if key in self._known], []
        if new:
            self._ask(new)

    def hear(self, answers: Answers) -> None:
        """From any thread."""
        self._heard.put(answers)

    def take(self) -> None:
        """Take what was heard since the last call."""
        while True:
            try:
                answers = self._heard.get_nowait()
            except Empty:
                return
            for key, is_there in answers:
                if self._known.get(key, False) is None:
                    self._known[key] = is_there

    def is_missing(self, keys: Iterable[bytes]) -> None:
        """These could not be loaded: nobody who asks now is told that they are there."""
        self.take()
        for key in keys:
            if key in self._known:
                self._known[key] = False

    def forget(self, request_id: str) -> None:
        """A request is over."""
        for key in self._asked.pop(request_id, ()):
            askers = self._waiting[key]
            askers.discard(request_id)
            if not askers:
                del self._waiting[key], self._known[key]
