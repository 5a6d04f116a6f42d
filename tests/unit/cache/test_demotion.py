"""A tier with ``write = "demote"``: written when objects leave host memory, and not before."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from caches import WEIGHTS, config, layout, stored_files, tokens
from engine import Engine, same
from hang import HANG
from stacks import MemoryBackend

from kvlayer import Cache, CacheConfig, Cause, ModelConfig, Scope, TierConfig
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import ArgumentError, BackendError
from kvlayer.results import OwnerStats

PAGE = 4096  # one chunk of 16 tokens, or one tail


def demoting(directory: Path, **more: Any) -> CacheConfig:
    """Twenty objects in host memory; twelve are too many, ten are not."""
    settings = {"high_watermark": 0.6, "low_watermark": 0.5, "host": "80KiB", **more}
    return config(directory, write="demote", **settings)


@pytest.mark.asyncio
async def test_a_store_writes_nothing_and_a_clean_close_writes_everything(tmp_path: Path) -> None:
    engine, other = Engine(layout(), 64, 1), Engine(layout(), 64, 2)
    prompt, slots = tokens(56), engine.slots(56)
    async with Cache.open(demoting(tmp_path), layout()) as cache:
        report = await cache.store(prompt, engine.view(slots))
        assert (report.stored, report.failed) == (4, ())
        await cache.flush()
        assert stored_files(tmp_path) == []
    assert len(stored_files(tmp_path)) == 4
    async with Cache.open(demoting(tmp_path), layout()) as cache:
        async with cache.lookup(prompt) as hit:
            assert hit.by_tier == {"cpu": 0, "file": 56}
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 56
    assert same(engine.read(slots), other.read(slots))
    assert len(stored_files(tmp_path)) == 4


@pytest.mark.asyncio
async def test_an_exception_writes_nothing_more(tmp_path: Path) -> None:
    engine = Engine(layout(), 64, 1)

    async def fail() -> None:
        async with Cache.open(demoting(tmp_path), layout()) as cache:
            await cache.store(tokens(48), engine.view(engine.slots(48)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert stored_files(tmp_path) == []


@pytest.mark.parametrize("policy", ["prefix-lru", "lru", "arc"])
@pytest.mark.asyncio
async def test_what_was_demoted_is_found_bit_identical_and_again_after_a_restart(
    tmp_path: Path, policy: str
) -> None:
    engine, other = Engine(layout(), 64, 1), Engine(layout(), 64, 2)
    slots = {seed: engine.slots(40, seed=seed) for seed in range(12)}
    seen: dict[int, Any] = {}

    async def load(cache: Cache, seed: int) -> dict[str, int]:
        async with cache.lookup(tokens(40, seed)) as hit:
            assert (await cache.retrieve(hit, other.view(slots[seed]))).tokens == 40
            assert same(seen[seed], other.read(slots[seed]))
            return dict(hit.by_tier)

    settings = demoting(tmp_path, policy=policy)
    async with Cache.open(settings, layout()) as cache:
        for seed in range(12):
            await cache.store(tokens(40, seed), engine.view(slots[seed]))
            seen[seed] = engine.read(slots[seed])
            await cache.flush()  # what is on its way down is there now
            host = cache.control.stats().tiers[0]
            assert host.used_nbytes <= 12 * PAGE
            assert host.pinned_nbytes == 0
        host, disk = cache.control.stats().tiers
        assert host.evicted == 0
        assert host.demoted == disk.stored == len(stored_files(tmp_path)) > 20
        places = [await load(cache, seed) for seed in range(12)]
        assert sum(place["file"] > 0 for place in places) >= 6
        explained = await cache.control.explain(tokens(40, 0))
        assert explained.hit_tokens == 40
        assert explained.misses == ()
    async with Cache.open(settings, layout()) as cache:
        for seed in range(12):
            await load(cache, seed)
        await cache.flush()


@asynccontextmanager
async def _open(backend: MemoryBackend, **more: Any) -> AsyncIterator[Cache]:
    """A cache whose lower tier is ``backend``."""

    class Lent(MemoryBackend):
        scheme = "memory"

        def __new__(cls) -> MemoryBackend:  # type: ignore[misc]
            return backend

    settings = CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        tiers=(
            TierConfig(url="cpu://?capacity=80KiB"),
            TierConfig(
                url="memory://",
                write="demote",
                deadline_seconds=more.pop("deadline", 30.0),
                max_inflight=4,
                pause_seconds=0.001,
            ),
        ),
        tokens_per_chunk=16,
        high_watermark=0.6,
        low_watermark=0.5,
        **more,
    )
    backends = BACKENDS.extended({"memory": Lent})
    async with Cache.open(settings, layout(), backends=backends) as cache:
        yield cache


@pytest.mark.asyncio
async def test_a_dead_tier_loses_nothing_that_fits_and_blocks_no_store() -> None:
    engine, backend = Engine(layout(), 64, 1), MemoryBackend()
    backend.fails = BackendError("dead")
    slots = engine.slots(16)
    async with _open(backend) as cache:
        for seed in range(20):
            report = await cache.store(tokens(16, seed), engine.view(slots))
            assert (report.stored, report.dropped, report.failed) == (1, 0, ())
        await cache.flush()
        assert cache.control.stats().tiers[0].objects == 20
        for seed in range(20):
            async with cache.lookup(tokens(16, seed)) as hit:
                assert hit.tokens == 16
        assert not cache.control.health().ok
        assert cache.control.stats().tiers[1].misses[Cause.TIER_DOWN] > 0
        await cache.store(tokens(16, 20), engine.view(slots))
        explained = await cache.control.explain(tokens(16, 0))
        assert [missed.cause for missed in explained.misses] == [Cause.EVICTED]
        backend.fails = None  # it comes back without a restart
        async with asyncio.timeout(HANG):
            for seed in itertools.count(21):
                await cache.store(tokens(16, seed), engine.view(slots))
                await cache.flush()
                if cache.control.health().ok and cache.control.stats().tiers[0].objects == 10:
                    break


@pytest.mark.asyncio
async def test_a_tier_that_hangs_blocks_neither_stores_nor_the_close() -> None:
    engine, backend = Engine(layout(), 64, 1), MemoryBackend()
    backend.gate = asyncio.Event()
    slots = engine.slots(16)
    held: list[int] = []
    async with _open(backend, deadline=0.01, close_seconds=0.05) as cache:
        for seed in range(60):
            report = await cache.store(tokens(16, seed), engine.view(slots))
            assert (report.stored, report.dropped) == (1, 0)
            held.append(cache.control.stats().tiers[0].pinned_nbytes)
            await asyncio.sleep(0)
        assert 0 < max(held) <= 10 * PAGE  # lent until the tier lets go
        await cache.flush()
        assert cache.control.stats().tiers[0].pinned_nbytes <= 10 * PAGE
    assert backend.objects == {}


async def _cancel_after(work: Coroutine[Any, Any, Any], steps: int) -> None:
    task = asyncio.ensure_future(work)
    for _ in range(steps):
        await asyncio.sleep(0)
        if task.done():
            break
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result()


@pytest.mark.parametrize("policy", ["prefix-lru", "arc"])
@pytest.mark.asyncio
async def test_random_operations_with_cancellations_keep_accounts_exact(
    tmp_path: Path, policy: str
) -> None:
    rng = random.Random(policy)
    engine, other = Engine(layout(), 64, 1), Engine(layout(), 64, 2)
    truth = {seed: engine.slots(48, seed=seed) for seed in range(8)}
    kept = {seed: engine.read(slots) for seed, slots in truth.items()}

    async def load(cache: Cache, seed: int, length: int) -> None:
        async with cache.lookup(tokens(48, seed)[:length]) as hit:
            slots = truth[seed][: hit.tokens]
            report = await cache.retrieve(hit, other.view(slots))
            assert report.tokens <= hit.tokens
            expected = engine.read(slots[: report.tokens])
            assert same(expected, other.read(slots[: report.tokens]))

    # Room for ten objects of a page each on the host and sixteen on disk: all moves all the time.
    settings = demoting(tmp_path, host="40KiB", file_options="&capacity=128KiB", policy=policy)
    async with Cache.open(settings, layout()) as cache:
        for turn in range(2000):
            # How much is demoted in so many turns depends on the disk.
            if turn >= 200 and cache.control.stats().tiers[0].demoted > 10:
                break
            seed, length = rng.randrange(8), rng.randrange(1, 49)
            work: Coroutine[Any, Any, Any]
            choice = rng.random()
            if choice < 0.5:
                view = engine.view(truth[seed][:length])
                work = cache.store(tokens(48, seed)[:length], view)
            elif choice < 0.9:
                work = load(cache, seed, length)
            elif choice < 0.95:
                work = cache.flush()
            else:
                work = cache.control.evict(tokens(48, seed), tier=rng.choice(["cpu", "file", None]))
            await _cancel_after(work, rng.choice([2, 5, 10, 20, 1000]))
            if turn % 20 == 19:
                await cache.flush()
                while cache.control.stats().inflight:  # noqa: ASYNC110  # loads that were left
                    await asyncio.sleep(0)
                stats = cache.control.stats()
                assert (stats.tiers[0].pinned_nbytes, stats.leases) == (0, 0)
                assert stats.tiers[0].used_nbytes == stats.tiers[0].objects * PAGE
        assert cache.control.stats().tiers[0].demoted > 10
        await cache.control.clear()
        assert cache.control.stats().tiers[0].used_nbytes == 0
    assert stored_files(tmp_path) == []
    assert all(same(kept[seed], engine.read(truth[seed])) for seed in truth)


@pytest.mark.asyncio
async def test_stats_say_who_holds_host_memory() -> None:
    engine = Engine(layout(), 64, 1)
    prompt, slots = tokens(48), engine.slots(48)
    async with Cache.open(config(), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        assert cache.control.stats().owners == {}
        pin = await cache.control.pin(prompt[:32], seconds=60.0, owner="warm-up")
        async with cache.lookup(prompt, scope=Scope(owner="request 1")):
            assert cache.control.stats().owners == {
                "warm-up": OwnerStats(1, 2 * PAGE),
                "request 1": OwnerStats(1, 3 * PAGE),
            }
        cache.control.unpin(pin)
        assert cache.control.stats().owners == {}
        with pytest.raises(ArgumentError, match="a lease must be a finite number"):
            await cache.control.pin(prompt, seconds=float("inf"))
        assert cache.control.stats().tiers[0].pinned_nbytes == 0
