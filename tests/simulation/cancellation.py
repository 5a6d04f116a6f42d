"""Cancellation at every await: one request after the other is cancelled at one of its awaits.

Which one is drawn; over the seeds every await of every operation has its turn. Whatever was lent
is back when the call raises, and nothing is held afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from clients import Client
from processes import Below, opened
from settling import settle
from world import World

from kvlayer.abc.backend import Capability
from kvlayer.testing import invariants
from kvlayer.testing.faults import Late, Slow
from kvlayer.testing.lying import Lying
from kvlayer.testing.memory import MemoryBackend
from kvlayer.testing.sim import Awaits

SHARED = (Capability.LIST, Capability.SHARED)
MOST = 8  # awaits that a request makes itself; what it starts makes more


async def play(world: World) -> None:
    chance, log = world.chance, world.log
    shelf = MemoryBackend(capabilities=SHARED)
    lies = Lying(shelf, chance, log, share=0.03)
    late = Late(lies, chance, log, share=0.1, seconds=(0.3, 1.0))
    below = Below(
        Slow(late, chance, log, seconds=(0.0, 0.02)),
        {"write": "through", "deadline_seconds": 0.25, "pause_seconds": 0.1},
    )
    async with opened(world, below, pages=10) as cache:
        client = Client(cache)
        control = cache.cache.control

        async def prefetch() -> None:
            await client.prefetch(*world.pick(), seconds=0.1)

        async def pin() -> None:
            prompt, length = world.pick()
            control.unpin(await control.pin(prompt.tokens[:length], seconds=1.0))

        async def evict() -> None:
            await client.drop(*world.pick(), tier=chance.choice(["cpu", "cpu", None]))

        async def polled() -> None:
            prompt, length = world.pick()
            with cache.cache.begin_lookup(prompt.tokens[:length]) as lookup:
                await lookup

        kinds: list[Callable[[], Coroutine[Any, Any, Any]]] = [
            lambda: client.store(*world.pick()),
            lambda: client.load(*world.pick()),
            prefetch,
            pin,
            evict,
            polled,
            cache.cache.flush,
        ]
        weights = [4, 8, 2, 1, 3, 1, 1]
        await client.store(*world.pick())
        for _ in range(10):
            steps = Awaits(chance.choices(kinds, weights)[0](), chance.randrange(MOST + 1))
            task = asyncio.ensure_future(_whole(steps))
            await asyncio.wait({task})
            if task.cancelled():
                world.counts["cancelled"] += 1
                world.counts[f"cancelled at {steps.count}"] += 1
            else:
                task.result()
            client.check_that_it_is_ours()
            cache.check()
            await asyncio.sleep(2.0)  # prefetches and pins are over, a lookup's lease is not
            async with cache.cache.lookup(world.prompts[0].tokens[:1]):
                pass
            left = cache.cache.control.stats().leases
            if left:
                raise invariants.Broken(f"{left} leases are left by requests that have ended")
        world.check_stored(shelf.objects)
        await settle(cache, is_lossless=False)


async def _whole(steps: Awaits[Any]) -> None:
    await steps
