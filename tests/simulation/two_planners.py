"""Two planners on one directory: each has its own idea of what lies there, and both are at work.

Real files below a temporary directory. What the one evicts, deletes or finds damaged is a miss to
the other: right bytes or a shorter prefix, and what turned out to be gone is not offered again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from clients import Client
from processes import Below, Process, opened
from settling import settle
from world import PAGE, World

from kvlayer.abc.backend import Damaged, DeleteResult
from kvlayer.testing.faults import Slow, Wrapper
from kvlayer_backends.file.backend import FileBackend
from kvlayer_backends.file.options import FileOptions


class Watched(Wrapper):
    """Says when a damaged object has left the directory: its event comes before that."""

    world: World

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        results = await super().quarantine(items)
        for process in self.world.processes:
            process.gives_up(*(item.key.end_hash for item in items))
        return results


async def play(world: World) -> None:
    chance = world.chance
    options = FileOptions(capacity=chance.choice([0, 24]) * PAGE, direct="off", interval=20.0)

    def below() -> Below:
        files = FileBackend(str(world.directory), options)
        watched = Watched(files, chance, world.log)
        watched.world = world
        slow = Slow(watched, chance, world.log, seconds=(0.0, 0.02))
        return Below(slow, {"write": chance.choice(["through", "back"])})

    async with (
        opened(world, below(), pages=6, name="one") as one,
        opened(world, below(), pages=6, name="other") as other,
    ):

        async def work(process: Process) -> None:
            client = Client(process)
            for _ in range(6):
                prompt, length = world.pick()
                choice = chance.random()
                if choice < 0.4:
                    await client.store(prompt, length)
                elif choice < 0.9:
                    await client.load(prompt, length)
                else:
                    await client.drop(prompt, length, tier=chance.choice(["cpu", None]))
                if chance.random() < 0.1:
                    _damage(world)
                process.check()
                await asyncio.sleep(chance.choice([0.0, 0.0, 0.01, 1.0]))

        async with asyncio.TaskGroup() as group:
            for process in (one, other):
                group.create_task(work(process))
        await settle(one)
        await settle(other)


def _damage(world: World) -> None:
    """A bit of one object's file turns."""
    files = sorted((world.directory / "v2").glob("*/??/*.raw"))
    if files:
        path = world.chance.choice(files)
        at = world.chance.randrange(path.stat().st_size)
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << world.chance.randrange(8)]))
        world.counts["damaged"] += 1
