"""Cancelling at any await leaves nothing held: no slot, no pin, no call, no wrong byte."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine, same

from kvlayer import Cache


async def _cancel_after(work: Coroutine[Any, Any, Any], steps: int) -> bool:
    """Run ``work`` for some turns of the loop, then cancel it; whether it was cut off."""
    task = asyncio.ensure_future(work)
    for _ in range(steps):
        await asyncio.sleep(0)
        if task.done():
            break
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False


def _held(cache: Cache) -> tuple[int, int]:
    stats = cache.control.stats()
    return stats.tiers[0].pinned_nbytes, stats.leases


@pytest.mark.asyncio
async def test_a_store_cancelled_at_any_await_leaves_objects_whole_or_absent(
    tmp_path: Path,
) -> None:
    engine, other = Engine(layout(), 64, 1), Engine(layout(), 64, 2)
    cut = 0
    async with Cache.open(config(tmp_path), layout()) as cache:
        for steps in range(40):
            prompt, slots = tokens(40, steps), engine.slots(40, seed=steps)
            cut += await _cancel_after(cache.store(prompt, engine.view(slots)), steps)
            await cache.flush()
            assert _held(cache) == (0, 0)
            async with cache.lookup(prompt) as hit:
                report = await cache.retrieve(hit, other.view(slots))
            assert report.tokens == hit.tokens
            assert same(engine.read(slots[: hit.tokens]), other.read(slots[: hit.tokens]))
            again = await cache.store(prompt, engine.view(slots))
            assert again.stored + again.skipped == 3
            async with cache.lookup(prompt) as hit:
                assert hit.tokens == 40
    assert cut > 3
    assert len(stored_files(tmp_path)) == 40 * 3
    assert list((tmp_path / "v2" / "tmp").iterdir()) == []


@pytest.mark.asyncio
async def test_a_load_cancelled_at_any_await_holds_nothing(tmp_path: Path) -> None:
    engine, other = Engine(layout(), 64, 1), Engine(layout(), 64, 2)
    prompt, slots = tokens(64), engine.slots(64)

    async def load(cache: Cache) -> int:
        async with cache.lookup(prompt) as hit:
            return (await cache.retrieve(hit, other.view(slots))).tokens

    cut = 0
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        for steps in range(60):
            await cache.control.evict(prompt, tier="cpu")
            cut += await _cancel_after(load(cache), steps)
            assert cache.control.stats().leases == 0
        assert await load(cache) == 64
        assert same(engine.read(slots), other.read(slots))
    assert cut > 10


@pytest.mark.asyncio
async def test_many_requests_for_one_prompt_are_one_transfer(tmp_path: Path) -> None:
    engine = Engine(layout(), 64, 1)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        await cache.control.evict(prompt, tier="cpu")
        others = [Engine(layout(), 64, seed) for seed in range(2, 10)]

        async def load(other: Engine) -> int:
            async with cache.lookup(prompt) as hit:
                return (await cache.retrieve(hit, other.view(slots))).tokens

        assert await asyncio.gather(*(load(other) for other in others)) == [64] * 8
        assert cache.control.stats().tiers[1].hits == 4
    for other in others:
        assert same(engine.read(slots), other.read(slots))


@pytest.mark.asyncio
async def test_one_cancelled_request_does_not_take_the_others_transfer(tmp_path: Path) -> None:
    engine = Engine(layout(), 64, 1)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        for steps in range(1, 30):
            await cache.control.evict(prompt, tier="cpu")
            left, right = Engine(layout(), 64, 2), Engine(layout(), 64, 3)

            async def load(other: Engine) -> int:
                async with cache.lookup(prompt) as hit:
                    return (await cache.retrieve(hit, other.view(slots))).tokens

            survivor = asyncio.ensure_future(load(right))
            await _cancel_after(load(left), steps)
            assert await survivor == 64
            assert same(engine.read(slots), right.read(slots))


@pytest.mark.asyncio
async def test_random_operations_leave_capacity_exact(tmp_path: Path) -> None:
    rng = random.Random(0)
    engine, other = Engine(layout(), 64, 1), Engine(layout(), 64, 2)
    truth = {seed: engine.slots(48, seed=seed) for seed in range(6)}

    async def load(cache: Cache, seed: int, length: int) -> None:
        async with cache.lookup(tokens(48, seed)[:length]) as hit:
            report = await cache.retrieve(hit, other.view(truth[seed][:length]))
            assert report.tokens <= hit.tokens

    # Room for seven objects of a page each on the host and nine on disk: all is evicted often.
    settings = config(tmp_path, host="28KiB", file_options="&capacity=72KiB")
    async with Cache.open(settings, layout()) as cache:
        for _ in range(300):
            seed, length = rng.randrange(6), rng.randrange(1, 49)
            work: Coroutine[Any, Any, Any]
            choice = rng.random()
            if choice < 0.5:
                view = engine.view(truth[seed][:length])
                work = cache.store(tokens(48, seed)[:length], view)
            elif choice < 0.9:
                work = load(cache, seed, length)
            else:
                work = cache.control.evict(tokens(48, seed), tier=rng.choice(["cpu", "file", None]))
            await _cancel_after(work, rng.choice([2, 5, 10, 20, 1000]))
        await cache.flush()
        stats = cache.control.stats()
        assert (stats.tiers[0].pinned_nbytes, stats.leases) == (0, 0)
        assert stats.tiers[0].used_nbytes == stats.tiers[0].objects * 4096
        await cache.control.clear()
        assert cache.control.stats().tiers[0].used_nbytes == 0
    assert stored_files(tmp_path) == []


@pytest.mark.asyncio
async def test_prefetch_brings_a_prefix_up_and_can_be_cancelled(tmp_path: Path) -> None:
    engine = Engine(layout(), 64, 1)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        await cache.control.evict(prompt, tier="cpu")
        job = cache.prefetch(prompt, deadline=60)
        assert not job.done()
        assert (await job).tokens == 64
        async with cache.lookup(prompt) as hit:
            assert hit.by_tier == {"cpu": 64, "file": 0}
        assert cache.control.stats().leases == 1  # held to the deadline
        job = cache.prefetch(tokens(64, 1))
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert cache.control.stats().leases == 1
