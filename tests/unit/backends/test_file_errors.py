"""An error is not an absence: what cannot be read for a moment keeps its account."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from hang import HANG

from kvlayer.abc.backend import Damaged, Hit, Listed, Read, Write
from kvlayer.errors import BackendError
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.testing.framed import framed
from kvlayer_backends.file import FileBackend, FileOptions
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.scratch import Scratch, reap

PAGE = 4096
SPACES = ["ab" * 32, "cd" * 32]
PART = Part(0, (0, 4), (0, 8))
KEYS = [
    ObjectName.raw(ObjectKey.of(SPACES[n % 2], "0", sha256(b"%d" % n).digest(), 16, PART))
    for n in range(12)
]
ERRORS = [errno.EMFILE, errno.EACCES, errno.EIO, errno.ENOMEM, errno.ENOTDIR]


def backend(root: Path, **more: Any) -> FileBackend:
    options = FileOptions(**{"interval": 3600.0, **more})
    return FileBackend(str(root), options, policy=PrefixLRU)


def page(fill: int = 0, pages: int = 1) -> memoryview:
    memory = memoryview(mmap(-1, pages * PAGE))
    memory[:] = bytes([fill]) * len(memory)
    return memory


@contextmanager
def failing(code: int, concerns: Callable[[str], bool], *calls: str) -> Iterator[list[str]]:
    """Calls of ``os`` with a path that ``concerns`` them fail; yields these paths."""
    hit: list[str] = []

    def call(real: Any, path: Any, *args: Any, **more: Any) -> Any:
        if not (isinstance(path, str) and concerns(path)):
            return real(path, *args, **more)
        hit.append(path)
        raise OSError(code, os.strerror(code), path)

    with pytest.MonkeyPatch.context() as patch:
        for name in calls:
            patch.setattr(os, name, partial(call, getattr(os, name)))
        yield hit


async def listed(files: FileBackend) -> list[Listed]:
    return [each async for each in files.list()]


# Which names are hidden for a moment: the tier's folder, a namespace, all shards, one shard.
HIDDEN: list[Callable[[str, str], bool]] = [
    lambda folder, path: path == folder,
    lambda folder, path: path == f"{folder}/{SPACES[0]}",
    lambda folder, path: path.count("/") == folder.count("/") + 2,
    lambda folder, path: path == os.path.dirname(Paths(folder[:-3]).object(KEYS[0])),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize(
    ("where", "call"),
    [(0, "listdir"), *((n, call) for n in (1, 2, 3) for call in ("listdir", "lstat"))],
)
async def test_a_folder_that_cannot_be_read_keeps_its_account(
    tmp_path: Path, code: int, where: int, call: str
) -> None:
    folder = Paths(str(tmp_path)).folder
    async with backend(tmp_path) as files, backend(tmp_path) as other:
        assert files.janitor is not None and files.is_janitor
        assert await files.put([Write(key, (page(),)) for key in KEYS]) == [None] * 12
        for shard in Path(folder).glob("*/??"):
            os.utime(shard, (1, 1))
        await files.janitor.pass_()
        for shard in Path(folder).glob("*/??"):  # nothing in them is as it was when it was read
            os.utime(shard, (2, 2))
        with failing(code, lambda path: HIDDEN[where](folder, path), call) as hit:
            for _ in range(2):
                with pytest.raises(OSError, match=f"Errno {code}"):
                    await files.janitor.pass_()
                assert (files.objects, files.used_nbytes) == (12, 12 * PAGE)
            with pytest.raises(BackendError):
                await listed(files)
            with pytest.raises(BackendError):  # nor does one that is no janitor take it for empty
                await listed(other)
        assert hit
        late = Path(Paths(str(tmp_path)).object(KEYS[0]).replace("g0", "g1"))
        late.write_bytes(bytes(PAGE))
        await files.janitor.pass_()
        assert (files.objects, files.used_nbytes) == (13, 13 * PAGE)  # it was looked at again
        assert len(await listed(files)) == len(await listed(other)) == 13


@pytest.mark.asyncio
@pytest.mark.parametrize("code", ERRORS)
async def test_an_object_that_cannot_be_looked_at_is_found_by_a_later_pass(
    tmp_path: Path, code: int
) -> None:
    async with backend(tmp_path) as files:
        await files.put([Write(key, (page(),)) for key in KEYS[:4]])
    path = Paths(str(tmp_path)).object(KEYS[0])
    async with backend(tmp_path) as files:
        with failing(code, lambda name: name == path, "lstat"):
            assert files.janitor is not None
            with pytest.raises(OSError, match=f"Errno {code}"):
                await files.janitor.pass_()
            await files.recovered()
            assert files.objects == 3 and files.used_nbytes >= 4 * PAGE  # as the last one counted
            (answer,) = await files.contains([KEYS[0]])
            assert isinstance(answer, BackendError)
            (written,) = await files.put([Write(KEYS[0], (page(),))])
            assert isinstance(written, BackendError)
        await files.janitor.pass_()
        assert (files.objects, files.used_nbytes) == (4, 4 * PAGE)


@pytest.mark.asyncio
async def test_what_was_deleted_elsewhere_before_it_was_ever_listed_is_forgotten(
    tmp_path: Path,
) -> None:
    async with backend(tmp_path) as files:
        await files.recovered()
        await files.put([Write(key, (page(),)) for key in KEYS])
        for key in KEYS:
            path = Path(Paths(str(tmp_path)).object(key))
            path.unlink()
            path.parent.rmdir()
        assert files.janitor is not None
        await files.janitor.pass_()
        assert (files.objects, files.used_nbytes) == (0, 0)


@pytest.mark.asyncio
async def test_a_quarantine_that_cannot_be_read_keeps_its_account(tmp_path: Path) -> None:
    async with backend(tmp_path) as files:
        await files.put([Write(key, (page(),)) for key in KEYS])
        await files.quarantine([Damaged(key) for key in KEYS[:3]])
        assert files.used_nbytes == 12 * PAGE
        folder = Paths(str(tmp_path)).quarantine
        with failing(errno.EMFILE, lambda path: path == folder, "listdir"):
            assert files.janitor is not None
            with pytest.raises(OSError, match="Errno 24"):
                await files.janitor.pass_()
            assert files.used_nbytes == 12 * PAGE


@pytest.mark.asyncio
async def test_descriptions_that_cannot_be_listed_are_an_error(tmp_path: Path) -> None:
    async with backend(tmp_path) as files:
        await files.describe(SPACES[0], b"x")
        folder = Paths(str(tmp_path)).folder
        with (
            failing(errno.EIO, lambda path: path == folder, "listdir"),
            pytest.raises(BackendError, match="EIO"),
        ):
            await files.namespaces()


# -- objects that are no objects, and those that were read ----------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("capacity", [0, 4 * PAGE])
@pytest.mark.parametrize("left", [0, 1, 100, PAGE, PAGE + 1, 3 * PAGE - 1, 3 * PAGE + 1])
async def test_a_file_that_contradicts_its_own_header_gives_way(
    tmp_path: Path, left: int, capacity: int
) -> None:
    content = framed(KEYS[0], bytes([7]) * 2 * PAGE)
    path = Paths(str(tmp_path)).object(KEYS[0])
    async with backend(tmp_path, capacity=capacity) as files:
        whole = memoryview(mmap(-1, len(content)))
        whole[:] = content
        assert await files.put([Write(KEYS[0], (whole,))]) == [None]
        os.truncate(path, left)
        assert await files.put([Write(KEYS[0], (whole,))]) == [None]
        memory = page(pages=3)
        assert await files.get([Read(KEYS[0], (memory,))]) == [Hit(len(content))]
        assert bytes(memory) == content
        assert (files.objects, files.used_nbytes) == (1, len(content))


@pytest.mark.asyncio
@pytest.mark.parametrize("capacity", [0, 4 * PAGE])
@pytest.mark.parametrize("kind", ["zeros", "garbage", "a bit", "another object"])
async def test_a_file_of_the_right_size_that_does_not_begin_as_the_object_gives_way(
    tmp_path: Path, kind: str, capacity: int
) -> None:
    content = framed(KEYS[0], bytes([7]) * 2 * PAGE)
    damaged = bytearray(content)
    damaged[100] ^= 1
    found = {
        "zeros": bytes(len(content)),
        "garbage": b"x" * len(content),
        "a bit": bytes(damaged),
        "another object": framed(KEYS[1], bytes([7]) * 2 * PAGE),
    }
    path = Path(Paths(str(tmp_path)).object(KEYS[0]))
    async with backend(tmp_path, capacity=capacity) as files:
        whole = memoryview(mmap(-1, len(content)))
        whole[:] = content
        assert await files.put([Write(KEYS[0], (whole,))]) == [None]
        path.write_bytes(found[kind])
        assert await files.put([Write(KEYS[0], (whole,))]) == [None]
        memory = page(pages=3)
        assert await files.get([Read(KEYS[0], (memory,))]) == [Hit(len(content))]
        assert bytes(memory) == content
        assert (files.objects, files.used_nbytes) == (1, len(content))


@pytest.mark.asyncio
@pytest.mark.parametrize("is_running", [True, False])
async def test_a_cancelled_quarantine_hides_nothing_that_is_stored_later(
    tmp_path: Path, is_running: bool
) -> None:
    loop, inside, gate = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    real = os.rename

    def slow(source: str, target: str) -> None:
        loop.call_soon_threadsafe(inside.set)
        assert gate.wait(HANG)
        real(source, target)

    async with backend(tmp_path) as files:
        assert await files.put([Write(key, (page(1),)) for key in KEYS[:2]]) == [None] * 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rename", slow)
            task = asyncio.create_task(files.quarantine([Damaged(key) for key in KEYS[:2]]))
            if is_running:
                await asyncio.wait_for(inside.wait(), HANG)
            task.cancel()
            gate.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        moved = [not Path(Paths(str(tmp_path)).object(key)).exists() for key in KEYS[:2]]
        assert moved == [is_running] * 2
        assert files.objects == 2 - sum(moved)
        assert await files.put([Write(key, (page(2),)) for key in KEYS[:2]]) == [None] * 2
        assert await files.contains(KEYS[:2]) == [PAGE] * 2
        reads = [Read(key, (page(),)) for key in KEYS[:2]]
        assert await files.get(reads) == [Hit(PAGE)] * 2
        assert len(await listed(files)) == 2


@pytest.mark.asyncio
async def test_a_quarantine_leaves_what_was_written_anew(tmp_path: Path) -> None:
    """Another process has found the damage first and written the object again."""
    async with backend(tmp_path) as mine, backend(tmp_path) as other:
        await mine.put([Write(KEYS[0], (page(1),))])
        (read,) = await mine.get([Read(KEYS[0], (page(),))])
        assert isinstance(read, Hit)
        await other.quarantine([Damaged(KEYS[0])])
        await other.put([Write(KEYS[0], (page(2),))])
        assert await mine.quarantine([Damaged(KEYS[0], read.version)]) == [None]
        memory = page()
        assert await mine.get([Read(KEYS[0], (memory,))]) == [Hit(PAGE)]
        assert bytes(memory) == bytes([2]) * PAGE


@pytest.mark.asyncio
async def test_a_use_in_between_does_not_save_what_is_damaged(tmp_path: Path) -> None:
    async with backend(tmp_path) as mine, backend(tmp_path) as other:
        await mine.put([Write(KEYS[0], (page(1),))])
        (read,) = await mine.get([Read(KEYS[0], (page(),))])
        assert isinstance(read, Hit)
        await other.touch([KEYS[0]])
        await other.get([Read(KEYS[0], (page(),))])
        await mine.quarantine([Damaged(KEYS[0], read.version)])
        assert await mine.contains([KEYS[0]]) == [None]


# -- unfinished files -----------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSPC, errno.EMFILE])
async def test_nothing_is_begun_where_nobody_would_clear_it_away(tmp_path: Path, code: int) -> None:
    paths = Paths(str(tmp_path))
    async with backend(tmp_path) as files:
        for private in Path(paths.tmp).iterdir():
            (private / "lock").unlink()
            private.rmdir()
        with failing(code, lambda path: path.startswith(paths.tmp), "mkdir", "open"):
            for key in KEYS[:3]:
                (error,) = await files.put([Write(key, (page(),))])
                assert isinstance(error, BackendError)
        assert list(Path(paths.tmp).iterdir()) == []
        made: list[str] = []
        real = os.pwritev

        def looked(fd: int, *args: Any) -> int:
            made.append(os.readlink(f"/proc/self/fd/{fd}"))
            return real(fd, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwritev", looked)
            assert await files.put([Write(KEYS[0], (page(),))]) == [None]
        (private,) = Path(paths.tmp).iterdir()
        assert (private / "lock").exists()
        assert {os.path.dirname(path) for path in made} == {str(private)}


@pytest.mark.asyncio
async def test_whoever_opens_next_says_at_once_what_a_dead_process_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scratch = Scratch(Paths(str(tmp_path)))
    scratch.open()
    Path(scratch.file()).write_bytes(b"half")
    scratch.abandon()
    async with backend(tmp_path) as files:
        assert files.left_unfinished == 1
        assert "1 processes ended without closing; 1 objects were left unfinished" in caplog.text
        assert "not written" in caplog.text
    async with backend(tmp_path) as files:
        assert files.left_unfinished == 0


def test_what_a_dead_process_had_begun_is_counted(tmp_path: Path) -> None:
    paths = Paths(str(tmp_path))
    scratch = Scratch(paths)
    scratch.open()
    for _ in range(3):
        Path(scratch.file()).write_bytes(b"half")
    assert reap(paths) == (0, 0)  # it lives
    scratch.abandon()
    assert reap(paths) == (1, 3)
    assert list(Path(paths.tmp).iterdir()) == []
