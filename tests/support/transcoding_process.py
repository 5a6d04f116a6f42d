"""A process that codes the objects of a directory anew, and is killed in the middle of it.

``python transcoding_process.py DIRECTORY CODEC CALL``: killed when its backend is called for the
CALL-th time since it began, counting from 0. Run by itself it is also what tests open.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from codecs_of_tests import DOUBLES, SHRINKS
from stacks import CHUNK, NAMESPACE, full_group

from kvlayer.abc.backend import Backend
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, Part
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.testing.loan import noise
from kvlayer.tier.messages import Outcome
from kvlayer.tier.transfer.encodings import Coding, Raw
from kvlayer.tier.transfer.named import Named
from kvlayer.tier.transfer.objects import Item, Objects
from kvlayer.tier.transfer.relay import Relayed
from kvlayer_backends.file import FileBackend, FileOptions

PART = Part(0, (0, 2), (0, 2))
PAYLOAD = Payload.of(full_group(), PART, CHUNK)
COUNT = 4
CODINGS: dict[str, Coding] = {"doubles": DOUBLES, "shrinks": SHRINKS}


def key(number: int) -> ObjectKey:
    end_hash = (number + 1).to_bytes(32, "little")
    return ObjectKey.of(NAMESPACE, PUBLIC_ZONE, end_hash, CHUNK, PART)


def content(number: int) -> bytes:
    return bytes(PAYLOAD.body_nbytes // 2) + noise(number, PAYLOAD.body_nbytes // 2)


def objects_of(slab: Slab, backend: Backend, codings: Sequence[Coding]) -> Objects:
    return Objects(
        slab,
        [None, backend],
        shape=lambda _, tokens: PAYLOAD,
        clock=asyncio.get_running_loop().time,
        wall_clock=lambda: 0.0,
        build="test",
        codings=[(), codings],
    )


@asynccontextmanager
async def opened(
    directory: str, codings: Sequence[Coding], capacity: int = 0
) -> AsyncGenerator[tuple[FileBackend, Objects]]:
    options = FileOptions(interval=3600.0, capacity=capacity)
    files = FileBackend(directory, options, policy=PrefixLRU)
    slab = Slab(4096)
    async with files:
        objects = objects_of(
            slab, Named(files, encodings=[coding.encoding for coding in codings]), codings
        )
        try:
            yield files, objects
        finally:
            objects.close()
            slab.close()


async def store(objects: Objects, number: int) -> Outcome:
    parent = key(number - 1).end_hash if number else b""
    regions = (memoryview(bytearray(content(number))),)
    item = Item(key(number), PAYLOAD, CHUNK * number, regions, parent=parent)
    return await objects.put(1, item)


async def transcode(objects: Objects) -> list[Outcome]:
    parents = [key(n - 1).end_hash if n else b"" for n in range(COUNT)]
    moves = [Relayed(key(n), CHUNK * n, parent=parents[n]) for n in range(COUNT)]
    return await objects.transcode(moves, 1)


async def _main(directory: str, codec: str, call: int) -> None:
    async with opened(directory, (CODINGS[codec], Raw())) as (files, objects):
        left = [call]

        def counted(method: Any) -> Any:
            async def calls(*args: Any) -> Any:
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return await method(*args)

            return calls

        for name in ("get", "put", "delete"):
            setattr(files, name, counted(getattr(files, name)))
        await transcode(objects)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
