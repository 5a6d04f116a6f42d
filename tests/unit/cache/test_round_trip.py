"""Bytes that went through the tiers come back bit-identical, whatever the layout."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from caches import WEIGHTS, config, tokens
from engine import Engine, same
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer import (
    AttentionKind,
    Cache,
    CacheConfig,
    HitRule,
    KVGroup,
    KVLayout,
    KVView,
    ModelConfig,
    TierConfig,
)
from kvlayer.identity.links import link_size
from kvlayer.layout import (
    DENSE,
    FUSED_HND,
    HND,
    MLA_BLOCKS,
    NHD,
    NHD_BLOCK_FIRST,
    NHD_PAIR,
    STATE_BLOCKS,
    Axes,
    GroupLayout,
)

DTYPES = ["float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2", "int8"]
PAGED: list[Axes] = [NHD, NHD_BLOCK_FIRST, NHD_PAIR, HND, FUSED_HND]


@st.composite
def groups(draw: st.DrawFn) -> KVGroup:
    layers = tuple(range(draw(st.integers(1, 4))))
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):
        return KVGroup(
            AttentionKind.MHA,
            layers,
            dtype,
            draw(st.sampled_from([1, 2, 4])),
            draw(st.sampled_from([1, 4, 10, 16])),
            draw(st.sampled_from([None, 6])),
        )
    return KVGroup(AttentionKind.MLA, layers, dtype, 1, draw(st.sampled_from([5, 16])))


def _layouts(draw: st.DrawFn, group: KVGroup, chunk: int) -> KVLayout:
    block = draw(st.sampled_from([b for b in (1, 2, 4, 8) if chunk % b == 0]))
    if group.kind is AttentionKind.MLA:
        axes: Axes = MLA_BLOCKS
    else:
        usable = [*PAGED, DENSE]
        if group.v_head_size not in (None, group.head_size):
            usable = [NHD_PAIR, FUSED_HND, DENSE]  # one tensor cannot hold two row lengths
        axes = draw(st.sampled_from(usable))
    if axes == DENSE:
        block = 1
    form = "canonical"
    if axes != DENSE and link_size(chunk) % block == 0 and draw(st.booleans()):
        form = f"native:{'-'.join(axes)}-b{block}"
    return KVLayout.single(group, axes, tokens_per_block=block, form=form)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[KVLayout, KVLayout, int, int]:
    """A writer's layout, a reader's that can read it, the chunk size and a prompt's length."""
    chunk = draw(st.sampled_from([8, 16, 24]))
    group = draw(groups())
    writer = _layouts(draw, group, chunk)
    reader = writer
    if writer.groups[0].form == "canonical":
        reader = _layouts(draw, group, chunk)
        if reader.groups[0].form != "canonical":
            reader = KVLayout.single(
                group, reader.groups[0].axes, tokens_per_block=reader.groups[0].tokens_per_block
            )
    return writer, reader, chunk, draw(st.integers(1, 5 * chunk))


@settings(max_examples=60)
@given(scene=scenes(), seed=st.integers(0, 2**16))
@pytest.mark.asyncio
async def test_store_evict_from_host_and_retrieve_from_disk_is_bit_identical(
    scene: tuple[KVLayout, KVLayout, int, int], seed: int
) -> None:
    writer_layout, reader_layout, chunk, length = scene
    prompt = tokens(length, seed)
    writer = Engine(writer_layout, 128, seed)
    reader = Engine(reader_layout, 128, seed + 1)
    slots, other = writer.slots(length, seed=seed), reader.slots(length, seed=seed + 1)
    with tempfile.TemporaryDirectory() as directory:
        settings_ = config(Path(directory), tokens_per_chunk=chunk)
        async with Cache.open(settings_, writer_layout) as cache:
            report = await cache.store(prompt, writer.view(slots))
            assert report.failed == ()
            assert await cache.control.evict(prompt, tier="cpu") == report.stored
        async with Cache.open(settings_, reader_layout) as cache:
            async with cache.lookup(prompt) as hit:
                step = link_size(chunk)
                assert hit.tokens == length // step * step
                assert hit.by_tier["cpu"] == 0
                loaded = await cache.retrieve(hit, reader.view(other))
    assert loaded.tokens == hit.tokens
    assert same(writer.read(slots[: hit.tokens]), reader.read(other[: hit.tokens]))


@pytest.mark.asyncio
async def test_what_is_still_in_host_memory_needs_no_disk(tmp_path: Path) -> None:
    layout = KVLayout.single(KVGroup(AttentionKind.MHA, (0, 1), "float16", 2, 8), NHD)
    engine, other = Engine(layout, 64, 1), Engine(layout, 64, 2)
    prompt, slots = tokens(40), engine.slots(40)
    async with Cache.open(config(tmp_path), layout) as cache:
        await cache.store(prompt, engine.view(slots))
        async with cache.lookup(prompt) as hit:
            assert hit.by_tier == {"cpu": 40, "file": 0}
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 40
        assert cache.control.stats().tiers[1].hits == 0
    assert same(engine.read(slots), other.read(slots))


HEADS = KVGroup(AttentionKind.MHA, tuple(range(4)), "bfloat16", 4, 8)


def _rank(size: int, rank: int, layers: tuple[int, int] | None = None) -> KVLayout:
    width = 4 // size
    return KVLayout.single(
        HEADS, NHD, tokens_per_block=4, heads=(rank * width, (rank + 1) * width), layers=layers
    )


@pytest.mark.parametrize(("writers", "shards"), [(1, 4), (2, 4), (4, 4), (2, 2), (1, 1)])
@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.asyncio
async def test_any_mixture_of_parts_that_covers_the_need_is_read(
    tmp_path: Path, writers: int, shards: int, readers: int
) -> None:
    prompt = tokens(40)
    whole = Engine(_rank(1, 0), 32, 5)
    slots = whole.slots(40)
    for rank in range(writers):
        layout = _rank(writers, rank)
        lo, hi = layout.groups[0].head_range
        engine = Engine(layout, 32)
        engine.caches = [[layer[:, :, :, lo:hi].contiguous() for layer in whole.caches[0]]]
        async with Cache.open(config(tmp_path, head_shards=shards), layout) as cache:
            assert (await cache.store(prompt, engine.view(slots))).stored == 3
    for rank in range(readers):
        layout = _rank(readers, rank)
        engine = Engine(layout, 32, 9 + rank)
        mixed = max(shards, readers)
        async with Cache.open(config(tmp_path, head_shards=mixed), layout) as cache:
            await cache.recovered()
            async with cache.lookup(prompt) as hit:
                assert hit.tokens == 40
                assert (await cache.retrieve(hit, engine.view(slots))).tokens == 40
        heads = layout.groups[0].head_range
        assert same(whole.read(slots, heads=heads), engine.read(slots))


@pytest.mark.asyncio
async def test_layer_ranges_of_pipeline_stages_cover_the_whole_model(tmp_path: Path) -> None:
    prompt = tokens(32)
    whole = Engine(_rank(1, 0), 32, 5)
    slots = whole.slots(32)
    for layers in ((0, 1), (1, 4)):
        layout = _rank(1, 0, layers)
        engine = Engine(layout, 32)
        engine.caches = [[layer.clone() for layer in whole.caches[0][slice(*layers)]]]
        async with Cache.open(config(tmp_path), layout) as cache:
            await cache.store(prompt, engine.view(slots))
    engine = Engine(_rank(1, 0), 32, 7)
    async with Cache.open(config(tmp_path), _rank(1, 0)) as cache:
        await cache.recovered()
        async with cache.lookup(prompt) as hit:
            assert (await cache.retrieve(hit, engine.view(slots))).tokens == 32
    assert same(whole.read(slots), engine.read(slots))


@pytest.mark.parametrize("covered", [1, 29, 31, 47])
@pytest.mark.asyncio
async def test_a_view_that_ends_inside_a_native_block_gets_the_whole_blocks_before(
    covered: int,
) -> None:
    layout = KVLayout.single(HEADS, NHD, tokens_per_block=2, form="native:nhd-b2")
    engine, other = Engine(layout, 64, 1), Engine(layout, 64, 2)
    prompt, slots = tokens(48), engine.slots(48)
    async with Cache.open(config(), layout) as cache:
        await cache.store(prompt, engine.view(slots))
        async with cache.lookup(prompt) as hit:
            report = await cache.retrieve(hit, other.view(slots[:covered]))
    assert report.tokens == covered - 1
    assert same(engine.read(slots[: covered - 1]), other.read(slots[: covered - 1]))


@pytest.mark.asyncio
async def test_half_of_the_heads_is_no_hit(tmp_path: Path) -> None:
    prompt = tokens(32)
    engine = Engine(_rank(2, 0), 32)
    async with Cache.open(config(tmp_path), _rank(2, 0)) as cache:
        await cache.store(prompt, engine.view(engine.slots(32)))
    async with Cache.open(config(tmp_path), _rank(1, 0)) as cache:
        await cache.recovered()
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 0


@pytest.mark.asyncio
async def test_a_hybrid_model_loads_its_window_and_its_state(tmp_path: Path) -> None:
    full = KVGroup(AttentionKind.MHA, (0, 3), "bfloat16", 2, 8)
    window = KVGroup(
        AttentionKind.MHA, (1, 4), "bfloat16", 2, 8, hit_rule=HitRule.TRAILING, window_tokens=20
    )
    state = KVGroup(
        AttentionKind.STATE,
        (2,),
        "float32",
        hit_rule=HitRule.TRAILING,
        window_tokens=1,
        state_nbytes=64,
    )
    layout = KVLayout(
        (
            GroupLayout(full, NHD, 4),
            GroupLayout(window, FUSED_HND, 4),
            GroupLayout(state, STATE_BLOCKS, 4),
        )
    )
    settings_ = CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        tiers=(
            TierConfig(url="cpu://?capacity=1MiB"),
            TierConfig(url=f"file://{tmp_path}", write="through"),
        ),
        tokens_per_chunk=16,
    )
    engine, other = Engine(layout, 32, 1), Engine(layout, 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    gone = slots.clone()
    gone[:32] = -1  # the window has moved on: the engine no longer holds these
    view = KVView(engine.caches, [slots, gone, slots])
    before = [layer.clone() for layer in other.caches[1]]
    async with Cache.open(settings_, layout) as cache:
        assert (await cache.store(prompt, view)).stored == 4
    async with Cache.open(settings_, layout) as cache, cache.lookup(prompt) as hit:
        assert hit.tokens == 64
        report = await cache.retrieve(hit, KVView(other.caches, [slots, slots, slots]))
        assert report.tokens == 64
    theirs, mine = engine.read(slots), other.read(slots)
    assert same(theirs[:4], mine[:4])  # full attention: every token
    assert same([p[32:] for p in theirs[4:8]], [p[32:] for p in mine[4:8]])  # the window's chunks
    outside = slots[:32]
    untouched = Engine(layout, 32, 2)
    untouched.caches[1] = before
    assert same(untouched.read(outside)[4:8], other.read(outside)[4:8])
    last = slots[-1] // 4  # the block of the last token holds the state after it
    after, loaded = (e.caches[2][0].view(torch.int32)[last] for e in (engine, other))
    assert torch.equal(after, loaded)


@pytest.mark.asyncio
async def test_a_hybrid_prefix_without_its_window_is_no_hit(tmp_path: Path) -> None:
    full = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 2, 8)
    window = KVGroup(
        AttentionKind.MHA, (1,), "bfloat16", 2, 8, hit_rule=HitRule.TRAILING, window_tokens=16
    )
    layout = KVLayout((GroupLayout(full, NHD, 4), GroupLayout(window, NHD, 4)))
    engine = Engine(layout, 32, 1)
    prompt, slots = tokens(64), engine.slots(64)
    gone = slots.clone()
    gone[:48] = -1
    async with Cache.open(config(tmp_path), layout) as cache:
        await cache.store(prompt, KVView(engine.caches, [slots, gone]))
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 64
        async with cache.lookup(prompt[:48]) as hit:
            assert hit.tokens == 0  # the window before token 48 was never there to store


@pytest.mark.asyncio
async def test_a_native_rank_passes_over_canonical_payloads_and_the_other_way(
    tmp_path: Path,
) -> None:
    native = KVLayout.single(HEADS, NHD, tokens_per_block=2, form="native:nhd-b2")
    canonical = KVLayout.single(HEADS, NHD, tokens_per_block=2)
    engine = Engine(canonical, 32, 1)
    slots = engine.slots(32)
    for seed, (writer, reader) in enumerate([(canonical, native), (native, canonical)]):
        async with Cache.open(config(tmp_path), writer) as cache:
            await cache.store(tokens(32, seed), engine.view(slots))
        async with Cache.open(config(tmp_path), reader) as cache:
            await cache.recovered()
            async with cache.lookup(tokens(32, seed)) as hit:
                assert hit.tokens == 0
            assert (await cache.store(tokens(32, seed), engine.view(slots))).stored == 2
            async with cache.lookup(tokens(32, seed)) as hit:
                assert (await cache.retrieve(hit, engine.view(slots))).tokens == 32
