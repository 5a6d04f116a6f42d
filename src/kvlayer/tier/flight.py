"""One transfer per object, however many requests want it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from kvlayer.keys import ObjectKey
from kvlayer.results import Cause
from kvlayer.tier.guard import Guard
from kvlayer.tier.messages import Outcome

__all__ = ["Flight", "Flights", "outcome_of"]


def outcome_of(task: asyncio.Task[Outcome], key: ObjectKey) -> Outcome:
    """The outcome of a finished transfer, whatever way it ended."""
    if task.cancelled():
        return Outcome(key, Cause.DEADLINE, "given up")
    error = task.exception()
    if error is not None:  # a backend broke its contract: contain it here, as a failing tier
        return Outcome(key, Cause.TIER_DOWN, f"{type(error).__name__}: {error}")
    return task.result()


@dataclass(slots=True, eq=False)
class Flight:
    """An object on its way up. ``waiters`` is how many requests still want it."""

    key: ObjectKey
    tier: int
    task: asyncio.Task[Outcome]
    guard: Guard
    waiters: int = 1

    @property
    def is_done(self) -> bool:
        return self.task.done()

    async def wait(self) -> Outcome | None:
        """The outcome, or None when the deadline passed first."""
        return outcome_of(self.task, self.key) if await self.guard.wait(self.task) else None

    def leave(self) -> None:
        """Stop waiting. When nobody waits any more the transfer is cancelled."""
        self.waiters -= 1
        if not self.waiters and not self.task.done():
            self.task.cancel()


class Flights:
    """Objects on their way up, by key."""

    def __init__(self) -> None:
        self._flights: dict[ObjectKey, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: ObjectKey) -> Flight | None:
        """Become one more waiter of a running flight, if there is one."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.waiters += 1
        return flight

    def add(self, flight: Flight) -> None:
        """Register a transfer that just started."""
        self._flights[flight.key] = flight
        flight.task.add_done_callback(lambda _: self._flights.pop(flight.key, None))
