"""Which objects a tier holds can be told from events alone, in the order in which they come."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from caches import config, layout, tokens
from engine import Engine

from kvlayer import Cache
from kvlayer.events import (
    Event,
    ObjectQuarantined,
    ObjectsEvicted,
    ObjectsRemoved,
    ObjectsStored,
    TransferDone,
)
from kvlayer.identity.keys import ObjectKey
from kvlayer.tier.planner.records import HostState


class Told:
    """A sink that keeps what each tier holds by what it was told, and believes nothing twice."""

    def __init__(self) -> None:
        self.held: dict[str, set[ObjectKey]] = defaultdict(set)

    def __call__(self, event: Event) -> None:
        match event:
            case ObjectsStored(tier=tier, keys=keys):
                assert not self.held[tier] & set(keys)
                self.held[tier] |= set(keys)
            case ObjectsEvicted(tier=tier, keys=keys) | ObjectsRemoved(tier=tier, keys=keys):
                assert self.held[tier] >= set(keys)
                self.held[tier] -= set(keys)
            case TransferDone(cause=None, direction=direction, tier=tier, key=key):
                self.held["cpu" if direction == "load" else tier].add(key)
            case ObjectQuarantined(tier=tier, key=key):
                self.held[tier].discard(key)
            case _:
                pass


def _there(cache: Cache) -> dict[str, set[ObjectKey]]:
    records = list(cache.stack.planner.directory.objects())
    held = {"cpu": {r.key for r in records if r.host is HostState.READY}}
    held |= {t.name: {r.key for r in records if r.tiers >> t.index & 1} for t in cache.stack.lower}
    return held


async def _store(cache: Cache, seed: int, length: int = 32) -> None:
    engine = Engine(layout(), 128)
    await cache.store(tokens(length, seed), engine.view(engine.slots(length)))


@pytest.mark.asyncio
async def test_what_was_told_is_what_is_there(tmp_path: Path) -> None:
    """Host memory of four objects above a disk: most stores evict, and several run at once."""
    told = Told()
    tiered = config(tmp_path, host="16KiB")
    async with Cache.open(tiered, layout(), sinks=[told]) as cache:
        for round_ in range(6):
            await asyncio.gather(*(_store(cache, round_ + seed) for seed in range(3)))
            await cache.flush()
            assert {**told.held} == _there(cache)
        async with cache.lookup(tokens(32, 0)) as hit:
            assert (await cache.promote(hit)).tokens == 32
        assert {**told.held} == _there(cache)
        assert await cache.control.evict(tokens(32, 7), tier="file")
        assert {**told.held} == _there(cache) and told.held["file"]
        await cache.control.clear()
        assert {**told.held} == _there(cache) == {"cpu": set(), "file": set()}


@pytest.mark.parametrize("oldest", [2, 20])  # chunks; a plan is made in slices of 16
@pytest.mark.asyncio
async def test_what_had_to_go_is_told_before_it_can_come_back(
    oldest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One store gathers into the room it was given; another stores what was there before."""
    told = Told()
    room = config(host=f"{4 * (oldest + 4)}KiB")  # a page for each chunk
    async with Cache.open(room, layout(), sinks=[told]) as cache:
        await _store(cache, 1, 16 * oldest)
        await _store(cache, 0)
        await _store(cache, 3)
        gather, begun, go_on = cache.stack.device.gather, asyncio.Event(), asyncio.Event()

        async def late(*args: Any) -> Any:
            if not begun.is_set():
                begun.set()
                await go_on.wait()
            return await gather(*args)

        monkeypatch.setattr(cache.stack.device, "gather", late)
        first = asyncio.create_task(_store(cache, 2, 16 * (oldest + 1)))
        await begun.wait()
        assert len(_there(cache)["cpu"]) == 3  # the last of the prompt 0 had to go
        await _store(cache, 0)
        go_on.set()
        await first
        assert {**told.held} == _there(cache) and len(told.held["cpu"]) == oldest + 4
