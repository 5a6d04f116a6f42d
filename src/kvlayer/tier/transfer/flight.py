"""One transfer per object, however many requests want it."""

from __future__ import annotations

from asyncio import CancelledError
from dataclasses import dataclass

from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause
from kvlayer.runtime.foreign import words
from kvlayer.tier.guard.guard import Guard, Refused, TierCall
from kvlayer.tier.messages import Outcome

__all__ = ["Flight", "Flights", "outcome_of"]


def outcome_of(call: TierCall[Outcome], key: ObjectKey) -> Outcome:
    """The outcome of a finished transfer, whatever way it ended."""
    error = call.error
    if error is None:
        return call.result()
    if isinstance(error, CancelledError):
        return Outcome(key, Cause.DEADLINE, "given up")
    if isinstance(error, Refused):
        return Outcome(key, error.cause, error.detail)
    # A backend broke its contract: contained here, as a failing tier.
    return Outcome(key, Cause.TIER_DOWN, words(error))


@dataclass(slots=True, eq=False)
class Flight:
    """An object on its way up. ``waiters`` is how many requests still want it."""

    key: ObjectKey
    tier: int
    call: TierCall[Outcome]
    guard: Guard
    waiters: int = 1
    was_left: bool = False
    """At some time nobody waited, so it was cancelled."""
    is_forsaken: bool = False
    """Its object was removed meanwhile: what it brings is not served."""
    quarantine: TierCall[object] | None = None
    """It brought a damaged object, which is being taken out of sight."""

    @property
    def has_ended(self) -> bool:
        return self.call.has_ended

    @property
    def was_given_up(self) -> bool:
        """It ended because nobody wanted it any more; who joined it meanwhile starts anew."""
        return self.was_left and self.has_ended and isinstance(self.call.error, CancelledError)

    @property
    def is_stuck(self) -> bool:
        """A deadline has passed over it and it still holds the object's slot: not worth joining."""
        return self.call.was_late and not self.has_ended

    async def wait(self, seconds: float | None = None) -> Outcome | None:
        """The outcome, or None when the deadline (or ``seconds``) passed first."""
        ended = await self.guard.wait(self.call, seconds)
        return outcome_of(self.call, self.key) if ended else None

    def leave(self) -> None:
        """Stop waiting. When nobody waits any more the transfer is cancelled."""
        self.waiters -= 1
        if not self.waiters and not self.has_ended:
            self.was_left = True
            self.call.cancel()


class Flights:
    """Objects on their way up, by key."""

    def __init__(self) -> None:
        self._flights: dict[ObjectKey, Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def find(self, key: ObjectKey) -> Flight | None:
        """The running flight of an object, if there is one."""
        return self._flights.get(key)

    def join(self, key: ObjectKey) -> Flight | None:
        """Become one more waiter of a running flight, if there is one."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.waiters += 1
        return flight

    def add(self, flight: Flight) -> None:
        """Register a transfer that just started. ``land`` it when its outcome is booked."""
        self._flights[flight.key] = flight

    def land(self, key: ObjectKey) -> Flight | None:
        """A transfer has ended: the next request for its object starts anew."""
        return self._flights.pop(key, None)
