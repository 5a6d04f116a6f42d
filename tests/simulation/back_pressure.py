"""Back-pressure: more is stored and loaded than a slow tier can take.

A store waits for room while its tier writes, and holds nothing meanwhile. No more is held for
writing than the bounds say, nobody waits without end, and every span of a store is accounted for.
"""

from __future__ import annotations

import asyncio

from clients import Client
from processes import CHUNK, Below, opened
from settling import settle
from world import LONGEST, PAGE, World

from kvlayer.testing.faults import Slow
from kvlayer.testing.memory import MemoryBackend

IN_TURN = 16 * (LONGEST // CHUNK + 1) * 1.0
"""Seconds a store may wait: all that four clients store, one after the other."""


async def play(world: World) -> None:
    chance = world.chance
    shelf = MemoryBackend()
    settings = {
        "write": chance.choice(["through", "back", "demote"]),
        "max_inflight": chance.choice([1, 2, 4]),
        "max_inflight_bytes": chance.choice([0, 1, 2 * PAGE, 4 * PAGE]),
        "deadline_seconds": 1.0,
        "pause_seconds": 0.2,
    }
    below = Below(Slow(shelf, chance, world.log, seconds=(0.05, 0.6)), settings)
    async with opened(
        world, below, pages=chance.choice([6, 10]), high=chance.choice([1.0, 0.5])
    ) as cache:

        async def work() -> None:
            client = Client(cache)
            for _ in range(4):
                prompt, length = world.pick()
                if chance.random() < 0.7:
                    report = await client.store(prompt, length, within=IN_TURN)
                    world.counts["refused"] += len(report.failed)
                else:
                    await client.load(prompt, length, deadline=chance.choice([None, 0.2]))
                cache.check()

        async def watch() -> None:
            while True:
                await asyncio.sleep(0.02)
                cache.check()

        watching = asyncio.ensure_future(watch())
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(work())
        watching.cancel()
        await asyncio.wait({watching})
        if not watching.cancelled():
            watching.result()
        await settle(cache)
        world.check_stored(shelf.objects)
