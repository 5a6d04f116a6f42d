"""A request that wants nothing from lower tiers gets what host memory has, at once."""

from __future__ import annotations

import asyncio

import pytest
from caches import layout, tokens
from engine import Engine, same
from sick import Patient, send_down, ward

from kvlayer import Cache, Scope
from kvlayer.bench.sick import Sickness
from kvlayer.errors import ArgumentError
from kvlayer.results import Cause
from kvlayer.testing.sim import in_virtual_time

PROMPT = tokens(64)
NEAR = Scope(memory_only=True)


async def forget(cache: Cache, *chunks: int) -> None:
    """Leave these chunks to the tier alone."""
    while cache.stack.inflight:  # noqa: ASYNC110  # time is virtual
        await asyncio.sleep(0.01)
    planner = cache.stack.planner
    with planner.lock:
        path = planner.match(cache.chain(PROMPT, Scope())).path()
        planner.evict([path[i] for i in chunks], Cause.CLEARED, "")


@pytest.mark.parametrize(("gone", "found"), [((), 64), ((2, 3), 32), ((1,), 16), ((0,), 0)])
@in_virtual_time
async def test_a_hit_ends_where_host_memory_ends(gone: tuple[int, ...], found: int) -> None:
    patient = Patient.fresh()
    async with ward(patient) as cache:
        engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
        slots = engine.slots(64)
        await cache.store(PROMPT, engine.view(slots))
        await forget(cache, *gone)
        patient.falls(Sickness.DEAD)
        patient.calls.clear()
        async with cache.lookup(PROMPT, scope=NEAR) as hit:
            assert hit.tokens == found == hit.by_tier.get("cpu", 0)
            report = await cache.retrieve(hit, other.view(slots))
        assert report.tokens == found and not report.failed
        assert same(engine.read(slots[:found]), other.read(slots[:found]))
        assert not patient.calls
        patient.falls(Sickness.HEALTHY)
        async with cache.lookup(PROMPT) as hit:  # anybody else gets all of it
            assert hit.tokens == 64


@in_virtual_time
async def test_a_tier_is_not_asked_what_another_process_has_stored_there() -> None:
    patient = Patient.fresh()
    async with ward(patient) as cache:
        await send_down(cache, [0], Engine(layout(), 32, 1))
    async with ward(patient) as cache:
        patient.calls.clear()
        async with cache.lookup(PROMPT, scope=NEAR) as hit:
            assert hit.tokens == 0
        assert not patient.calls
        async with cache.lookup(PROMPT) as hit:
            assert hit.tokens == 64
        assert patient.calls


def test_a_wish_that_is_no_flag_is_refused() -> None:
    with pytest.raises(ArgumentError, match="memory_only must be True or False"):
        Scope(memory_only="no")  # type: ignore[arg-type]
