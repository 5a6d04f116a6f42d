"""One call to a tier: from its admission until the tier has let go of what it was lent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Generic, TypeVar

from kvlayer.results import Cause

__all__ = ["Call", "Lane", "Refused"]

T = TypeVar("T")


class Lane(Enum):
    """The two directions of a tier. A disk that is full still serves what it holds."""

    READS = "reads"
    WRITES = "writes"


class Refused(Exception):  # noqa: N818  # a refusal, not an error: callers turn it into a cause
    """The call was not made: ``cause`` is ``BUSY`` or ``TIER_DOWN``."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


class Call(Generic[T]):
    """One call to a tier. It has *ended* once its outcome was booked, not merely computed.

    ``booked`` is called then; ``late`` when nobody waits for it any more and it has not ended
    ``patience`` seconds after that.
    """

    __slots__ = (
        "_ended",
        "_expiry",
        "_late",
        "_patience",
        "_task",
        "clock",
        "lane",
        "nbytes",
        "since",
        "was_late",
        "was_told_to_stop",
    )

    def __init__(
        self,
        task: asyncio.Task[T],
        booked: Callable[[Call[T]], None],
        late: Callable[[Call[T]], None],
        *,
        lane: Lane,
        nbytes: int,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        self._task = task
        self._late = late
        self._patience = patience
        self.lane = lane
        self.nbytes = nbytes
        self.clock = clock
        self.since = clock()
        """When it was admitted, by ``clock``."""
        self.was_late = False
        """Whether a deadline passed before it ended."""
        self.was_told_to_stop = False
        self._expiry: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[None] = task.get_loop().create_future()

        def book(_: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # seen: whoever waits asks for it, a hint may fail unheard
            if self._expiry is not None:
                self._expiry.cancel()
            try:
                booked(self)
            finally:
                self._ended.set_result(None)

        task.add_done_callback(book)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    def cancel(self) -> None:
        """Ask it to stop. It ends when the backend has let go of what it was lent."""
        if not self.has_ended:
            self.was_told_to_stop = True
            self._task.cancel()
            self.left_alone()

    def left_alone(self, *, cancel: bool = False) -> None:
        """Nobody waits for it: it has ``patience`` from now on, and is cancelled then if asked."""
        if self._expiry is None and not self.has_ended:
            loop = self._task.get_loop()
            self._expiry = loop.call_later(self._patience, self._expire, cancel)

    def _expire(self, cancel: bool) -> None:
        self._late(self)
        if cancel:
            self.cancel()

    @property
    def error(self) -> BaseException | None:
        """What it raised, ``CancelledError`` included; None when there is a result."""
        if self._task.cancelled():
            return asyncio.CancelledError()
        return self._task.exception()

    @property
    def was_cancelled(self) -> bool:
        """Whether it ended by being cancelled, by whomever."""
        return self._task.cancelled()

    def result(self) -> T:
        """Its result. Raises what it raised."""
        return self._task.result()

    async def ended(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most ``seconds``. Cancelling the waiter leaves it alone."""
        done, _ = await asyncio.wait({self._ended}, timeout=seconds)
        return bool(done)
