"""Closing a cache gives everything back, whatever is cancelled or still runs meanwhile."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from caches import config, layout, tokens
from descriptors import descriptors
from engine import Engine
from hang import HANG

from kvlayer import Cache, Scope


@pytest.mark.asyncio
async def test_a_close_that_is_cancelled_at_any_await_still_closes_everything(
    tmp_path: Path,
) -> None:
    engine = Engine(layout(), 32)
    view = engine.view(engine.slots(48))
    fds, threads = descriptors(), set(threading.enumerate())
    cut = 0

    async def use(directory: Path, leaving: asyncio.Event) -> None:
        async with Cache.open(config(directory, write="back"), layout()) as cache:
            await cache.store(tokens(48), view)
            job = cache.prefetch(tokens(48))
            await asyncio.sleep(0)
            leaving.set()
        await job

    for steps in range(16):
        leaving = asyncio.Event()
        task = asyncio.ensure_future(use(tmp_path / str(steps), leaving))
        await leaving.wait()
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        cut += task.cancelled()
        assert set(threading.enumerate()) <= threads
        assert descriptors() == fds
    assert cut > 3


@pytest.mark.asyncio
async def test_a_cancelled_close_does_not_wait_for_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = asyncio.Event()

    async def use() -> None:
        async with Cache.open(config(tmp_path, close_seconds=600.0), layout()) as cache:
            cache.stack.lower[0].guard.start(asyncio.Event().wait)
            monkeypatch.setattr(cache.stack.spills, "flush", asyncio.Event().wait)
            leaving.set()

    task = asyncio.ensure_future(use())
    await leaving.wait()
    await asyncio.sleep(0)
    task.cancel()
    async with asyncio.timeout(HANG):
        await asyncio.wait({task})
    assert task.cancelled()


@pytest.mark.parametrize("turns", range(1, 9))
@pytest.mark.asyncio
async def test_what_is_in_flight_when_a_cache_closes_ends_with_failures(
    tmp_path: Path, turns: int
) -> None:
    """Wherever it is: planning a long prompt, gathering it, writing it down, loading it."""
    engine = Engine(layout(), 256)
    prompt, slots = tokens(16 * 48), engine.slots(16 * 48)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt[: 16 * 40], engine.view(slots[: 16 * 40]))
        await cache.control.evict(prompt, tier="cpu")
        hit = await cache.lookups.find(prompt, Scope())
        loading = asyncio.create_task(cache.retrieve(hit, engine.view(slots)))
        storing = asyncio.create_task(cache.store(prompt, engine.view(slots)))
        for _ in range(turns):
            await asyncio.sleep(0)
    loaded, stored = await asyncio.gather(loading, storing)
    assert loaded.tokens <= 16 * 40
    assert loaded.tokens == 16 * 40 or loaded.failed
    assert stored.stored + stored.skipped + stored.dropped + len(stored.failed) >= 48
