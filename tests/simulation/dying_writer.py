"""A dying writer: the process that writes ends in the middle, and so does the tier it writes to.

What it leaves on the shared tier is whole objects or nothing: another process that looks at any
moment finds right bytes or a miss. So does an engine of the same process, when the request that
stored was cancelled half-way.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from clients import Client
from processes import Below, opened
from settling import settle
from world import World

from kvlayer.abc.backend import Capability
from kvlayer.testing.faults import Dying, Slow
from kvlayer.testing.memory import MemoryBackend

BEYOND = (Capability.LIST, Capability.PERSISTENT, Capability.SHARED)


class Died(Exception):  # noqa: N818  # an event
    """The writer's process ends here."""


async def play(world: World) -> None:
    chance = world.chance
    shelf = MemoryBackend(capabilities=BEYOND)
    mine = Slow(MemoryBackend(shelf.objects, BEYOND), chance, world.log, seconds=(0.0, 0.02))
    theirs = Dying(
        Slow(MemoryBackend(shelf.objects, BEYOND), chance, world.log, seconds=(0.0, 0.05)),
        chance,
        world.log,
        lives=(0.01, 0.3),
        dies=(0.1, 2.0),
        deaths=chance.randrange(3),
    )
    settings = {"deadline_seconds": 0.5, "pause_seconds": 0.1}
    async with opened(world, Below(mine, settings), name="reader") as reader:

        async def write() -> None:
            with suppress(Died):
                below = Below(theirs, {**settings, "write": chance.choice(["through", "back"])})
                async with opened(world, below, name="writer") as writer:
                    clients = [Client(writer) for _ in range(2)]
                    for _ in range(3):
                        tasks = [asyncio.ensure_future(c.store(*world.pick())) for c in clients]
                        for task in tasks:
                            if chance.random() < 0.6:
                                for _ in range(chance.randrange(12)):
                                    await asyncio.sleep(0)
                                task.cancel()
                        await asyncio.wait(tasks)
                        for task in tasks:
                            if not task.cancelled():
                                task.result()
                        await clients[0].load(*world.pick())
                        writer.check()
                        world.check_stored(shelf.objects)
                    raise Died

        async def read() -> None:
            client = Client(reader)
            for _ in range(5):
                await client.load(*world.pick())
                reader.check()
                await asyncio.sleep(chance.choice([0.0, 0.01, 0.2]))

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            group.create_task(read())
        world.check_stored(shelf.objects)
        await settle(reader)
