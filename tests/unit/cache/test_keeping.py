"""How long to keep: what a request wishes reaches every tier that chooses what goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import time

import pytest
import torch
from caches import config, layout, tokens

from kvlayer import Cache, KVView, Retention, Scope, TierConfig
from kvlayer.abc.backend import Write, WriteResult
from kvlayer.config.registry import BACKENDS
from kvlayer_backends.cpu import CpuBackend

KEPT = Retention(priority=2)


async def store(cache: Cache, seed: int, retention: Retention, *, count: int = 32) -> None:
    view = KVView.single([torch.zeros(2, 16, 4, 2, 8, dtype=torch.bfloat16)] * 3, range(count))
    await cache.store(tokens(count, seed), view, scope=Scope(retention=retention))


async def found(cache: Cache, seed: int, *, count: int = 32) -> int:
    async with cache.lookup(tokens(count, seed)) as hit:
        return hit.tokens


@pytest.mark.asyncio
async def test_host_memory_keeps_what_a_request_wished_to_be_kept() -> None:
    async with Cache.open(config(host="16KiB"), layout()) as cache:  # four chunks
        await store(cache, 0, KEPT)
        for seed in range(1, 5):
            await store(cache, seed, Retention())
        assert [await found(cache, seed) for seed in range(5)] == [32, 0, 0, 0, 32]


@pytest.mark.asyncio
async def test_a_later_request_can_wish_more_of_what_is_there() -> None:
    async with Cache.open(config(host="16KiB"), layout()) as cache:
        await store(cache, 0, Retention())
        await store(cache, 0, Retention(keep_until=time() + 3600))
        for seed in range(1, 5):
            await store(cache, seed, Retention())
        assert await found(cache, 0) == 32


@pytest.mark.asyncio
async def test_a_directory_keeps_what_a_request_wished_to_be_kept(tmp_path: Path) -> None:
    settings = config(tmp_path, file_options="&capacity=32KiB")  # four chunks with their headers
    async with Cache.open(settings, layout()) as cache:
        await store(cache, 0, KEPT)
        for seed in range(1, 5):
            await store(cache, seed, Retention())
        for seed in range(5):
            await cache.control.evict(tokens(32, seed), tier="cpu")
        assert [await found(cache, seed) for seed in range(5)] == [32, 0, 0, 0, 32]


@pytest.mark.asyncio
@pytest.mark.parametrize("write", ["through", "back", "demote"])
async def test_a_write_says_what_was_wished_and_where_the_object_stands(write: str) -> None:
    seen: list[Write] = []

    class Watched(CpuBackend):
        async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
            seen.extend(writes)
            return await super().put(writes)

    below = TierConfig(url="watched://?capacity=1MiB", write=write)  # type: ignore[arg-type]
    settings = config()
    settings = replace(settings, tiers=(*settings.tiers, below))
    backends = BACKENDS.extended({"watched": Watched})
    async with Cache.open(settings, layout(), backends=backends) as cache:
        await store(cache, 0, KEPT)
        await cache.flush()
    told = {(write.first_token, write.tokens, write.retention) for write in seen}
    assert told == {(0, 16, KEPT), (16, 16, KEPT)}


@pytest.mark.asyncio
async def test_what_the_directory_had_to_forget_is_counted_and_asked_for() -> None:
    class Private(CpuBackend):
        """Nobody else writes here: what the directory knows is all there is, as long as it can."""

    below = TierConfig(url="private://?capacity=1MiB", write="through")
    settings = config()
    settings = replace(settings, tiers=(*settings.tiers, below))
    backends = BACKENDS.extended({"private": Private})
    async with Cache.open(settings, layout(), backends=backends) as cache:
        directory = cache.stack.planner.directory
        directory._most_below = 2
        for seed in range(3):
            await store(cache, seed, Retention())
            await cache.control.evict(tokens(32, seed), tier="cpu")
        assert cache.control.stats().forgotten == 4
        assert [await found(cache, seed) for seed in range(3)] == [32, 32, 32]
