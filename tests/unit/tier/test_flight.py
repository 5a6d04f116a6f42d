"""Flights: one transfer per object, whoever comes and goes."""

from __future__ import annotations

import asyncio

import pytest

from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.results import Cause
from kvlayer.tier.guard.guard import Guard
from kvlayer.tier.messages import Outcome
from kvlayer.tier.transfer.flight import Flight, Flights, outcome_of

KEY = ObjectKey.of("ab" * 32, "0", bytes(32), 16, Part(0, (0, 4), (0, 2)))
NEVER = 3600.0


class Transfer:
    """A transfer that ends when it is told to."""

    def __init__(self, deadline: float = NEVER) -> None:
        self.gate = asyncio.Event()
        self.began = asyncio.Event()
        self.guard = Guard(deadline, 2)
        self.flights = Flights()
        call = self.guard.start(self.run, lambda _: self.flights.land(KEY))
        self.flight = Flight(KEY, 1, call, self.guard)
        self.flights.add(self.flight)
        self.error: BaseException | None = None

    async def run(self) -> Outcome:
        self.began.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Outcome(KEY, nbytes=7)


@pytest.mark.asyncio
async def test_all_waiters_share_one_transfer() -> None:
    transfer = Transfer()
    joined = [transfer.flights.join(KEY) for _ in range(3)]
    assert joined == [transfer.flight] * 3
    assert transfer.flight.waiters == 4
    assert len(transfer.flights) == 1
    waiting = [asyncio.create_task(transfer.flight.wait()) for _ in range(4)]
    await transfer.began.wait()
    transfer.gate.set()
    assert await asyncio.gather(*waiting) == [Outcome(KEY, nbytes=7)] * 4
    assert transfer.flight.has_ended
    assert len(transfer.flights) == 0
    assert transfer.flights.join(KEY) is None


@pytest.mark.asyncio
async def test_one_waiter_leaving_cancels_nothing_and_the_last_one_does() -> None:
    transfer = Transfer()
    transfer.flights.join(KEY)
    await transfer.began.wait()
    transfer.flight.leave()
    assert transfer.flights.join(KEY) is transfer.flight
    transfer.flight.leave()
    assert not transfer.flight.has_ended
    transfer.flight.leave()
    await transfer.flight.call.ended()
    outcome = outcome_of(transfer.flight.call, KEY)
    assert outcome.cause is Cause.DEADLINE
    assert len(transfer.flights) == 0


@pytest.mark.asyncio
async def test_a_transfer_that_someone_still_wants_is_not_cancelled() -> None:
    transfer = Transfer()
    joined = transfer.flights.join(KEY)
    assert joined is not None
    await transfer.began.wait()
    transfer.flight.leave()
    transfer.gate.set()
    assert await joined.wait() == Outcome(KEY, nbytes=7)
    assert not joined.was_given_up


@pytest.mark.asyncio
async def test_leaving_a_transfer_that_has_ended_changes_nothing() -> None:
    transfer = Transfer()
    transfer.gate.set()
    assert await transfer.flight.wait() == Outcome(KEY, nbytes=7)
    transfer.flight.leave()
    assert outcome_of(transfer.flight.call, KEY).ok


@pytest.mark.asyncio
async def test_a_deadline_is_no_outcome() -> None:
    transfer = Transfer(deadline=0.002)
    assert await transfer.flight.wait() is None
    transfer.gate.set()
    assert await transfer.flight.call.ended()
    assert outcome_of(transfer.flight.call, KEY).ok


@pytest.mark.asyncio
async def test_a_backend_that_breaks_its_contract_is_a_failing_tier() -> None:
    transfer = Transfer()
    transfer.error = RuntimeError("surprise")
    transfer.gate.set()
    outcome = await transfer.flight.wait()
    assert outcome is not None
    assert outcome.cause is Cause.TIER_DOWN
    assert outcome.detail == "RuntimeError: surprise"


@pytest.mark.asyncio
async def test_a_transfer_given_up_before_it_started_still_lands() -> None:
    transfer = Transfer()
    transfer.flight.leave()
    await transfer.flight.call.ended()
    assert not transfer.began.is_set()
    assert len(transfer.flights) == 0
