"""``file://`` in one process: objects whole or absent, buffers untouched, nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import mmap
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hang import HANG

from kvlayer.abc.backend import Capability, Damaged, Hit, Listed, Miss, Read, Write
from kvlayer.errors import BackendError, ClosedError, ConfigError, ForkedError, PluginError
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.urls import BackendURL
from kvlayer_backends.file import FileBackend, FileOptions
from kvlayer_backends.file.paths import Paths, Shard

PAGE = 4096
NAMESPACE = "ab" * 32
PART = Part(0, (0, 4), (0, 8))


def key(number: int, *, namespace: str = NAMESPACE, zone: str = "0") -> ObjectKey:
    return ObjectName.raw(ObjectKey.of(namespace, zone, sha256(b"%d" % number).digest(), 16, PART))


def lent(nbytes: int, seed: int | None = None) -> memoryview:
    """Page-aligned memory, zero or random."""
    memory = memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]
    if seed is not None:
        memory[:] = random.Random(seed).randbytes(nbytes)
    return memory


@asynccontextmanager
async def opened(root: Path, **options: Any) -> AsyncIterator[FileBackend]:
    values: dict[str, Any] = {"interval": 3600.0, **options}
    async with FileBackend(str(root), FileOptions(**values), policy=PrefixLRU) as backend:
        await backend.recovered()  # from here on the janitor sleeps, unless a test wakes it
        yield backend


async def store(backend: FileBackend, number: int, nbytes: int = 2 * PAGE) -> bytes:
    memory = lent(nbytes, number)
    assert await backend.put([Write(key(number), (memory,))]) == [None]
    return bytes(memory)


async def load(backend: FileBackend, number: int, nbytes: int = 2 * PAGE) -> bytes | None:
    memory = lent(nbytes)
    (result,) = await backend.get([Read(key(number), (memory,))])
    if isinstance(result, Hit):
        return bytes(memory[: result.nbytes])
    assert isinstance(result, Miss), result
    return None


async def listed(backend: FileBackend, prefix: str = "") -> set[ObjectKey]:
    return {found.key async for found in backend.list(prefix)}


def path_of(root: Path, number: int) -> Path:
    return Path(Paths(str(root)).object(key(number)))


def files(root: Path) -> set[str]:
    """Every file but the locks."""
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    return {name for name in found if not name.endswith("lock")}


# -- objects -------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("direct", ["auto", "off"])
@pytest.mark.parametrize("left", [0, 1, PAGE - 1, PAGE, PAGE + 7, 3 * PAGE - 512])
async def test_a_truncated_object_reads_short(tmp_path: Path, direct: str, left: int) -> None:
    async with opened(tmp_path, direct=direct) as backend:
        whole = await store(backend, 1, 4 * PAGE)
        os.truncate(path_of(tmp_path, 1), left)
        assert await backend.contains([key(1)]) == [left]
        first, second, third = lent(PAGE), lent(2 * PAGE), lent(PAGE)
        assert await backend.get([Read(key(1), (first, second, third))]) == [Hit(left)]
        assert (bytes(first) + bytes(second) + bytes(third))[:left] == whole[:left]


@pytest.mark.asyncio
async def test_a_present_object_is_not_rewritten(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend:
        before = await store(backend, 1)
        inode = path_of(tmp_path, 1).stat().st_ino
        assert await backend.put([Write(key(1), (lent(2 * PAGE, 99),))]) == [None]
        assert path_of(tmp_path, 1).stat().st_ino == inode
        assert await load(backend, 1) == before


@pytest.mark.asyncio
@pytest.mark.parametrize("hard_links", [True, False])
async def test_the_first_of_two_writers_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    link, first = os.link, bytes(2 * PAGE)

    def beaten(source: str, target: str) -> None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(first)
        if not hard_links:
            raise OSError(errno.EPERM, "no hard links here")
        link(source, target)

    async with opened(tmp_path) as backend:
        monkeypatch.setattr(os, "link", beaten)
        await store(backend, 1)
        assert await load(backend, 1) == first
        assert backend.objects == 1 and backend.used_nbytes == 2 * PAGE  # the other one's
        assert files(tmp_path) == {str(path_of(tmp_path, 1).relative_to(tmp_path))}


@pytest.mark.asyncio
async def test_a_filesystem_without_hard_links_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, f"no hard links: {source} {target}")

    monkeypatch.setattr(os, "link", refuse)
    async with opened(tmp_path) as backend:
        Path(Paths(str(tmp_path)).shard(Shard.of(key(1)))).mkdir(parents=True)
        assert await store(backend, 1) == await load(backend, 1)
        assert len(files(tmp_path)) == 1


@pytest.mark.asyncio
async def test_memory_that_is_not_aligned_goes_through_the_page_cache(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend:
        odd = memoryview(random.Random(5).randbytes(3 * PAGE + 11))[5:]
        assert await backend.put([Write(key(1), (odd,))]) == [None]
        crooked = memoryview(bytearray(2 * PAGE + 3))[3:]
        assert await backend.put([Write(key(2), (crooked,))]) == [None]
        back = memoryview(bytearray(4 * PAGE + 1))[1:]
        assert await backend.get([Read(key(1), (back,))]) == [Hit(odd.nbytes)]
        assert back[: odd.nbytes] == odd


@pytest.mark.asyncio
async def test_an_empty_object_is_a_hit_of_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend:
        assert await backend.put([Write(key(1), ())]) == [None]
        assert await backend.contains([key(1)]) == [0]
        assert await backend.get([Read(key(1), (lent(PAGE),))]) == [Hit(0)]


@pytest.mark.asyncio
async def test_deleting_what_is_missing_is_fine(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend:
        await store(backend, 1)
        await backend.delete([key(2), key(1), key(1)])
        assert await load(backend, 1) is None
        assert backend.objects == 0 and backend.used_nbytes == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "bad", ["../../etc/passwd", "", "a/b/c/d", f"{NAMESPACE}/../00/x", f"{key(1)}~", f"{key(1)}.."]
)
async def test_what_is_no_key_names_no_file(tmp_path: Path, bad: str) -> None:
    async with opened(tmp_path) as backend:
        odd = ObjectKey(bad)
        (error,) = await backend.put([Write(odd, (lent(PAGE),))])
        assert isinstance(error, BackendError) and error.hint
        assert await backend.get([Read(odd, (lent(PAGE),))]) == [Miss()]
        assert await backend.contains([odd]) == [None]
        await backend.delete([odd])
        await backend.touch([odd])
        await backend.quarantine([Damaged(odd)])
    assert files(tmp_path) == set()


@pytest.mark.asyncio
async def test_a_durable_put_syncs_the_file_before_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", fsync)
    async with opened(tmp_path) as backend:
        await store(backend, 1)
        assert synced == []
    async with opened(tmp_path, fsync=True) as backend:
        await store(backend, 2)
        assert synced[0].endswith(".part")
        assert synced[-1] == str(path_of(tmp_path, 2).parent)


def test_keys_and_file_names_are_each_others_inverse() -> None:
    paths = Paths("/kv")
    parts = (PART, Part(1, (0, 2), None), Part(0, (0, 1), (3, 4), "native:vllm:isa_a-1"))
    for n, part in enumerate(parts):
        made = ObjectName.raw(
            ObjectKey.of(NAMESPACE, "0f" * 16, sha256(b"%d" % n).digest(), 16, part)
        )
        path = Path(paths.object(made))
        shard = Shard(path.parent.parent.name, path.parent.name)
        assert paths.key(shard, path.name) == made and shard == Shard.of(made)
        assert paths.key(Shard(NAMESPACE, "zz"), path.name) is None
        for name in (path.name + "~", "x" + path.name, path.name[1:], ".hidden", "0.1"):
            assert paths.key(shard, name) is None


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("code", "word"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "I/O errors"),
        (errno.EDQUOT, "quota"),
    ],
)
async def test_a_failed_write_is_a_value_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, word: str
) -> None:
    pwritev = os.pwritev

    def failing(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if sum(b.nbytes for b in buffers) < 3 * PAGE:
            return pwritev(fd, buffers, offset)
        if offset == 0:
            return pwritev(fd, [buffers[0][:PAGE]], 0)
        raise OSError(code, os.strerror(code))

    async with opened(tmp_path) as backend:
        monkeypatch.setattr(os, "pwritev", failing)
        big = Write(key(1), (lent(8 * PAGE, 1),))
        small = Write(key(2), (lent(PAGE, 2),))
        error, fine = await backend.put([big, small])
        assert isinstance(error, BackendError) and word in (error.hint or "")
        assert str(path_of(tmp_path, 1)) in str(error)
        assert fine is None
        assert await backend.contains([key(1), key(2)]) == [None, PAGE]
        assert len(files(tmp_path)) == 1
        assert backend.used_nbytes == PAGE


@pytest.mark.asyncio
async def test_no_file_descriptors_left_is_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as backend:
        await store(backend, 1)

        def exhausted(*_: object, **__: object) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", exhausted)
            (read,) = await backend.get([Read(key(1), (lent(PAGE),))])
            (written,) = await backend.put([Write(key(2), (lent(PAGE),))])
        for error in (read, written):
            assert isinstance(error, BackendError) and error.transient
            assert "ulimit -n" in (error.hint or "")
        assert len(files(tmp_path)) == 1


@pytest.mark.asyncio
async def test_contains_raises_when_it_cannot_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as backend:

        def denied(path: str) -> os.stat_result:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "lstat", denied)
            (error,) = await backend.contains([key(1)])
        assert isinstance(error, BackendError) and "EACCES" in str(error)
        assert "permission" in (error.hint or "")


@pytest.mark.asyncio
async def test_a_directory_that_cannot_be_made_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    backend = FileBackend(str(tmp_path / "file" / "kv"), policy=PrefixLRU)
    threads = set(threading.enumerate())
    with pytest.raises(BackendError) as caught:
        await backend.open()
    assert str(tmp_path / "file" / "kv") in str(caught.value) and caught.value.hint
    assert set(threading.enumerate()) <= threads
    (tmp_path / "file").unlink()
    async with backend:  # what was in the way is gone: the same backend opens
        assert await store(backend, 1)


@pytest.mark.asyncio
async def test_direct_on_fails_where_the_filesystem_refuses_it_and_auto_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        fd = opener(path, flags & ~os.O_DIRECT, mode)
        if flags & os.O_DIRECT:  # like kernels that create the file first
            os.close(fd)
            raise OSError(errno.EINVAL, "Invalid argument")
        return fd

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(BackendError, match="O_DIRECT"):
        async with opened(tmp_path, direct="on"):
            pass
    async with opened(tmp_path, direct="auto") as backend:
        assert await store(backend, 1) == await load(backend, 1)
    assert len(files(tmp_path)) == 1
    assert not list((tmp_path / "v2" / "tmp").iterdir())
    async with opened(
        tmp_path, readonly=True
    ) as reader:  # cannot probe, so it tries and falls back
        assert await load(reader, 1)


# -- read-only -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_read_only_directory_serves_and_is_not_changed(tmp_path: Path) -> None:
    async with opened(tmp_path) as writer:
        before = await store(writer, 1)

    def state() -> dict[Path, tuple[int, int]]:
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}

    untouched = state()
    async with opened(tmp_path, readonly=True) as reader:
        assert await load(reader, 1) == before
        assert await listed(reader) == {key(1)}
        (error,) = await reader.put([Write(key(2), (lent(PAGE),))])
        assert isinstance(error, BackendError) and "readonly" in str(error)
        (error,) = await reader.delete([key(1)])
        assert isinstance(error, BackendError) and "readonly" in str(error)
        await reader.touch([key(1)])
        assert not reader.is_janitor
        await reader.recovered()
        # Out of sight here; the evidence is somebody else's.
        await reader.quarantine([Damaged(key(1))])
        assert await load(reader, 1) is None
        assert await reader.contains([key(1)]) == [None]
        assert await listed(reader) == set()
    assert state() == untouched


@pytest.mark.asyncio
async def test_a_read_only_directory_must_exist(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="nowhere"):
        async with opened(tmp_path / "nowhere", readonly=True):
            pass
    assert not (tmp_path / "nowhere").exists()


# -- cancellation --------------------------------------------------------------------------------


class Gate:
    """Stands in for a system call: says when a thread is in it and holds it until let go."""

    def __init__(self, call: Callable[..., int]) -> None:
        self.call = call
        self.loop = asyncio.get_running_loop()
        self.entered = asyncio.Event()
        self.let_go = threading.Event()
        self.inside = 0

    def __call__(self, *args: Any) -> int:
        self.inside += 1
        self.loop.call_soon_threadsafe(self.entered.set)
        assert self.let_go.wait(HANG)
        try:
            return self.call(*args)
        finally:
            self.inside -= 1


async def _cancel_inside(task: asyncio.Task[Any], gate: Gate) -> None:
    await asyncio.wait_for(gate.entered.wait(), HANG)
    for _ in range(3):
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done(), "returned while a thread still used the buffers"
    gate.let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.inside == 0


@pytest.mark.asyncio
@pytest.mark.parametrize("count", [1, 6])
async def test_a_cancelled_put_leaves_every_object_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    async with opened(tmp_path, threads=2, capacity=100 * PAGE) as backend:
        gate = Gate(os.pwritev)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", gate)
            writes = [Write(key(n), (lent(2 * PAGE, n),)) for n in range(count)]
            await _cancel_inside(asyncio.create_task(backend.put(writes)), gate)
        there = 0
        for n in range(count):
            found = await load(backend, n)
            assert found in (None, random.Random(n).randbytes(2 * PAGE))
            there += found is not None
        assert there <= 2  # what had not started never ran
        assert len(files(tmp_path)) == there == backend.objects
        assert backend.used_nbytes == there * 2 * PAGE


@pytest.mark.asyncio
async def test_a_cancelled_get_returns_once_its_buffer_is_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, threads=2) as backend:
        await store(backend, 1)
        gate = Gate(os.preadv)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", gate)
            buffers = [lent(2 * PAGE) for _ in range(5)]
            reads = [Read(key(1), (buffer,)) for buffer in buffers]
            await _cancel_inside(asyncio.create_task(backend.get(reads)), gate)
            left = [bytes(buffer) for buffer in buffers]
    # Every thread has ended: none has written into a buffer that was given back.
    assert [bytes(buffer) for buffer in buffers] == left


@pytest.mark.asyncio
async def test_no_reference_to_lent_memory_outlives_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.ENOSPC, f"{fd} {len(buffers)} {offset}")

    gc.collect()
    gc.disable()
    kept: list[object] = []  # results outlive the memory they speak of
    try:
        async with opened(tmp_path) as backend:
            memory = mmap.mmap(-1, 2 * PAGE)
            view = memoryview(memory)
            kept += await backend.put([Write(key(1), (view,)), Write(ObjectKey("x"), (view,))])
            os.truncate(path_of(tmp_path, 1), 100)
            kept += await backend.get([Read(key(1), (view,)), Read(key(9), (view,))])
            monkeypatch.setattr(os, "pwritev", full)
            kept += await backend.put([Write(key(2), (view,))])
            view.release()
            memory.close()  # BufferError while anything still exports it
    finally:
        gc.enable()
    assert [type(one).__name__ for one in kept] == [
        "NoneType",
        "BackendError",
        "Hit",
        "Miss",
        "BackendError",
    ]


# -- life ----------------------------------------------------------------------------------------


def _descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue
    return found


@pytest.mark.asyncio
async def test_closing_leaves_no_thread_no_descriptor_and_no_private_directory(
    tmp_path: Path,
) -> None:
    await asyncio.to_thread(int)  # the loop's own executor is not ours
    threads, descriptors = set(threading.enumerate()), _descriptors()
    backend = FileBackend(str(tmp_path), FileOptions(interval=3600.0), policy=PrefixLRU)
    await backend.open()
    await backend.open()
    for number in range(20):
        await store(backend, number)
        await load(backend, number)
    await backend.quarantine([Damaged(key(0))])
    await listed(backend)
    await backend.aclose()
    await backend.aclose()
    assert set(threading.enumerate()) <= threads
    assert _descriptors() <= descriptors
    assert not list((tmp_path / "v2" / "tmp").iterdir())
    async with opened(tmp_path) as second:
        assert second.is_janitor  # the lock was let go
    for call in (
        backend.get([Read(key(1), (lent(PAGE),))]),
        backend.put([]),
        backend.contains([]),
        backend.delete([]),
        backend.touch([]),
        backend.quarantine([]),
        backend.open(),
        anext(backend.list()),
    ):
        with pytest.raises(ClosedError):
            await call


@pytest.mark.asyncio
async def test_closing_waits_for_running_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as backend:
        gate = Gate(os.pwritev)
        monkeypatch.setattr(os, "pwritev", gate)
        put = asyncio.create_task(backend.put([Write(key(1), (lent(PAGE, 1),))]))
        await asyncio.wait_for(gate.entered.wait(), HANG)
        closing = asyncio.create_task(backend.aclose())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not closing.done()
        gate.let_go.set()
        await closing
        assert put.done() and put.result() == [None]


@pytest.mark.asyncio
async def test_a_cancelled_open_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FileBackend(str(tmp_path), policy=PrefixLRU)
    gate = Gate(os.pwritev)  # the probe for O_DIRECT
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", gate)
        opening = asyncio.create_task(backend.open())
        await asyncio.wait_for(gate.entered.wait(), HANG)
        (thread,) = (t for t in threading.enumerate() if t.name.startswith("kvlayer-file-meta"))
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening  # at once: nothing was lent to the thread, which may hang for ever
        assert gate.inside == 1
        gate.let_go.set()
        thread.join(HANG)  # and gives back what it got
    assert not list((tmp_path / "v2" / "tmp").iterdir())
    async with opened(tmp_path) as other:
        assert other.is_janitor


@pytest.mark.asyncio
async def test_a_forked_child_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as backend:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(ForkedError):
                await backend.contains([key(1)])
            await backend.aclose()  # the parent's files and threads stay
        assert await store(backend, 1)


@pytest.mark.asyncio
async def test_a_directory_deleted_while_running_is_misses_and_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "kv"
    async with opened(root) as backend:
        await store(backend, 1)
        os.rename(root, tmp_path / "gone")
        assert await load(backend, 1) is None
        assert await backend.contains([key(1)]) == [None]
        assert await listed(backend) == set()
        await backend.touch([key(1)])
        await backend.delete([key(1)])
        await backend.quarantine([Damaged(key(1))])
        assert await store(backend, 2) == await load(backend, 2)
        assert backend.janitor is not None
        await backend.janitor.pass_()
        assert backend.is_janitor and backend.objects == 1
    assert not list((root / "v2" / "tmp").iterdir())


# -- listing and quarantine ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_listing_shows_objects_and_nothing_else(tmp_path: Path) -> None:
    other = "cd" * 32
    async with opened(tmp_path) as backend:
        await store(backend, 1)
        there = Write(key(2, namespace=other, zone="0f" * 16), (lent(PAGE),))
        assert await backend.put([there]) == [None]
        shard = path_of(tmp_path, 1).parent
        (shard / "README").write_text("not an object")
        (shard / (path_of(tmp_path, 1).name + "~")).write_text("not an object")
        (shard / path_of(tmp_path, 1).name.replace("g0", "g9")).mkdir()
        (tmp_path / "v2" / "other").mkdir()
        assert await listed(backend) == {key(1), there.key}
        assert await listed(backend, other) == {there.key}
        assert await listed(backend, str(key(1))[:80]) == {key(1)}
        assert await listed(backend, "ff") == set()
        (found,) = [one async for one in backend.list(NAMESPACE)]
        assert found == Listed(key(1), 2 * PAGE, found.used)
        assert found.used == pytest.approx(path_of(tmp_path, 1).stat().st_mtime)
        assert Capability.LIST in backend.capabilities


@pytest.mark.asyncio
async def test_an_abandoned_listing_does_not_hold_up_closing(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend:
        for n in range(3):
            await store(backend, n)
        listing = backend.list()
        await anext(listing)
        await asyncio.wait_for(backend.aclose(), HANG)
        with pytest.raises(ClosedError):
            assert [one async for one in listing] == []


@pytest.mark.asyncio
async def test_a_quarantined_object_is_never_offered_again_and_stays_readable(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as backend:
        damaged = await store(backend, 1)
        await backend.quarantine([Damaged(key(1)), Damaged(key(2))])
        assert await load(backend, 1) is None
        assert await backend.contains([key(1)]) == [None]
        assert await listed(backend) == set()
        aside = tmp_path / "v2" / "quarantine"
        (kept,) = [p for p in aside.iterdir() if p.suffix != ".json"]
        assert kept.name.endswith(key(1).replace("/", "."))
        assert kept.read_bytes() == damaged
        facts = json.loads(kept.with_name(kept.name + ".json").read_text())
        assert facts["key"] == key(1) and facts["nbytes"] == 2 * PAGE
        assert backend.used_nbytes == 2 * PAGE and backend.objects == 0
        assert await store(backend, 1) == await load(backend, 1)


@pytest.mark.asyncio
async def test_only_the_newest_sixteen_stay_in_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**18, 10**18 + 10**12, 10**6))
    async with opened(tmp_path) as backend:
        for n in range(20):
            await store(backend, n)
        monkeypatch.setattr("time.time_ns", lambda: next(clock))
        for n in range(20):
            await backend.quarantine([Damaged(key(n))])
        names = sorted(p.name for p in (tmp_path / "v2" / "quarantine").iterdir())
        objects = [name for name in names if not name.endswith(".json")]
        assert len(objects) == 16 and len(names) == 32
        assert objects[0].endswith(key(4).replace("/", "."))
        assert backend.used_nbytes == 16 * 2 * PAGE


@pytest.mark.asyncio
async def test_damage_that_can_be_neither_moved_nor_deleted_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    async with opened(tmp_path) as backend:
        await store(backend, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refuse)
            patch.setattr(os, "unlink", refuse)
            await backend.quarantine([Damaged(key(1))])
        assert await load(backend, 1) is None
        assert await listed(backend) == set()
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refuse)
            (error,) = await backend.put([Write(key(1), (lent(2 * PAGE, 1),))])
            assert isinstance(error, BackendError) and "read-only" in (error.hint or "")
            assert await load(backend, 1) is None
        assert await store(backend, 1) == await load(backend, 1)  # it takes the damaged one's place
        assert backend.objects == 1 and backend.used_nbytes == 2 * PAGE


# -- URL -----------------------------------------------------------------------------------------


def test_a_url_says_everything() -> None:
    url = BackendURL.parse(
        "file:///mnt/kv?capacity=1TiB&policy=lru&threads=3&fsync=true&direct=off&readonly=yes&interval=.5"
    )
    backend = FileBackend.from_url(url)
    assert backend.root == "/mnt/kv"
    assert backend.options == FileOptions(1 << 40, "lru", 3, True, "off", True, 0.5)
    assert backend.capacity_nbytes == 1 << 40
    assert FileBackend.from_url(BackendURL.parse("file:///a%20b/")).root == "/a b"
    assert FileBackend("/kv").capacity_nbytes is None


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("file://mnt/kv", "three slashes"),
        ("file://", "three slashes"),
        ("file:///", "three slashes"),
        ("file:///kv?capcity=1GiB", "capacity"),
        ("file:///kv?threads=0", None),
        ("file:///kv?threads=many", "int"),
        ("file:///kv?direct=maybe", "auto"),
        ("file:///kv?interval=0", None),
        ("file:///kv?interval=nan", None),
        ("file:///kv?policy=", "prefix-lru"),
        ("file:///kv?capacity=big", "GiB"),
    ],
)
def test_a_wrong_url_is_refused_with_a_hint(url: str, word: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        FileBackend.from_url(BackendURL.parse(url))
    assert word is None or word in (caught.value.hint or "")


@pytest.mark.asyncio
async def test_an_unknown_policy_is_refused_at_open(tmp_path: Path) -> None:
    backend = FileBackend(str(tmp_path), FileOptions(policy="no-such-policy"))
    with pytest.raises(PluginError, match="the option 'policy' names no eviction policy"):
        await backend.open()
    await backend.aclose()


# -- a model -------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(6))
async def test_random_calls_match_a_dictionary(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    model: dict[int, bytes] = {}
    for _ in range(3):  # reopened twice
        direct = chance.choice(["auto", "off"])
        async with opened(tmp_path, threads=3, direct=direct) as backend:
            for _ in range(40):
                numbers = chance.choices(range(12), k=chance.randrange(1, 5))
                match chance.choice(["put", "get", "delete", "contains", "quarantine", "list"]):
                    case "put":
                        sizes = [(n % 4) * PAGE for n in numbers]
                        writes = [
                            Write(key(n), (lent(size, n),))
                            for n, size in zip(numbers, sizes, strict=True)
                        ]
                        assert await backend.put(writes) == [None] * len(writes)
                        model |= {
                            n: bytes(w.regions[0]) for n, w in zip(numbers, writes, strict=True)
                        }
                    case "get":
                        at = chance.randrange(3) * PAGE
                        reads = [Read(key(n), (lent(2 * PAGE),), at) for n in numbers]
                        results = await backend.get(reads)
                        for n, read, result in zip(numbers, reads, results, strict=True):
                            if n not in model:
                                assert result == Miss()
                            else:
                                expected = model[n][at : at + 2 * PAGE]
                                assert result == Hit(len(expected))
                                assert bytes(read.regions[0][: len(expected)]) == expected
                    case "delete" | "quarantine" as call:
                        kind = ObjectKey if call == "delete" else Damaged
                        items = [kind(key(n)) for n in numbers]
                        assert await getattr(backend, call)(items) == [None] * len(items)
                        for n in numbers:
                            model.pop(n, None)
                    case "contains":
                        sizes_now = await backend.contains([key(n) for n in numbers])
                        assert sizes_now == [len(model[n]) if n in model else None for n in numbers]
                    case _:
                        assert await listed(backend) == {key(n) for n in model}
                assert backend.objects == len(model)
