"""``file://`` between real processes: sharing, SIGKILL, hand-over, limits of the system."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from mmap import mmap
from pathlib import Path

import pytest
from hang import HANG

import kvlayer
from kvlayer.abc.backend import Hit, Read, Write
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer_backends.file import FileBackend, FileOptions

PAGE = 4096
OBJECT = 64 * PAGE
NAMESPACE = "ab" * 32
PART = Part(0, (0, 4), (0, 8))

PRELUDE = """
import asyncio, errno, os, resource, sys, time
from hashlib import sha256
from mmap import mmap
from kvlayer.abc.backend import *
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.eviction.lru import PrefixLRU
from kvlayer_backends.file import FileBackend, FileOptions

root, capacity, OBJECT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def key(n):
    chunk = sha256(b"%d" % n).digest()
    return ObjectName.raw(ObjectKey.of("ab" * 32, "0", chunk, 16, Part(0, (0, 4), (0, 8))))

def lent(n=None):
    memory = memoryview(mmap(-1, OBJECT))
    if n is not None:
        memory[:] = bytes([n % 256]) * OBJECT
    return memory

def say(*words):
    print(*words, flush=True)

def hear():
    return sys.stdin.readline().strip()

def opened():
    return FileBackend(root, FileOptions(capacity=capacity, interval=3600.0), policy=PrefixLRU)
"""


def key(number: int) -> ObjectKey:
    return ObjectName.raw(ObjectKey.of(NAMESPACE, "0", sha256(b"%d" % number).digest(), 16, PART))


def opened(root: Path, capacity: int = 0) -> FileBackend:
    return FileBackend(str(root), FileOptions(capacity=capacity, interval=3600.0), policy=PrefixLRU)


async def load(backend: FileBackend, number: int) -> bytes | None:
    memory = memoryview(mmap(-1, OBJECT))
    (result,) = await backend.get([Read(key(number), (memory,))])
    return bytes(memory[: result.nbytes]) if isinstance(result, Hit) else None


async def pass_(backend: FileBackend) -> None:
    assert backend.janitor is not None
    await backend.janitor.pass_()


class Child:
    """Another process, running a coroutine's body on the same directory."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    async def hears(self) -> str:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(asyncio.to_thread(self.process.stdout.readline), HANG)
        assert line, "the child died"
        return line.strip()

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(HANG)


@contextmanager
def child(root: Path, body: str, capacity: int = 0) -> Iterator[Child]:
    source = PRELUDE + "async def main():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    source += "\nasyncio.run(main())\n"
    packages = Path(kvlayer.__path__[0]).parent
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(root), str(capacity), str(OBJECT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )
    try:
        yield Child(process)
    finally:
        process.kill()
        process.communicate(timeout=HANG)


def weight(root: Path) -> int:
    """Bytes of everything but the locks."""
    found = (p for p in root.rglob("*") if p.is_file() and not p.name.endswith("lock"))
    return sum(p.stat().st_size for p in found)


@pytest.mark.asyncio
async def test_two_processes_share_one_directory(tmp_path: Path) -> None:
    body = """
        async with opened() as backend:
            say(backend.is_janitor)
            memory = lent()
            (result,) = await backend.get([Read(key(1), (memory,))])
            say(result.nbytes, bytes(memory) == bytes([1]) * OBJECT)
            writes = [Write(key(n), (lent(n),)) for n in (1, 2)]
            assert await backend.put(writes) == [None, None]
            say([one.nbytes async for one in backend.list()] == [OBJECT] * 2)
            await backend.delete([key(3)])
    """
    async with opened(tmp_path) as backend:
        await backend.recovered()
        mine = memoryview(mmap(-1, OBJECT))
        mine[:] = bytes([1]) * OBJECT
        assert await backend.put([Write(key(1), (mine,))]) == [None]
        with child(tmp_path, body) as other:
            assert await other.hears() == "False"
            assert await other.hears() == f"{OBJECT} True"
            assert await other.hears() == "True"
            assert other.process.wait(HANG) == 0
        assert await load(backend, 1) == bytes(mine)
        assert await load(backend, 2) == bytes([2]) * OBJECT
        await pass_(backend)
        assert backend.objects == 2
        assert len(list((tmp_path / "v2" / "tmp").iterdir())) == 1


@pytest.mark.asyncio
async def test_a_writer_killed_mid_write_leaves_nothing_visible_and_is_cleared_up(
    tmp_path: Path,
) -> None:
    body = """
        pwritev = os.pwritev
        def stall(fd, buffers, offset):
            pwritev(fd, [buffers[0][: OBJECT // 2]], 0)
            say("half")
            time.sleep(600)
        async with opened() as backend:
            await backend.put([Write(key(1), (lent(1),))])
            os.pwritev = stall
            await backend.put([Write(key(2), (lent(2),))])
    """
    async with opened(tmp_path) as backend:
        await backend.recovered()
        with child(tmp_path, body) as writer:
            assert await writer.hears() == "half"
            await pass_(backend)
            unfinished = list((tmp_path / "v2" / "tmp").glob("*/*.part"))
            assert [p.stat().st_size for p in unfinished] == [OBJECT // 2], "the living are left be"
            writer.kill()
            assert await backend.contains([key(1), key(2)]) == [OBJECT, None]
            await pass_(backend)
        assert not list((tmp_path / "v2" / "tmp").glob("*/*.part"))
        assert len(list((tmp_path / "v2" / "tmp").iterdir())) == 1
        assert await load(backend, 2) is None and await load(backend, 1) is not None
        assert weight(tmp_path) == backend.used_nbytes == OBJECT


@pytest.mark.asyncio
async def test_another_process_takes_over_from_a_killed_janitor(tmp_path: Path) -> None:
    capacity = 4 * OBJECT
    body = """
        async with opened() as backend:
            await backend.recovered()
            await backend.put([Write(key(n), (lent(n),)) for n in range(4)])
            say(backend.is_janitor)
            hear()
    """
    with child(tmp_path, body, capacity) as first:
        assert await first.hears() == "True"
        async with opened(tmp_path, capacity) as backend:
            roles = [backend.is_janitor]
            await pass_(backend)
            roles.append(backend.is_janitor)
            first.kill()
            await pass_(backend)
            roles.append(backend.is_janitor)
            assert roles == [False, False, True]
            assert backend.objects == 4
            memory = memoryview(mmap(-1, OBJECT))
            assert await backend.put([Write(key(9), (memory,))]) == [None]
            assert weight(tmp_path) == backend.used_nbytes == capacity
            assert await backend.contains([key(3), key(0)]) == [None, OBJECT]


@pytest.mark.asyncio
async def test_what_another_process_writes_over_the_capacity_is_gone_after_one_pass(
    tmp_path: Path,
) -> None:
    capacity = 3 * OBJECT
    body = """
        async with opened() as backend:
            await backend.put([Write(key(n), (lent(n),)) for n in range(8)])
            say("written")
            hear()
    """
    async with opened(tmp_path, capacity) as backend:
        await backend.recovered()
        with child(tmp_path, body, capacity) as other:
            assert await other.hears() == "written"
            assert weight(tmp_path) == 8 * OBJECT
            await pass_(backend)
            assert weight(tmp_path) == backend.used_nbytes == capacity
            other.say("go")
            assert other.process.wait(HANG) == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("limit", "word"),
    [
        ("resource.RLIMIT_FSIZE, (8192, 8192)", "EFBIG"),
        ("resource.RLIMIT_NOFILE, (3, 3)", "EMFILE"),
    ],
)
async def test_a_limit_of_the_system_is_a_value_and_leaves_nothing(
    tmp_path: Path, limit: str, word: str
) -> None:
    body = f"""
        async with opened() as backend:
            await backend.recovered()
            await backend.put([Write(key(1), (lent(1),))])
            await backend.get([Read(key(1), (lent(),))])
            resource.setrlimit({limit})
            (error,) = await backend.put([Write(key(2), (lent(2),))])
            assert isinstance(error, BackendError), error
            say(error)
            say(error.hint)
    """
    with child(tmp_path, body) as limited:
        assert word in await limited.hears()
        assert "ulimit" in await limited.hears()
        assert limited.process.wait(HANG) == 0
    assert weight(tmp_path) == OBJECT
    assert not list((tmp_path / "v2" / "tmp").iterdir())
