"""Eviction against lookup: host memory is too small for what is asked for at once.

Lookups lease, loads reserve, stores evict, demotion empties, and requests hold what they found
while others need the room.
"""

from __future__ import annotations

import asyncio

from clients import Client
from processes import Below, opened
from settling import settle
from world import World

from kvlayer.testing.faults import Slow
from kvlayer.testing.memory import MemoryBackend


async def play(world: World) -> None:
    chance = world.chance
    shelf = MemoryBackend()
    below = Below(
        Slow(shelf, chance, world.log, seconds=(0.0, 0.02)),
        {"write": chance.choice(["through", "back", "demote"]), "max_inflight": 4},
    )
    high = chance.choice([1.0, 0.8, 0.6])
    policy = chance.choice(["prefix-lru", "lru", "arc"])
    async with opened(
        world, below, pages=chance.randrange(4, 12), policy=policy, high=high
    ) as cache:

        async def work() -> None:
            client = Client(cache)
            for _ in range(5):
                prompt, length = world.pick()
                if chance.random() < 0.45:
                    await client.store(prompt, length, first=chance.choice([0, 0, 8]))
                else:
                    await client.load(prompt, length, pause=chance.choice([0.0, 0.0, 0.01, 0.1]))
                cache.check()
                world.check_stored(shelf.objects)

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(work())
        await settle(cache)
        world.check_stored(shelf.objects)
