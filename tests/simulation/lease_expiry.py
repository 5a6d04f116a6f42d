"""Lease expiry: whoever looked up comes back too late, and the room went to somebody else.

A retrieve after the lease has run out loads what is still there, under the names it was found by;
whoever was quick keeps what it leased, however full it gets.
"""

from __future__ import annotations

import asyncio

from clients import Client
from processes import LEASE, Below, opened
from settling import settle
from world import World

from kvlayer.testing.faults import Slow
from kvlayer.testing.memory import MemoryBackend


async def play(world: World) -> None:
    chance = world.chance
    shelf = MemoryBackend()
    below = Below(
        Slow(shelf, chance, world.log, seconds=(0.0, 0.05)),
        {"write": chance.choice(["through", "back", "never"])},
    )
    async with opened(world, below, pages=chance.randrange(5, 9)) as cache:

        async def late() -> None:
            """Retrieves around the moment at which its lease ends."""
            client = Client(cache)
            for _ in range(3):
                pause = chance.choice([LEASE - 0.01, LEASE, LEASE + 0.01, 2 * LEASE])
                await client.load(*world.pick(), pause=pause)
                cache.check()

        async def busy() -> None:
            """Wants the room."""
            client = Client(cache)
            for _ in range(6):
                await client.store(*world.pick())
                cache.check()
                if chance.random() < 0.3:
                    await client.prefetch(*world.pick(), seconds=chance.choice([0.5, LEASE]))
                await asyncio.sleep(chance.choice([0.0, 1.0, LEASE / 2, LEASE]))

        await Client(cache).store(*world.pick())
        async with asyncio.TaskGroup() as group:
            for work in (late, late, busy):
                group.create_task(work())
        await settle(cache)
        world.check_stored(shelf.objects)
