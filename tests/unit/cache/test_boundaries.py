"""States: a hit ends where one is kept, or not at all; and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import WEIGHTS, tokens
from engine import Engine, same

from kvlayer import Cache, CacheConfig, Explanation, ModelConfig, TierConfig
from kvlayer.errors import LayoutError
from kvlayer.layout import (
    NHD,
    STATE_BLOCKS,
    AttentionKind,
    GroupLayout,
    HitRule,
    KVGroup,
    KVLayout,
    KVView,
)
from kvlayer.results import Cause

CHUNK = 16
FULL = KVGroup(AttentionKind.MHA, (0, 3), "bfloat16", 2, 8)
STATE = KVGroup(AttentionKind.STATE, (1,), "float32", state_nbytes=64)
LOCAL = KVGroup(
    AttentionKind.MHA, (2,), "bfloat16", 2, 8, hit_rule=HitRule.CHUNKED, window_tokens=32
)
HYBRID = KVLayout((GroupLayout(FULL, NHD, 4), GroupLayout(STATE, STATE_BLOCKS, 4)))
CHUNKED = KVLayout((GroupLayout(FULL, NHD, 4), GroupLayout(LOCAL, NHD, 4)))
STATES = KVLayout.single(STATE, STATE_BLOCKS, tokens_per_block=4)


def settings(folder: Path | None = None) -> CacheConfig:
    tiers = [TierConfig(url="cpu://?capacity=1MiB")]
    if folder is not None:
        tiers.append(TierConfig(url=f"file://{folder}", write="through"))
    return CacheConfig(
        model=ModelConfig(weights=WEIGHTS), tiers=tuple(tiers), tokens_per_chunk=CHUNK
    )


def lent(engine: Engine, slots: torch.Tensor, states: Iterable[int]) -> KVView:
    """All attention, and a state's slot only after the last token of each of these prefixes."""
    some = torch.full_like(slots, -1)
    for end in states:
        some[end - 1] = slots[end - 1]
    kinds = [layout.group.kind for layout in engine.layout.groups]
    views: list[Any] = [some if kind is AttentionKind.STATE else slots for kind in kinds]
    return KVView(engine.caches, views)


def state_at(engine: Engine, slots: torch.Tensor, end: int) -> torch.Tensor:
    found: torch.Tensor = engine.caches[-1][0].view(torch.int32)[slots[end - 1] // 4]
    return found


async def found(cache: Cache, length: int) -> int:
    async with cache.lookup(tokens(length)) as hit:
        return hit.tokens


@pytest.mark.asyncio
async def test_a_hit_ends_where_a_state_is_and_brings_it(tmp_path: Path) -> None:
    engine, other = Engine(HYBRID, 32, 1), Engine(HYBRID, 32, 2)
    slots, theirs = engine.slots(112), other.slots(112, seed=5)
    async with Cache.open(settings(tmp_path), HYBRID) as cache:
        report = await cache.store(tokens(112), lent(engine, slots, [48, 96]))
        assert (report.stored, report.failed) == (7, ())
    async with Cache.open(settings(tmp_path), HYBRID) as cache:
        for length, expected in [(112, 96), (96, 96), (95, 48), (64, 48), (47, 0)]:
            assert await found(cache, length) == expected
        async with cache.lookup(tokens(112)) as hit:
            view = lent(other, theirs, [96])
            assert (await cache.retrieve(hit, view)).tokens == 96
    assert same(engine.read(slots[:96]), other.read(theirs[:96]))
    assert torch.equal(state_at(engine, slots, 96), state_at(other, theirs, 96))


@pytest.mark.asyncio
async def test_states_that_come_later_are_stored_beside_their_attention() -> None:
    engine = Engine(HYBRID, 32, 1)
    slots = engine.slots(64)
    async with Cache.open(settings(), HYBRID) as cache:
        assert (await cache.store(tokens(64), lent(engine, slots, []))).stored == 4
        assert await found(cache, 64) == 0
        report = await cache.store(tokens(64), lent(engine, slots, [48]))
        assert (report.stored, report.skipped) == (1, 3)
        assert await found(cache, 64) == 48


@pytest.mark.asyncio
@pytest.mark.parametrize("group", [0, 1])
async def test_half_a_boundary_is_none(group: int) -> None:
    engine = Engine(HYBRID, 32, 1)
    slots = engine.slots(64)
    async with Cache.open(settings(), HYBRID) as cache:
        await cache.store(tokens(64), lent(engine, slots, [64]))
        planner = cache.stack.planner
        gone = [r for r in planner.directory.objects() if r.part.group == group]
        planner.evict(gone, Cause.EVICTED, "by the test")
        assert await found(cache, 64) == 0
        told = await cache.control.explain(tokens(64))
        assert {miss.cause for miss in told.misses} <= {Cause.EVICTED, Cause.NEVER_STORED}
        assert any(miss.cause is Cause.EVICTED for miss in told.misses)


def said(told: Explanation) -> list[tuple[int, int, Cause, str]]:
    return [(miss.start, miss.stop, miss.cause, miss.detail) for miss in told.misses]


@pytest.mark.asyncio
async def test_explain_says_how_far_attention_and_states_go() -> None:
    engine = Engine(HYBRID, 32, 1)
    slots = engine.slots(112)
    async with Cache.open(settings(), HYBRID) as cache:
        await cache.store(tokens(96), lent(engine, slots[:96], []))
        told = await cache.control.explain(tokens(96))
        none = "attention is there to 96, there is no state"
        assert said(told) == [(0, 96, Cause.NEVER_STORED, none)]
        await cache.store(tokens(112), lent(engine, slots, [32, 96]))
        told = await cache.control.explain(tokens(112))
        end = "attention is there to 112, the state to 96"
        assert said(told) == [(96, 112, Cause.NEVER_STORED, end)]
        planner = cache.stack.planner
        chunk = [
            r for r in planner.directory.objects() if r.part.group == 1 and r.chunk.start == 80
        ]
        planner.evict(chunk, Cause.CORRUPT, "it was damaged")
        told = await cache.control.explain(tokens(112))
        there = "attention is there to 112, the state to 32"
        assert said(told) == [
            (32, 80, Cause.NEVER_STORED, there),
            (80, 96, Cause.CORRUPT, f"{there}; at 96: it was damaged, 0 s ago"),
            (96, 112, Cause.NEVER_STORED, there),
        ]
        assert told.hit_tokens == 32


@pytest.mark.asyncio
async def test_a_model_of_states_alone_hits_where_one_is(tmp_path: Path) -> None:
    engine = Engine(STATES, 64, 1)
    slots = engine.slots(160)
    async with Cache.open(settings(tmp_path), STATES) as cache:
        report = await cache.store(tokens(160), lent(engine, slots, [32, 80]))
        assert report.stored == 2
    async with Cache.open(settings(tmp_path), STATES) as cache:
        assert [await found(cache, n) for n in (160, 80, 79, 32, 31)] == [80, 80, 32, 32, 0]


@pytest.mark.asyncio
async def test_chunked_attention_needs_what_is_behind_the_last_whole_attention_chunk() -> None:
    engine, other = Engine(CHUNKED, 32, 1), Engine(CHUNKED, 32, 2)
    slots = engine.slots(96)
    gone = slots.clone()
    gone[:64] = -1
    async with Cache.open(settings(), CHUNKED) as cache:
        await cache.store(tokens(96), KVView(engine.caches, [slots, gone]))
        lengths = [await found(cache, n) for n in (96, 80, 64, 48, 32, 16)]
        assert lengths == [96, 80, 64, 32, 32, 0]
        async with cache.lookup(tokens(80)) as hit:
            assert (await cache.retrieve(hit, KVView(other.caches, [slots, gone]))).tokens == 80
    first, second = engine.read(slots[64:80]), other.read(slots[64:80])
    assert same(first, second)


@pytest.mark.asyncio
async def test_a_view_that_has_no_place_for_the_state_is_given_nothing() -> None:
    """It was made for a longer hit, say, of which something has gone since."""
    engine, other = Engine(HYBRID, 32, 1), Engine(HYBRID, 32, 2)
    slots = engine.slots(96)
    async with Cache.open(settings(), HYBRID) as cache:
        await cache.store(tokens(96), lent(engine, slots, [48, 96]))
        async with cache.lookup(tokens(96)) as hit:
            assert hit.tokens == 96
            report = await cache.retrieve(hit, lent(other, slots, [48]))
            assert report.tokens == 0
            (failed,) = report.failed
            assert failed.cause is Cause.VANISHED and "no slots" in failed.detail
            report = await cache.retrieve(hit, lent(other, slots, [96]))
            assert report.tokens == 96
            short = KVView(other.caches, [v[:60] for v in lent(other, slots, [48]).slots])
            assert (await cache.retrieve(hit, short)).tokens == 48


def test_only_states_have_the_rule_of_states() -> None:
    with pytest.raises(LayoutError, match="mha group cannot have the hit rule boundary"):
        KVGroup(AttentionKind.MHA, (0,), "float16", 1, 8, hit_rule=HitRule.BOUNDARY)
    for rule in (HitRule.TRAILING, HitRule.CHUNKED):
        for window in (None, 0):
            with pytest.raises(LayoutError, match=f"{rule} group needs window_tokens >= 1"):
                KVGroup(
                    AttentionKind.MHA, (0,), "float16", 1, 8, hit_rule=rule, window_tokens=window
                )
    for rule in HitRule:
        made = KVGroup(
            AttentionKind.STATE, (0,), "int8", state_nbytes=8, hit_rule=rule, window_tokens=4
        )
        assert made.hit_rule is HitRule.BOUNDARY
