"""Sparse states: a hybrid model, whose engine has its states at few ends of a prompt.

Two processes share a slow tier that lies, loses objects and damages them, and have little host
memory. A load ends exactly where all groups of states have the one after that token, or brings
nothing. In the end a lookup finds the longest hit that what is left can make.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from hybrid import LAYOUT, HybridEngine, Kept
from processes import LEASE, Below, opened
from settling import settle
from world import LONGEST, World

from kvlayer.abc.backend import Capability
from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause
from kvlayer.testing import invariants
from kvlayer.testing.faults import Slow
from kvlayer.testing.lying import Lying
from kvlayer.testing.memory import MemoryBackend
from kvlayer.testing.sim import Awaits

SHARED = (Capability.LIST, Capability.SHARED)
MOST = 12  # awaits that a request makes itself


async def play(world: World) -> None:
    chance = world.chance
    kept = Kept(world)

    def below() -> Below:
        lies = Lying(MemoryBackend(kept.objects, SHARED), chance, world.log, share=0.02)
        slow = Slow(lies, chance, world.log, seconds=(0.0, 0.02))
        return Below(slow, {"write": chance.choice(["through", "back", "demote", "never"])})

    pages = [chance.choice([8, 12, 16]) for _ in range(2)]
    async with (
        opened(world, below(), pages=pages[0], name="one", layout=LAYOUT) as one,
        opened(world, below(), pages=pages[1], name="other", layout=LAYOUT) as other,
    ):
        async with asyncio.TaskGroup() as group:
            for process in (one, one, other, other):
                group.create_task(_work(HybridEngine(process, kept)))
        for process in (one, other):
            engine = HybridEngine(process, kept)
            await settle(process, is_lossless=False, reader=engine)
        for process in (one, other):
            await _check_that_all_is_found(HybridEngine(process, kept))


async def _work(engine: HybridEngine) -> None:
    world, control = engine.world, engine.cache.control
    chance = world.chance

    async def load() -> None:
        pause = chance.choice([0.0, LEASE + 0.01, 2 * LEASE])
        await engine.load(*world.pick(), pause=pause)

    async def pin() -> None:
        prompt, length = world.pick()
        control.unpin(await control.pin(prompt.tokens[:length], seconds=1.0))

    kinds: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: engine.store(*world.pick()),
        load,
        lambda: engine.prefetch(*world.pick(), seconds=0.1),
        pin,
        lambda: engine.drop(*world.pick(), tier=chance.choice(["cpu", "cpu", None])),
    ]
    for _ in range(8):
        cancel_at = chance.choice([0, 0, 0, chance.randrange(1, MOST)])
        work = chance.choices(kinds, [6, 8, 2, 1, 2])[0]()
        task = asyncio.ensure_future(_whole(Awaits(work, cancel_at)))
        await asyncio.wait({task})
        if task.cancelled():
            world.counts["cancelled"] += 1
        else:
            task.result()
        engine.check_that_it_is_ours()
        engine.process.check()
        if chance.random() < 0.3:
            _spoil(world, engine.kept.objects)
        await asyncio.sleep(chance.choice([0.0, 0.0, 0.01, LEASE / 2]))


async def _whole(steps: Awaits[Any]) -> None:
    await steps


def _spoil(world: World, objects: dict[ObjectKey, bytes]) -> None:
    """One object of the tier vanishes, or a byte of what it holds turns."""
    if not objects:
        return
    name = world.chance.choice([*objects])
    if world.chance.random() < 0.5:
        del objects[name]
        world.counts["vanished"] += 1
        return
    stored = bytearray(objects[name])
    stored[len(stored) - world.chance.randrange(1, 4097)] ^= 1
    objects[name] = bytes(stored)
    world.counts["damaged"] += 1


async def _check_that_all_is_found(engine: HybridEngine) -> None:
    for prompt in engine.world.prompts:
        await asyncio.sleep(2.0)  # what a tier denied is asked about again
        report = await engine.load(prompt)
        for _ in range(LONGEST):  # each finds out one that is not where it seemed
            if report.failed:
                report = await engine.load(prompt)
        if any(failure.cause is Cause.NO_ROOM for failure in report.failed):
            continue
        longest = engine.longest(prompt)
        if report.failed or report.tokens != longest:
            raise invariants.Broken(f"{longest} tokens are there, and were loaded as {report}")
        engine.world.counts["found"] += longest > 0
