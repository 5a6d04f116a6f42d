"""Full memory: loads hold every slot and all scratch while demotion, stores and prefetches go on.

The tiers are well and answer in time, so whatever is late waits for something that waits for it.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from unittest import mock

from clients import Client
from processes import CHUNK, Below, Process, opened
from settling import settle
from world import LONGEST, PAGE, Scenario, World

import kvlayer_backends.cpu
from kvlayer.abc.backend import Backend, Read, ReadResult
from kvlayer.memory.slab import Slab
from kvlayer.results import Cause
from kvlayer.testing import invariants
from kvlayer.testing.faults import Injected, Slow, Wrapper
from kvlayer.testing.memory import MemoryBackend
from kvlayer.tier.guard.guard import Lane

__all__ = ["LIARS", "play", "playing"]

DEADLINE = 10.0
SOON = 0.05
"""Seconds that a call takes at most."""
IN_TURN = 8 * (LONGEST // CHUNK + 1) * DEADLINE
SCRATCH = 8 * PAGE
"""For both directions: two objects may be read at once, and two written."""

Maker = Callable[[Backend, Random, list[Injected]], Backend]


class TooFar(Wrapper):
    """Writes one byte behind what a read was lent."""

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        results = await self.inner.get(reads)
        for read in reads if self.is_ill else ():
            last = read.regions[-1]
            start = ctypes.addressof(ctypes.c_char.from_buffer(last))
            ctypes.memset(start + last.nbytes, 0xFF, 1)
        return results


class TooLate(Wrapper):
    """Keeps what a read was lent, and writes to it once its call has returned."""

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        kept = [read.regions[-1].cast("B") for read in reads]
        results = await self.inner.get(reads)
        if self.is_ill:
            asyncio.get_running_loop().call_later(SOON, self._spoil, kept)
        return results

    @staticmethod
    def _spoil(kept: Sequence[memoryview]) -> None:
        for view in kept:
            view[:8] = b"too late"


LIARS: dict[str, Maker] = {"one byte too far": TooFar, "after its call returned": TooLate}
"""Backends that write where, or when, they may not. Each is to be found out."""


def playing(liar: Maker | None = None) -> Scenario:
    """The scenario; with a backend that lies before each tier."""

    async def scenario(world: World) -> None:
        small = partial(Slab, scratch_nbytes=SCRATCH)
        with mock.patch.object(kvlayer_backends.cpu, "Slab", small):
            await _play(world, liar)

    return scenario


play = playing()


async def _play(world: World, liar: Maker | None) -> None:
    chance = world.chance
    shelves = [MemoryBackend(), MemoryBackend()]
    belows: list[Below] = []
    for shelf, writes in zip(shelves, (("through", "back"), ("demote", "back")), strict=True):
        backend: Backend = Slow(shelf, chance, world.log, seconds=(0.0, SOON))
        settings = {
            "write": chance.choice(writes),
            "max_inflight": chance.choice([2, 8, 32]),
            "max_inflight_bytes": chance.choice([0, PAGE, 4 * PAGE]),
            "deadline_seconds": DEADLINE,
        }
        belows.append(Below(liar(backend, chance, world.log) if liar else backend, settings))
    pages = chance.choice([5, 6, 8])
    async with opened(world, *belows, pages=pages, high=chance.choice([1.0, 0.6])) as process:

        async def work() -> None:
            client = Client(process)
            for _ in range(5):
                prompt, length = world.pick()
                what = chance.random()
                if what < 0.4:
                    await client.store(prompt, length, within=IN_TURN)
                elif what < 0.8:
                    await client.load(prompt, length, pause=chance.choice([0.0, 0.0, SOON]))
                else:
                    await client.prefetch(prompt, length, seconds=DEADLINE)
                    world.counts["prefetched"] += 1
                world.counts["held every slot"] += _is_full(process)
                check(process)

        async def watch() -> None:
            while True:
                await asyncio.sleep(SOON / 3)
                check(process)

        async with asyncio.TaskGroup() as group:
            watching = group.create_task(watch())
            await asyncio.gather(*(work() for _ in range(5)))
            watching.cancel()
        await settle(process, is_lossless=liar is None)
        check(process)
        for shelf in shelves:
            world.check_stored(shelf.objects)


def check(process: Process) -> None:
    """Nothing is wrong, and nobody gave up on tiers that are well."""
    process.check()
    for tier in process.cache.stack.lower:
        late = tier.misses[Cause.DEADLINE] + tier.guard.orphans
        if late or not all(tier.guard.breaker(lane).is_closed for lane in Lane):
            raise invariants.Broken(f"{tier.name} is well, and was waited for in vain")
        damaged = [cause for cause in tier.misses if cause.is_damage]
        if damaged:
            raise invariants.Broken(f"{tier.name} damaged nothing, and is said to: {damaged}")


def _is_full(process: Process) -> bool:
    host = process.cache.stack.planner.host
    return host.pinned_nbytes + PAGE > host.extents.capacity
