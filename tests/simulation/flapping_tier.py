"""A flapping tier: one tier dies and comes back, again and again, another is slow and flaky.

Nobody waits longer than a deadline for either, what host memory holds is served all the while, and
a tier that is well again is used again.
"""

from __future__ import annotations

import asyncio

from clients import Client
from processes import Below, opened
from settling import settle
from world import World

from kvlayer.abc.backend import Capability
from kvlayer.testing.faults import Dying, Flaky, Late, Slow
from kvlayer.testing.lying import Lying
from kvlayer.testing.memory import MemoryBackend

SHARED = (Capability.LIST, Capability.SHARED)


async def play(world: World) -> None:
    chance, log = world.chance, world.log
    near, far = MemoryBackend(), MemoryBackend(capabilities=SHARED)
    flapping = Dying(
        near, chance, log, lives=(0.1, 2.0), dies=(0.2, 4.0), deaths=4, answers=chance.random()
    )
    lies = Lying(far, chance, log, share=chance.choice([0.0, 0.1]))
    late = Late(lies, chance, log, share=0.05, seconds=(0.2, 2.0))
    shaky = Flaky(Slow(late, chance, log, seconds=(0.0, 0.1)), chance, log, share=0.1)
    tiers = [
        Below(
            flapping,
            {
                "write": chance.choice(["through", "back", "demote"]),
                "deadline_seconds": 0.5,
                "pause_seconds": 0.2,
            },
        ),
        Below(
            shaky,
            {
                "write": chance.choice(["through", "back"]),
                "deadline_seconds": 0.4,
                "pause_seconds": 0.2,
                "max_inflight": chance.choice([2, 8]),
            },
        ),
    ]
    async with opened(world, *tiers, pages=8, high=chance.choice([1.0, 0.7])) as cache:

        async def work() -> None:
            client = Client(cache)
            for _ in range(6):
                prompt, length = world.pick()
                choice = chance.random()
                if choice < 0.4:
                    await client.store(prompt, length)
                elif choice < 0.55:
                    await client.drop(prompt, length)
                else:
                    await client.load(prompt, length, deadline=chance.choice([None, None, 0.1]))
                cache.check()
                await asyncio.sleep(chance.choice([0.0, 0.05, 0.5]))

        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(work())
        world.check_stored(near.objects)
        world.check_stored(far.objects)
        # What a write-back tier lied about having stored is lost when host memory lets go of it.
        await settle(cache, is_lossless=lies.share == 0.0)
