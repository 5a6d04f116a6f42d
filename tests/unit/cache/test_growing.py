"""Prompts that grow: tails, first_token, and what the engine already holds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from caches import config, layout, tokens
from engine import Engine, same

from kvlayer import Cache, KVView, Scope
from kvlayer.errors import LayoutError


@pytest.mark.asyncio
async def test_a_prompts_last_partial_chunk_is_found_in_multiples_of_a_tail() -> None:
    engine = Engine(layout(), 32)
    prompt = tokens(16 + 11)  # chunks of 16, tails of 2
    async with Cache.open(config(), layout()) as cache:
        report = await cache.store(prompt, engine.view(engine.slots(27)))
        assert report.stored == 2
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 26
        async with cache.lookup(tokens(16 + 11)[:20]) as hit:
            assert hit.tokens == 16  # the stored tail is longer than what is asked for


@pytest.mark.asyncio
async def test_a_longer_prompt_finds_the_longest_tail_of_a_shorter_one() -> None:
    engine = Engine(layout(), 32)
    prompt = tokens(64)
    slots = engine.slots(64)
    async with Cache.open(config(), layout()) as cache:
        for length in (20, 24, 28):
            await cache.store(prompt[:length], engine.view(slots[:length]))
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 28


@pytest.mark.asyncio
async def test_tail_false_stores_whole_chunks_only() -> None:
    engine = Engine(layout(), 32)
    async with Cache.open(config(), layout()) as cache:
        report = await cache.store(tokens(30), engine.view(engine.slots(30)), tail=False)
        assert report.stored == 1
        async with cache.lookup(tokens(30)) as hit:
            assert hit.tokens == 16


@pytest.mark.asyncio
async def test_a_growing_conversation_need_not_hold_what_is_stored() -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(), layout()) as cache:
        await cache.store(prompt[:32], engine.view(slots[:32]), tail=False)
        report = await cache.store(prompt, engine.view(slots[32:]), first_token=32)
        assert (report.stored, report.skipped) == (2, 0)
        async with cache.lookup(prompt) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 64
    assert same(engine.read(slots), other.read(slots))


@pytest.mark.asyncio
async def test_a_chunk_that_starts_before_the_view_is_left_alone() -> None:
    engine = Engine(layout(), 32)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(), layout()) as cache:
        report = await cache.store(prompt, engine.view(slots[20:]), first_token=20)
        assert report.stored == 2  # 32..48 and 48..64
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 0


@pytest.mark.parametrize("held", [1, 15, 16, 21, 40, 63])
@pytest.mark.asyncio
async def test_what_the_engine_holds_already_is_not_written(tmp_path: Path, held: int) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    before = other.read(slots[:held])
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        await cache.control.evict(prompt, tier="cpu")
        async with cache.lookup(prompt) as hit:
            report = await cache.retrieve(hit, other.view(slots[held:]), first_token=held)
    assert report.tokens == 64
    assert same(engine.read(slots[held:]), other.read(slots[held:]))
    assert same(before, other.read(slots[:held]))


@pytest.mark.parametrize("room", [1, 16, 17, 30, 64])
@pytest.mark.asyncio
async def test_a_view_shorter_than_the_hit_gets_what_fits(tmp_path: Path, room: int) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    rest = other.read(slots[room:])
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        async with cache.lookup(prompt) as hit:
            report = await cache.retrieve(hit, other.view(slots[:room]))
    assert report.tokens == room
    assert same(engine.read(slots[:room]), other.read(slots[:room]))
    assert same(rest, other.read(slots[room:]))


@pytest.mark.asyncio
async def test_a_superseded_tail_goes_before_anything_older() -> None:
    engine = Engine(layout(), 64)
    prompt, slots = tokens(32), engine.slots(32)
    # 16 tokens x 3 layers x 2 heads x 8 x 2 (K, V) x 2 bytes = 3 KiB: a page per object.
    async with Cache.open(config(host="16KiB"), layout()) as cache:
        await cache.store(tokens(16, seed=1), engine.view(slots[:16]))  # the oldest
        await cache.store(prompt[:8], engine.view(slots[:8]))  # a tail
        await cache.store(prompt, engine.view(slots))  # two chunks that contain it
        await cache.store(tokens(16, seed=2), engine.view(slots[:16]))  # one object must go
        async with cache.lookup(tokens(16, seed=1)) as hit:
            assert hit.tokens == 16
        async with cache.lookup(prompt[:8]) as hit:
            assert hit.tokens == 0


@pytest.mark.asyncio
async def test_what_is_used_in_host_memory_stays_on_disk_too(tmp_path: Path) -> None:
    engine = Engine(layout(), 64)
    slots = engine.slots(32)
    # 8 KiB per object, header included: the disk has room for four.
    settings = config(tmp_path, file_options="&capacity=32KiB")
    async with Cache.open(settings, layout()) as cache:
        for seed in (1, 2):
            await cache.store(tokens(32, seed), engine.view(slots))
        async with cache.lookup(tokens(32, 1)) as hit:
            await cache.retrieve(hit, engine.view(slots))
        # The disk is told without anyone waiting for it, so there is no event to wait for.
        while cache.control.stats().inflight:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await cache.store(tokens(32, 3), engine.view(slots))
        await cache.control.clear("cpu")
        for seed, kept in ((1, 32), (2, 0), (3, 32)):
            async with cache.lookup(tokens(32, seed)) as hit:
                assert hit.tokens == kept


@pytest.mark.asyncio
async def test_a_view_that_covers_more_than_the_tokens_is_refused() -> None:
    engine = Engine(layout(), 32)
    async with Cache.open(config(), layout()) as cache:
        with pytest.raises(LayoutError, match=r"covers tokens 0\.\.20, but there are only 16"):
            await cache.store(tokens(16), engine.view(engine.slots(20)))
        with pytest.raises(LayoutError, match="first_token"):
            await cache.store(tokens(16), engine.view(engine.slots(16)), first_token=-1)


@pytest.mark.parametrize("is_named", [False, True], ids=["tokens", "chain"])
@pytest.mark.parametrize(("first", "stop"), [(0, 40), (16, 40), (0, 16), (32, 64)])
@pytest.mark.asyncio
async def test_what_a_view_does_not_cover_is_not_stored(
    first: int, stop: int, is_named: bool
) -> None:
    """The prompt is longer than the view: its other tokens have no KV here, and get none."""
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(), layout()) as cache:
        asked = cache.chain(prompt, Scope()) if is_named else prompt
        await cache.store(prompt[:first], engine.view(slots[:first]))
        report = await cache.store(asked, engine.view(slots[first:stop]), first_token=first)
        assert report.failed == ()
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == stop
            assert (await cache.retrieve(hit, other.view(slots[:stop]))).tokens == stop
        assert same(engine.read(slots[:stop]), other.read(slots[:stop]))


@pytest.mark.asyncio
async def test_an_empty_prompt_is_no_hit_and_no_error() -> None:
    engine = Engine(layout(), 32)
    async with Cache.open(config(), layout()) as cache:
        assert (await cache.store([], engine.view(engine.slots(0)))).stored == 0
        async with cache.lookup([]) as hit:
            assert hit.tokens == 0
            assert (await cache.retrieve(hit, KVView(engine.caches, [range(0)]))).tokens == 0
