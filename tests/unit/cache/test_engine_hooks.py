"""What an engine's adapter hooks into: the moment a view is free, certain hits, its own stager."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import config, layout, stored_files, tokens
from engine import Engine, same
from sick import Patient, ward

from kvlayer import Cache, Cause, KVView, Scope
from kvlayer.abc.stager import HostCopy
from kvlayer.bench.sick import Sickness
from kvlayer.errors import LayoutError
from kvlayer.events import Event, PrefetchDone
from kvlayer.layout import NHD, AttentionKind, GroupLayout, KVGroup, KVLayout
from kvlayer.memory.slab import Slab
from kvlayer.staging.torch_stager import TorchStager
from kvlayer.testing.sim import in_virtual_time

PROMPT = tokens(64)


@in_virtual_time
async def test_a_store_says_when_the_view_is_free_before_a_slow_tier_has_committed() -> None:
    patient = Patient.fresh()
    gathered_at: list[float] = []
    async with ward(patient) as cache:
        engine = Engine(layout(), 32, 1)
        patient.falls(Sickness.SLOW)
        began = cache.parts.clock()
        await cache.store(
            PROMPT,
            engine.view(engine.slots(64)),
            on_gathered=lambda: gathered_at.append(cache.parts.clock()),
        )
        assert gathered_at == [began] and cache.parts.clock() > began
        await cache.store(
            PROMPT,
            engine.view(engine.slots(64)),
            on_gathered=lambda: gathered_at.append(cache.parts.clock()),
        )
        assert len(gathered_at) == 2  # there was nothing to gather, and that is said, too


@pytest.mark.asyncio
async def test_a_promoted_hit_is_loaded_although_the_tier_has_lost_it(tmp_path: Path) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    slots = engine.slots(64)
    events: list[Event] = []
    async with Cache.open(config(tmp_path), layout(), sinks=[events.append]) as cache:
        await cache.store(PROMPT, engine.view(slots))
        await cache.control.evict(PROMPT, tier="cpu")
        async with cache.lookup(PROMPT) as hit:
            assert hit.by_tier == {"cpu": 0, "file": 64}
            report = await cache.promote(hit)
            assert report.tokens == 64
            for path in stored_files(tmp_path):
                path.unlink()
            loaded = await cache.retrieve(hit, other.view(slots))
        assert loaded.tokens == 64 and same(engine.read(slots), other.read(slots))
        (told,) = [event for event in events if isinstance(event, PrefetchDone)]
        assert (told.asked_tokens, told.tokens) == (64, 64)


@pytest.mark.asyncio
async def test_promoting_tells_what_is_left_of_a_damaged_hit(tmp_path: Path) -> None:
    engine = Engine(layout(), 32, 1)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(PROMPT, engine.view(engine.slots(64)))
        await cache.control.evict(PROMPT, tier="cpu")
        third = cache.chain(PROMPT, Scope()).hashes[2].hex()
        (path,) = [p for p in stored_files(tmp_path) if third in p.name]
        path.write_bytes(path.read_bytes()[:-1])
        async with cache.lookup(PROMPT) as hit:
            report = await cache.promote(hit)
        assert report.tokens == 32 and [f.cause for f in report.failed] == [Cause.TRUNCATED]


@in_virtual_time
async def test_promoting_ends_at_its_deadline() -> None:
    patient = Patient.fresh()
    async with ward(patient) as cache:
        engine = Engine(layout(), 32, 1)
        await cache.store(PROMPT, engine.view(engine.slots(64)))
        await cache.control.evict(PROMPT, tier="cpu")
        async with cache.lookup(PROMPT) as hit:
            patient.falls(Sickness.DEAD)
            began = cache.parts.clock()
            report = await cache.promote(hit, deadline=0.5)
            assert report.tokens == 0 and cache.parts.clock() - began == pytest.approx(0.5)
        patient.falls(Sickness.HEALTHY)


@in_virtual_time
async def test_promoting_ends_when_it_has_cost_as_much_as_computing_would() -> None:
    """And the next lookup knows better: nothing is tried twice."""
    patient = Patient.fresh()
    async with ward(patient, prefill_tokens_per_second=1000.0) as cache:
        engine = Engine(layout(), 32, 1)
        await cache.store(PROMPT, engine.view(engine.slots(64)))
        await cache.control.evict(PROMPT, tier="cpu")
        patient.latency = 1.5
        async with cache.lookup(PROMPT) as hit:
            began = cache.parts.clock()
            report = await cache.promote(hit)
            assert report.tokens == 0 and cache.parts.clock() - began == pytest.approx(0.064)
        assert [failure.cause for failure in report.failed] == [Cause.DEADLINE]
        async with cache.lookup(PROMPT) as hit:
            assert hit.tokens == 0


@pytest.mark.asyncio
async def test_a_hit_of_another_cache_is_not_promoted() -> None:
    engine = Engine(layout(), 32, 1)
    async with Cache.open(config(), layout()) as cache, Cache.open(config(), layout()) as other:
        await cache.store(PROMPT, engine.view(engine.slots(64)))
        async with cache.lookup(PROMPT) as hit:
            with pytest.raises(LayoutError, match="did not come from a lookup of this cache"):
                await other.promote(hit)


class Counting(TorchStager):
    """An engine's own stager."""

    def __init__(self, kv: KVLayout, threads: int) -> None:
        super().__init__(kv, threads=threads)
        self.calls: list[str] = []

    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        self.calls.append("gather")
        await super().gather(view, copies)

    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        self.calls.append("scatter")
        await super().scatter(view, copies)


@pytest.mark.asyncio
async def test_an_engine_brings_its_own_stager() -> None:
    made: list[Counting] = []

    def make(kv: KVLayout, _slab: Slab, threads: int) -> Counting:
        made.append(Counting(kv, threads))
        return made[-1]

    engine = Engine(layout(), 32, 1)
    async with Cache.open(config(), layout(), make_stager=make) as cache:
        await cache.store(PROMPT, engine.view(engine.slots(64)))
        async with cache.lookup(PROMPT) as hit:
            await cache.retrieve(hit, engine.view(engine.slots(64)))
    assert [stager.calls for stager in made] == [["gather", "scatter"]]


@pytest.mark.asyncio
async def test_a_layer_is_reported_when_it_is_complete_and_before_the_next_one() -> None:
    kv = KVLayout((GroupLayout(full_group(), NHD, 4), GroupLayout(odd_group(), NHD, 4)))
    engine, other = Engine(kv, 32, 1), Engine(kv, 32, 2)
    slots = engine.slots(64)
    seen: list[tuple[int, int, int]] = []

    def landed(group: int, local: int) -> None:
        complete = sum(
            torch.equal(mine.view(torch.int32), theirs.view(torch.int32))
            for mine, theirs in zip(engine.caches[0], copied(0), strict=True)
        )
        seen.append((group, local, complete))

    def copied(group: int) -> list[Any]:
        return other.caches[group]

    for mine, theirs in zip(engine.caches, other.caches, strict=True):
        for one, two in zip(mine, theirs, strict=True):
            two.copy_(one)  # what is not loaded is equal already
            two.view(-1, 4, 2, 8)[(slots[::4] // 4)[:1]] += 1  # and in one block it is not
    async with Cache.open(config(), kv) as cache:
        await cache.store(PROMPT, engine.view(slots))
        async with cache.lookup(PROMPT) as hit:
            report = await cache.retrieve(hit, other.view(slots), on_layer=landed)
    assert report.tokens == 64 and same(engine.read(slots), other.read(slots))
    # Layers 0, 1, 2, 3 of the model: two groups take turns.
    assert [(group, local) for group, local, _ in seen] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [complete for *_, complete in seen] == [1, 1, 2, 2]


def full_group() -> KVGroup:
    return KVGroup(AttentionKind.MHA, (0, 2), "float32", 2, 8)


def odd_group() -> KVGroup:
    return KVGroup(AttentionKind.MHA, (1, 3), "float32", 2, 8)
