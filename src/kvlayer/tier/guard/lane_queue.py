"""Whose turn it is in one lane of a tier, and what its calls hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvlayer.results import Cause
from kvlayer.tier.guard.tier_call import Lane, Refused

if TYPE_CHECKING:
    import asyncio

    from kvlayer.tier.guard.breaker import Breaker
    from kvlayer.tier.guard.tier_call import TierCall

__all__ = ["LaneQueue"]


class LaneQueue:
    """At most ``limit`` calls of the lane run at once; the others wait in the order they came."""

    def __init__(self, lane: Lane, limit: int, breaker: Breaker) -> None:
        self.lane = lane
        self.limit = limit
        self.breaker = breaker
        self.calls = 0
        """Calls running or waiting, and ``nbytes``: what they move."""
        self.nbytes = 0
        self.running = 0
        self.late = 0
        """Of ``calls``: those a deadline has passed over."""
        self.trial: TierCall[Any] | None = None
        """The call that decides whether the breaker closes again."""
        self.progress_at = 0.0
        """When a call of this lane last began or ended."""
        self.timer: asyncio.TimerHandle | None = None
        """When the lane is next looked at."""
        self.waiting: dict[TierCall[Any], None] = {}
        """For their turn, in the order they came."""

    def leave(self, call: TierCall[Any]) -> None:
        """Wait no more."""
        self.waiting.pop(call, None)

    def next(self) -> TierCall[Any]:
        """Give the next its turn."""
        call = next(iter(self.waiting))
        del self.waiting[call]
        self.running += 1
        return call

    def refuse_waiting(self, detail: str) -> None:
        """End the wait of all that have not begun with :class:`Refused`."""
        waiting, self.waiting = self.waiting, {}
        for call in waiting:
            call.refuse(Refused(Cause.TIER_DOWN, detail))
