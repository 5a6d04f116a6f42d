"""Whose turn it is in one lane of a tier, and what its calls hold."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from kvlayer.results import Cause
from kvlayer.tier.call import Refused

if TYPE_CHECKING:
    from kvlayer.tier.breaker import Breaker
    from kvlayer.tier.call import Call

__all__ = ["Turns"]


class Turns:
    """At most ``limit`` calls of the lane run at once; the others wait in the order they came."""

    def __init__(self, limit: int, breaker: Breaker) -> None:
        self.limit = limit
        self.breaker = breaker
        self.calls = 0
        """Calls running or waiting, and ``nbytes``: what they move."""
        self.nbytes = 0
        self.running = 0
        self.late = 0
        """Of ``calls``: those a deadline has passed over."""
        self.trial: Call[Any] | None = None
        """The call that decides whether the breaker closes again."""
        self.progress_at = 0.0
        """When a call of this lane last began or ended."""
        self._waiting: dict[asyncio.Future[None], None] = {}

    def queue(self) -> asyncio.Future[None]:
        """Wait for a turn: the future's result. Its error is that of a lane that was closed."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        return turn

    def leave(self, turn: asyncio.Future[None]) -> bool:
        """Wait no more. True when the turn had come already: then it has to be given back."""
        self._waiting.pop(turn, None)
        return turn.done() and not turn.cancelled() and turn.exception() is None

    def next(self) -> asyncio.Future[None] | None:
        """The next that may begin, if the lane has a turn left."""
        while self._waiting and self.running < self.limit:
            turn = next(iter(self._waiting))
            del self._waiting[turn]
            if not turn.done():  # it may have been cancelled in this turn of the loop
                return turn
        return None

    def refuse_waiting(self, detail: str) -> None:
        """End the wait of all that have not begun with :class:`Refused`."""
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(Refused(Cause.TIER_DOWN, detail))
        self._waiting.clear()
