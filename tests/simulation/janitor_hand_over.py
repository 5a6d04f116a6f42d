"""Janitor hand-over: processes of one directory come, go and die, and one of them is in office.

Real files below a temporary directory; a process is a backend, and it dies as a killed one does:
its locks are free, its unfinished files lie about. There is never more than one janitor, soon one
again, the capacity holds, and no object is lost that no janitor evicted.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections import Counter
from pathlib import Path

from world import World

from kvlayer.abc.backend import Hit, Read, Write
from kvlayer.errors import BackendError
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, ObjectName, Part
from kvlayer.testing import invariants
from kvlayer_backends.file.backend import FileBackend
from kvlayer_backends.file.options import FileOptions

INTERVAL = 1.0
UNIT = 4096
CAPACITY = 10 * UNIT
ANSWERED = 3 * INTERVAL  # a put waits for recovery, and for a pass that makes room
PART = Part(0, (0, 1), (0, 1), "canonical")


class Directory:
    """The files, and what is known of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.root = world.directory
        self.keys = [
            ObjectName.raw(ObjectKey.of("ab" * 32, PUBLIC_ZONE, bytes([i]) * 32, 16, PART))
            for i in range(24)
        ]
        self.sizes = {key: world.chance.choice([1, 1, 2, 3]) * UNIT for key in self.keys}
        self.committed: set[ObjectKey] = set()
        self.uncounted: list[tuple[float, int]] = []
        """Bytes that were written without the janitor's knowledge, and when."""
        self.alive: list[FileBackend] = []

    def content(self, key: ObjectKey) -> bytes:
        return bytes([self.keys.index(key) + 1]) * self.sizes[key]

    def present(self) -> dict[str, int]:
        """Object files by name, and their sizes."""
        found = {}
        for path in (self.root / "v2").glob("*/??/*"):
            if path.parts[-3] not in ("tmp", "quarantine"):
                found[path.name] = path.stat().st_size
        return found

    def gone(self, gone: list[tuple[ObjectKey, int]], policy: str) -> None:
        self.world.counts["evicted"] += len(gone)
        self.committed.difference_update(key for key, _ in gone)

    def check(self) -> None:
        janitors = [each for each in self.alive if each.is_janitor]
        if len(janitors) > 1:
            raise invariants.Broken("two janitors are in office at once")
        now = asyncio.get_running_loop().time()
        self.uncounted = [(at, n) for at, n in self.uncounted if at > now - 3 * INTERVAL]
        used = sum(self.present().values())
        allowed = CAPACITY + sum(nbytes for _, nbytes in self.uncounted)
        if used > allowed:
            raise invariants.Broken(f"{used} bytes lie in a directory that may have {allowed}")

    def check_that_nothing_is_lost(self) -> None:
        names = Counter(self.present())
        for key in self.committed:
            name = ".".join(key.split("/")[2:])
            if not names[name]:
                raise invariants.Broken(f"{key} was committed, nobody evicted it, and it is gone")


async def play(world: World) -> None:
    chance = world.chance
    shared = Directory(world)
    # Somebody was here before: the first janitor has to count what it finds.
    async with _process(shared, capacity=0) as before:
        for key in chance.sample(shared.keys, chance.randrange(8)):
            await _put(shared, before, key)
        shared.alive.clear()
    shared.uncounted.append((asyncio.get_running_loop().time(), 10 * CAPACITY))

    async def live() -> None:
        backend = _process(shared)
        await backend.open()
        shared.alive.append(backend)
        work = asyncio.ensure_future(_work(shared, backend))
        if chance.random() < 0.5:
            await asyncio.sleep(chance.uniform(0.0, 3 * INTERVAL))
            shared.alive.remove(backend)
            await _die(shared, backend, work)
        else:
            await work
            shared.alive.remove(backend)
            await backend.aclose()

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(live())
            await asyncio.sleep(chance.choice([0.0, INTERVAL, 2 * INTERVAL]))
    last = _process(shared)
    async with last:
        shared.alive.append(last)
        await asyncio.sleep(4 * INTERVAL)
        shared.uncounted.clear()
        shared.check()
        if not last.is_janitor:
            raise invariants.Broken("nobody has taken the office that is free")
        on_disk = sum(shared.present().values())
        if last.used_nbytes != on_disk:
            raise invariants.Broken(f"{last.used_nbytes} bytes are counted, {on_disk} are there")
        shared.check_that_nothing_is_lost()
        left = len(os.listdir(world.directory / "v2" / "tmp"))
        if left != 1:
            raise invariants.Broken(f"{left - 1} dead processes' unfinished files are left")
        for key in shared.keys:
            await _get(shared, last, key)


def _process(shared: Directory, capacity: int = CAPACITY) -> FileBackend:
    options = FileOptions(capacity=capacity, direct="off", interval=INTERVAL)
    backend = FileBackend(str(shared.root), options)
    backend.on_evicted = shared.gone
    return backend


async def _die(shared: Directory, backend: FileBackend, work: asyncio.Task[None]) -> None:
    """The process is killed: nothing of it runs any more, and the system lets go of its locks."""
    site, janitor = backend._site, backend.janitor
    assert site is not None and janitor is not None and site.scratch.path is not None
    Path(site.scratch.file()).write_bytes(b"unfinished")
    backend.on_evicted = None  # the dead tell nobody
    for task in (work, janitor._task):
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
    if not work.cancelled():
        work.result()
    was_janitor = backend.is_janitor
    janitor.resign()
    site.scratch.abandon()
    site.pulse.close()
    site.bulk.close()
    site.meta.close()
    # What it evicted in its last moment, and what it was writing, it could tell nobody.
    names = shared.present()
    shared.committed = {k for k in shared.committed if ".".join(k.split("/")[2:]) in names}
    # The next janitor grants writes against what a dead one had noted after its last pass.
    nbytes = CAPACITY if was_janitor else 4 * UNIT
    shared.uncounted.append((asyncio.get_running_loop().time(), nbytes))
    shared.world.counts["died"] += 1


async def _work(shared: Directory, backend: FileBackend) -> None:
    chance = shared.world.chance
    for _ in range(12):
        key = chance.choice(shared.keys)
        choice = chance.random()
        if choice < 0.55:
            await _put(shared, backend, key)
        elif choice < 0.8:
            await _get(shared, backend, key)
        elif choice < 0.9:
            await backend.touch(chance.sample(shared.keys, 3))
        else:
            shared.committed.discard(key)
            await backend.delete([key])
            shared.committed.discard(key)
        shared.check()
        await asyncio.sleep(chance.choice([0.0, 0.0, 0.1, INTERVAL]))


async def _put(shared: Directory, backend: FileBackend, key: ObjectKey) -> None:
    page = mmap.mmap(-1, shared.sizes[key])
    page[:] = shared.content(key)
    loop = asyncio.get_running_loop()
    if not backend.is_janitor:
        shared.uncounted.append((loop.time(), shared.sizes[key]))
    started = loop.time()
    (error,) = await backend.put([Write(key, (memoryview(page),))])
    invariants.answered("put", loop.time() - started, within=ANSWERED)
    if not backend.is_janitor:
        shared.uncounted.append((loop.time(), shared.sizes[key]))
    if error is not None:
        raise invariants.Broken(f"a healthy directory answers {error!r}")
    shared.world.counts["put"] += 1


async def _get(shared: Directory, backend: FileBackend, key: ObjectKey) -> None:
    page = mmap.mmap(-1, shared.sizes[key])
    (result,) = await backend.get([Read(key, (memoryview(page),))])
    if isinstance(result, BackendError):
        raise invariants.Broken(f"a healthy directory answers {result!r}")
    if isinstance(result, Hit) and page[:] != shared.content(key):
        raise invariants.Broken(f"wrong bytes of {key}")
    shared.world.counts["got"] += isinstance(result, Hit)
