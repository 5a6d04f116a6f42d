"""Calls can be followed: what has begun, what belongs to which request, what hangs."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
from caches import config, layout, tokens
from engine import Engine
from hang import HANG
from sick import Patient, ward

from kvlayer import Cache, Portal, Scope
from kvlayer.bench.sick import Sickness
from kvlayer.events import (
    Emitter,
    Event,
    LookupDone,
    ObjectsStored,
    PrefetchDone,
    RequestStarted,
    RetrieveDone,
    StoreDone,
    TransferDone,
    TransferStarted,
)
from kvlayer.testing.sim import in_virtual_time

DONE = {
    "store": StoreDone,
    "lookup": LookupDone,
    "retrieve": RetrieveDone,
    "prefetch": PrefetchDone,
}


@pytest.mark.asyncio
async def test_every_event_has_a_number_a_time_and_its_request(tmp_path: Path) -> None:
    heard: list[Event] = []
    engine = Engine(layout(), 64)
    prompt, view = tokens(64), engine.view(engine.slots(64))
    scope = Scope(owner="alice")
    async with Cache.open(config(tmp_path), layout(), sinks=[heard.append]) as cache:
        await cache.store(prompt, view, scope=scope)
        await cache.control.evict(prompt, tier="cpu")
        async with cache.lookup(prompt, scope=scope) as hit:
            await cache.retrieve(hit, view)
        await cache.prefetch(prompt, scope=scope)
    assert [event.id for event in heard] == [*range(1, len(heard) + 1)]
    assert all(a.at <= b.at for a, b in pairwise(heard))
    assert heard[0].at > 1.6e9
    begun = [event for event in heard if isinstance(event, RequestStarted)]
    assert [event.operation for event in begun] == ["store", "lookup", "retrieve", "prefetch"]
    assert {event.owner for event in begun} == {"alice"}
    assert [event.tokens for event in begun] == [64] * 4
    for start in begun:
        assert start.request == start.id
        belonging = [event for event in heard if event.request == start.id]
        assert sum(type(event) is DONE[start.operation] for event in belonging) == 1
    store, _, retrieve, _ = begun
    kinds = Counter((type(event), event.request) for event in heard)
    assert kinds[TransferStarted, store.id] == kinds[TransferDone, store.id] == 4
    assert kinds[ObjectsStored, store.id] == 1
    assert kinds[TransferStarted, retrieve.id] == kinds[TransferDone, retrieve.id] == 4


@pytest.mark.asyncio
async def test_what_begins_in_another_s_turn_keeps_its_own_request(tmp_path: Path) -> None:
    """Writes wait for their turns, and begin when somebody else's ends."""
    heard: list[Event] = []
    engine = Engine(layout(), 256)
    settings = config(tmp_path, write="back")
    async with Cache.open(settings, layout(), sinks=[heard.append]) as cache:
        views = [engine.view(engine.slots(64)) for _ in range(3)]
        stores = [cache.store(tokens(64, n), view) for n, view in enumerate(views)]
        await asyncio.gather(*stores)
        await cache.flush()
        names = [{*cache.chain(tokens(64, n)).hashes} for n in range(3)]
    keys: dict[int, set[bytes]] = {}
    for event in heard:
        if isinstance(event, TransferStarted | TransferDone):
            keys.setdefault(event.request, set()).add(event.key.end_hash)
    assert len(keys) == 3
    assert sorted(map(sorted, keys.values())) == sorted(map(sorted, names))


@pytest.mark.asyncio
async def test_demotion_is_nobody_s_request(tmp_path: Path) -> None:
    heard: list[Event] = []
    engine = Engine(layout(), 64)
    settings = config(
        tmp_path, write="demote", host="64KiB", high_watermark=0.5, low_watermark=0.25
    )
    async with Cache.open(settings, layout(), sinks=[heard.append]) as cache:
        await cache.store(tokens(64), engine.view(engine.slots(64)))
        await cache.flush()
    moved = [event for event in heard if isinstance(event, TransferStarted)]
    assert moved
    assert {event.request for event in moved} == {0}


@pytest.mark.asyncio
async def test_two_caches_in_one_task_do_not_meet() -> None:
    one, two = Emitter([lambda _: None]), Emitter([lambda _: None])
    with one.request("store", "", 1):
        assert (one.current, two.current) == (1, 0)
        with two.request("lookup", "", 1):
            assert (one.current, two.current) == (0, 1)
        assert one.current == 1
        with one.within(0):
            assert one.current == 0
    assert one.current == 0


def test_unheard_nothing_is_computed() -> None:
    emit = Emitter()
    assert isinstance(emit.request("store", "", 1), nullcontext)
    assert isinstance(emit.within(5), nullcontext)
    with emit.within(5):
        assert emit.current == 0


def test_a_lookup_of_another_thread_starts_and_ends(tmp_path: Path) -> None:
    heard: list[Event] = []
    with Portal.open(config(tmp_path), layout(), sinks=[heard.append]) as portal:
        portal.lookup(tokens(64)).wait(HANG)
    kinds = [(type(event), event.request) for event in heard]
    assert kinds == [(RequestStarted, 1), (LookupDone, 1)]


@pytest.mark.asyncio
async def test_a_request_that_is_cancelled_has_no_end_and_the_next_is_another() -> None:
    heard: list[Event] = []
    engine = Engine(layout(), 64)
    prompt, view = tokens(64), engine.view(engine.slots(64))
    async with Cache.open(config(), layout(), sinks=[heard.append]) as cache:
        task = asyncio.ensure_future(cache.store(prompt, view))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await cache.store(prompt, view)
    begun = [event.id for event in heard if isinstance(event, RequestStarted)]
    done = [event.request for event in heard if isinstance(event, StoreDone)]
    assert len(begun) == 2
    assert done == begun[1:]


@in_virtual_time
async def test_a_call_that_hangs_is_the_oldest_in_the_stats() -> None:
    engine, patient = Engine(layout(), 64), Patient.fresh()
    async with ward(patient, write="back", tier={"deadline_seconds": 1000.0}) as cache:
        await asyncio.sleep(1)  # the tier has been told what the namespace stands for
        tier = cache.control.stats().tiers[1]
        assert (tier.oldest_call, tier.oldest_call_seconds) == ("", 0.0)
        patient.falls(Sickness.DEAD)
        await cache.store(tokens(64), engine.view(engine.slots(64)))
        await asyncio.sleep(30)
        tier = cache.control.stats().tiers[1]
        assert (tier.oldest_call, tier.oldest_call_seconds) == ("writes", 30.0)
        patient.falls(Sickness.HEALTHY)
        await cache.flush()
        tier = cache.control.stats().tiers[1]
        assert (tier.oldest_call, tier.oldest_call_seconds) == ("", 0.0)
