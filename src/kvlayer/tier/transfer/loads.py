"""Bringing objects up into host memory, each once, in prompt order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Protocol

from kvlayer._steps import FEW, SLICE
from kvlayer.abc.backend import Damaged
from kvlayer.events import ObjectQuarantined
from kvlayer.identity.keys import ObjectKey, Span
from kvlayer.results import Cause, Failure
from kvlayer.runtime.foreign import words
from kvlayer.tier.guard.guard import Lane, Refused, TierCall
from kvlayer.tier.messages import Outcome
from kvlayer.tier.planner.planner import Keeps, Planner, Reservation
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.tier import LowerTier, Tier
from kvlayer.tier.transfer.flight import Flight, Flights, outcome_of
from kvlayer.tier.transfer.objects import Objects

__all__ = ["LATE", "Loads", "Wanted", "down"]

_AT_ONCE = 8  # flights begun per turn of the loop, to travel together: some 0.1 ms each

LATE = "it has been on its way for longer than a deadline"

Wanted = Sequence[tuple[Span, Sequence[ObjectRecord]]]
"""Spans in prompt order and the objects each needs. The caller keeps the objects pinned."""


def down(lower: Iterable[LowerTier]) -> int:
    """Bit t: tier t is not asked for now."""
    return sum(1 << tier.index for tier in lower if not tier.guard.serves)


@dataclass(slots=True, eq=False)
class _Trip:
    """What one request loads from one tier, to learn from how long it took."""

    tier: LowerTier
    began: float
    nbytes: int = 0
    arrived_nbytes: int = 0
    left: int = 0
    """Flights that have not landed."""
    is_whole: bool = True
    is_growing: bool = True
    """More flights may be started: an estimate is made of all of them."""

    def started(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self.left += 1

    def landed(self, now: float, outcome: Outcome) -> None:
        self.left -= 1
        self.arrived_nbytes += outcome.nbytes
        self.is_whole = self.is_whole and outcome.ok
        self._observe(now)

    def all_started(self, now: float) -> None:
        """No flight will join it."""
        self.is_growing = False
        self._observe(now)

    def _observe(self, now: float) -> None:
        if self.nbytes and not self.left and self.is_whole and not self.is_growing:
            self.tier.estimate.observe(self.nbytes, now - self.began, now)

    def abandoned(self, now: float) -> None:
        """It took longer than it was worth; the whole would have taken longer still."""
        if not self.left:
            return
        self.is_whole = False
        share = self.arrived_nbytes / self.nbytes or 0.5  # if nothing came: twice as long, at least
        self.tier.estimate.observe(self.nbytes, (now - self.began) / share, now)
        if not self.arrived_nbytes:  # and nobody stays to see a deadline missed
            self.tier.guard.failed(Lane.READS, "nothing arrived while it was waited for")


_PASSING = frozenset({Cause.NO_ROOM, Cause.BUSY})
"""What keeps a load from starting more only until something of it has landed."""


@dataclass(slots=True, eq=False)
class _Request:
    """What one caller waits for, and until when by the clock."""

    wanted: Wanted
    until: float | None = None
    room: Room | None = None
    last: int = 0
    """The last span of which something may be held that was not given up."""
    started: int = 0
    """How many spans of it are there or on their way."""
    taken: int = 0
    """How many spans of it the caller has taken."""
    flights: dict[ObjectKey, Flight] = field(default_factory=dict[ObjectKey, Flight])
    """Of what was started and is not taken."""
    trips: dict[int, _Trip] = field(default_factory=dict[int, _Trip])

    def took(self, batch: Wanted) -> None:
        """The caller has these: their flights have landed."""
        self.taken += len(batch)
        for _, records in batch:
            for record in records:
                if (flight := self.flights.pop(record.key, None)) is not None:
                    flight.leave()

    async def gives_up(self) -> bool:
        """Give up what is held of the prompt's end, a span at a time; whether something was."""
        while self.room is not None and self.last > self.started:
            _, records = self.wanted[self.last]
            self.last -= 1
            if await self.room.give_up(records):
                return True
        return False

    async def may_start(self, failure: Failure | None, *, has_moved: bool) -> bool:
        """Whether room has come for more, after ``failure`` stopped it.

        A tier that has as many reads as it takes at a time has room once some of ours have landed.
        """
        if failure is None or failure.cause not in _PASSING:
            return False
        if failure.cause is Cause.BUSY:
            return has_moved
        return self.room is not None and (has_moved or await self.gives_up())

    def all_started(self, now: float) -> None:
        """Nothing more will be started: what was is measured."""
        for trip in self.trips.values():
            if trip.is_growing:
                trip.all_started(now)

    def abandoned(self, now: float) -> None:
        """It took longer than it was worth."""
        for trip in self.trips.values():
            trip.abandoned(now)

    def stopped(self, failure: Failure, now: float) -> None:
        """No more can be started for now, or at all."""
        if failure.cause not in _PASSING:
            self.all_started(now)
            return
        for trip in self.trips.values():  # what waits for room says nothing of its tier
            trip.is_whole = False


class Room(Protocol):
    """What a load holds, for one that streams through host memory."""

    def need(self, records: Sequence[ObjectRecord]) -> None:
        """These are brought up now: hold them, also where they were given up before."""

    async def give_up(self, records: Sequence[ObjectRecord]) -> bool:
        """Let go of these where a lower tier has them; whether any was held."""
        ...


class Loads:
    """Runs flights from the lower tiers into the host."""

    def __init__(
        self,
        planner: Planner,
        objects: Objects,
        host: Tier,
        lower: Sequence[LowerTier],
        *,
        clock: Callable[[], float],
        evicted: Callable[[Sequence[ObjectRecord]], None],
    ) -> None:
        """``evicted`` is told what had to make room."""
        self._evicted = evicted
        self._planner = planner
        self._objects = objects
        self._host = host
        self._lower = {tier.index: tier for tier in lower}
        self._flights = Flights()
        self._clock = clock
        self.spares: Keeps | None = None
        """What a load gives up last for its room: no tier has it yet, and one is to get it."""

    def stuck(self, record: ObjectRecord) -> str:
        """Where from an object has been on its way for longer than a deadline; empty: it is not."""
        flight = self._flights.find(record.key) if record.host is HostState.FILLING else None
        return self._lower[flight.tier].name if flight is not None and flight.is_stuck else ""

    def forsake(self, records: Iterable[ObjectRecord]) -> None:
        """These objects are removed: what is on its way of them is not served when it arrives."""
        for record in records:
            if (flight := self._flights.find(record.key)) is not None:
                flight.is_forsaken = True

    async def arrive(
        self,
        wanted: Wanted,
        trouble: list[Failure],
        until: float | None = None,
        *,
        room: Room | None = None,
    ) -> AsyncGenerator[Wanted]:
        """Yield ``wanted`` in order, in batches, each as soon as all of it is in host memory.

        Everything is started at once, or as much as there is room for. With ``room`` the caller
        has let go of a batch when it asks for the next, so more is started then; and where what it
        holds of the prompt's end leaves no room for what comes before, that goes first. The first
        span that
        cannot be brought up, or not before the clock reads ``until``, ends the sequence and leaves
        its failure in ``trouble``. Close the iterator: that lets go of what is still on its way.
        """
        request = _Request(wanted, until, room, last=len(wanted) - 1)
        failure = None
        try:
            while request.taken < len(wanted):
                if failure is None or failure.cause in _PASSING:
                    failure = await self._take_off(request)
                batch, missed = await self._next(request)
                if batch:
                    yield batch
                    request.took(batch)
                may_start = await request.may_start(failure, has_moved=bool(batch))
                if missed is None and (request.taken < request.started or may_start):
                    continue
                if (ended := missed or failure) is not None:
                    if ended.cause is Cause.NO_ROOM or ended is failure:
                        self._count_refusal(ended)
                    trouble.append(ended)
                    break
        finally:
            request.all_started(self._clock())
            for flight in request.flights.values():
                flight.leave()

    def _count_refusal(self, failure: Failure) -> None:
        """A load ends for want of room or of turns: counted once, however often it was tried."""
        if failure.cause in _PASSING:
            for tier in (self._host, *self._lower.values()):
                if tier.name == failure.tier:
                    tier.refused(failure.cause)

    async def _next(
        self, request: _Request
    ) -> tuple[list[tuple[Span, Sequence[ObjectRecord]]], Failure | None]:
        """The next spans that are there, a slice at most; if there is none, why not."""
        at, batch = request.taken, list[tuple[Span, Sequence[ObjectRecord]]]()
        while at + len(batch) < request.started and len(batch) < FEW:
            span, records = request.wanted[at + len(batch)]
            absent = [r for r in records if r.host is not HostState.READY]
            if absent:
                if batch and not all(request.flights[r.key].has_ended for r in absent):
                    break
                missed = await self._bring_all(span, absent, request)
                if missed is not None:
                    return batch, missed
            batch.append((span, records))
            if not len(batch) % SLICE:
                await asyncio.sleep(0)
        return batch, None

    async def _bring_all(
        self, span: Span, absent: Sequence[ObjectRecord], request: _Request
    ) -> Failure | None:
        for record in absent:
            missed = await self._bring(span, record, request)
            if missed is not None:
                return missed
        return None

    async def _take_off(self, request: _Request) -> Failure | None:
        """Start flights for what is absent, as far as there is room; what stopped it, if anything.

        ``request.started`` spans are on their way or there.
        """
        begun = 0
        for count, (span, records) in enumerate(request.wanted[request.started :]):
            if count and not count % SLICE:
                await asyncio.sleep(0)
            if request.room is not None:
                request.room.need(records)
            for record in records:
                if record.host is HostState.READY or record.key in request.flights:
                    continue
                started = self._fly(span, record, trips=request.trips)
                if isinstance(started, Failure):
                    request.stopped(started, self._clock())
                    return started
                request.flights[record.key] = started
                begun += 1
                if not begun % _AT_ONCE:
                    await asyncio.sleep(0)
            request.started += 1
        request.all_started(self._clock())
        return None

    def _fly(
        self,
        span: Span,
        record: ObjectRecord,
        after: int = 0,
        trips: dict[int, _Trip] | None = None,
    ) -> Flight | Failure:
        """Join the object's flight or start one, from the nearest serving tier below ``after``."""
        if record.host is HostState.FILLING:
            return self._join(span, record)
        tier = self._source(span, record, after)
        if isinstance(tier, Failure):
            return tier
        evicted: list[ObjectRecord] = []
        slot = self._planner.plan_fetch(span, record, evicted, self.spares)
        if evicted:
            self._evicted(evicted)
        if slot is None:
            return Failure(span, Cause.NO_ROOM, self._host.name, "host memory is all in use")
        trip: _Trip | None = None
        if trips is not None:
            trip = trips.get(tier.index)
            if trip is None:
                trip = trips[tier.index] = _Trip(tier, self._clock())
        try:
            call = tier.guard.send(
                self._objects.reading(tier.index, slot.piece, record.encoding(tier.index)),
                partial(self._landed, tier, slot, trip),
                nbytes=slot.piece.nbytes,
            )
        except Refused as refused:
            self._planner.fetched(slot, tier.index, ok=False)
            if trips is None or refused.cause not in _PASSING:  # else the load may go on
                tier.refused(refused.cause)
            return Failure(span, refused.cause, tier.name, refused.detail)
        tier.begins("load", record.key, slot.piece.nbytes)
        if trip is not None:
            trip.started(slot.piece.nbytes)
        flight = Flight(record.key, tier.index, call, tier.guard)
        self._flights.add(flight)
        return flight

    def _join(self, span: Span, record: ObjectRecord) -> Flight | Failure:
        """Share the flight of an object that somebody else is bringing up."""
        if tier_name := self.stuck(record):
            return Failure(span, Cause.DEADLINE, tier_name, LATE)
        joined = self._flights.join(record.key)
        if joined is None:
            return Failure(span, Cause.IN_FLIGHT, self._host.name, "being stored right now")
        return joined

    def _source(self, span: Span, record: ObjectRecord, after: int) -> LowerTier | Failure:
        """The nearest tier below ``after`` that has the object and is asked at all."""
        below = record.readable >> (after + 1) << (after + 1)
        if not below:
            return Failure(span, Cause.VANISHED, self._host.name, "gone since the lookup")
        silent: LowerTier | None = None
        for tier in self._lower.values():  # the nearest first
            if below >> tier.index & 1:
                if tier.guard.serves:
                    return tier
                silent = silent or tier
        assert silent is not None, record.key
        silent.refused(Cause.TIER_DOWN)
        detail = silent.trouble or "not asked for now"
        return Failure(span, Cause.TIER_DOWN, silent.name, detail)

    def _landed(
        self, tier: LowerTier, slot: Reservation, trip: _Trip | None, call: TierCall[Outcome]
    ) -> None:
        flight = self._flights.land(slot.record.key)
        outcome = outcome_of(call, slot.record.key)
        is_wanted = flight is None or not flight.is_forsaken
        ok = outcome.ok and is_wanted
        damaged: Damaged | None = None
        try:
            tier.transferred("load", outcome, call)
            damaged = self._withdraw(tier, slot.record, outcome)
        finally:
            self._planner.fetched(slot, tier.index, ok=ok, copy=outcome.copy)
        if trip is not None:
            trip.landed(self._clock(), outcome)
        if damaged is not None:
            quarantine = self._quarantine(tier, damaged, outcome)
            if flight is not None:
                flight.quarantine = quarantine

    async def _bring(self, span: Span, record: ObjectRecord, request: _Request) -> Failure | None:
        """Wait until an object is in host memory, trying one tier after the other."""
        while True:
            flight = request.flights[record.key]
            tier = self._lower[flight.tier]
            left = inf if request.until is None else request.until - self._clock()
            outcome = await flight.wait(left)
            if record.host is HostState.READY:
                return None
            if outcome is None:
                if left < tier.guard.deadline:
                    request.abandoned(self._clock())
                return Failure(span, Cause.DEADLINE, tier.name, self._late(flight, tier))
            if damaged := self._withdraw(tier, record, outcome, was_needed=True):
                flight.quarantine = self._quarantine(tier, damaged, outcome)
            if flight.quarantine is not None:
                await tier.guard.wait(flight.quarantine)
            request.flights.pop(record.key).leave()
            if record.tier == 0:
                return None  # stored anew while the damaged copy was taken away
            # A tier that failed but may still hold the object is not asked again by this request.
            failed = record.readable >> tier.index & 1 and not flight.was_given_up
            after = tier.index if failed else 0
            if not record.readable >> (after + 1):
                cause = outcome.cause or Cause.VANISHED
                return Failure(span, cause, tier.name, outcome.detail)
            again = self._fly(span, record, after)
            if isinstance(again, Failure):
                return again
            request.flights[record.key] = again
            if flight.was_given_up:
                self._renew(request)

    @staticmethod
    def _late(flight: Flight, tier: LowerTier) -> str:
        """Count a flight that is not waited for any longer; what is said of it."""
        if not flight.call.was_late:
            tier.refused(Cause.DEADLINE)
            return "took longer than it was worth"
        detail = f"not loaded within {tier.guard.deadline} s"
        tier.fails(Cause.DEADLINE, detail, key=flight.key)
        return detail

    def _renew(self, request: _Request) -> None:
        """Start anew, side by side, what others gave up when this request had just joined them."""
        for span, records in request.wanted[request.taken : request.started]:
            for record in records:
                flight = request.flights.get(record.key)
                if flight is None or not flight.was_given_up or record.host is HostState.READY:
                    continue
                again = self._fly(span, record)
                if isinstance(again, Flight):  # else its turn says what is wrong
                    request.flights[record.key] = again
                    flight.leave()

    def _withdraw(
        self, tier: LowerTier, record: ObjectRecord, outcome: Outcome, *, was_needed: bool = False
    ) -> Damaged | None:
        """Stop offering what a tier does not have; what of it is to be taken out of sight.

        So is one that was needed and failed several times in a row while others did not: its tier
        would not replace it, and every prompt that needs it would fail again.
        """
        cause = outcome.cause
        if cause is None or not record.readable >> tier.index & 1:
            return None  # it was withdrawn meanwhile
        is_hopeless = was_needed and tier.is_hopeless(Lane.READS, record.key)
        is_foreign = cause is Cause.FOREIGN_VERSION  # another release serves it
        if not (is_hopeless or is_foreign or cause.is_damage or cause is Cause.VANISHED):
            return None
        detail = f"{tier.name}: {outcome.detail}"
        aside = is_hopeless or is_foreign
        self._planner.missing(record, tier.index, cause, detail, aside=aside)
        if is_hopeless and not is_foreign:
            tier.sets_aside(record.key)
        elif not cause.is_damage:
            return None
        return Damaged(record.key, outcome.version)

    def _quarantine(
        self, tier: LowerTier, damaged: Damaged, outcome: Outcome
    ) -> TierCall[object] | None:
        """Have a damaged object taken out of its tier's sight."""
        cause, detail = outcome.cause, outcome.detail
        if tier.emit and cause is not None:
            key = damaged.key
            tier.emit(ObjectQuarantined(tier=tier.name, key=key, cause=cause, detail=detail))

        def ended(call: TierCall[object]) -> None:
            if call.was_late:
                tier.fails(Cause.DEADLINE, "quarantine did not end in time")
            elif call.error is not None and not call.was_cancelled:
                tier.complains(Cause.TIER_DOWN, words(call.error))

        try:
            call = tier.guard.start(partial(self._objects.quarantine, tier.index, damaged), ended)
        except Refused:  # found again, and quarantined then, at the next load
            return None
        call.left_alone(cancel=True)
        return call
