"""Every wait ends: locks after a fork, disks that freeze, threads that hang."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from hang import HANG

from kvlayer.abc.backend import Damaged, Read, Write
from kvlayer.errors import BackendError, ClosedError
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer_backends.file import FileBackend, FileOptions, disk
from kvlayer_backends.file.locks import FileLock
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.pulse import Pulse

PAGE = 4096
KEY = ObjectName.raw(ObjectKey.of("ab" * 32, "0", bytes(range(32)), 16, Part(0, (0, 4), (0, 8))))


def backend(root: Path, **more: Any) -> FileBackend:
    options = FileOptions(**{"interval": 3600.0, **more})
    return FileBackend(str(root), options, policy=PrefixLRU)


def page() -> memoryview:
    return memoryview(mmap(-1, PAGE))


# -- locks ----------------------------------------------------------------------------------------


def test_a_lock_on_a_file_that_others_no_longer_see_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last owner removes the file between our open and our flock."""
    flock = fcntl.flock

    def late(fd: int, how: int) -> None:
        if how & fcntl.LOCK_EX:
            (tmp_path / "lock").unlink(missing_ok=True)
        flock(fd, how)

    lock = FileLock(str(tmp_path / "lock"))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        assert not lock.acquire()
        assert not lock.held()
    assert lock.acquire() and lock.held()
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").touch()
    assert not lock.held()
    lock.release()


_OWNER = """
import os, signal, sys
from kvlayer_backends.file.locks import FileLock
lock = FileLock(sys.argv[1])
assert lock.acquire()
r, w = os.pipe()
child = os.fork()
if child == 0:
    os.write(w, b"x")
    os.close(1), os.close(2)
    signal.pause()
os.read(r, 1)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    owner = subprocess.run(
        [sys.executable, "-c", _OWNER, path],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG,
    )
    child = int(owner.stdout)
    try:
        assert owner.returncode == -signal.SIGKILL
        lock = FileLock(path)
        assert lock.acquire()
        os.kill(child, 0)  # it is alive all the same
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_taken_while_the_process_forks_is_given_up_and_not_kept_by_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread has opened the file, and the child got a copy that no lock knew of yet."""
    children: list[int] = []
    opener = disk.open_lock

    def forks(path: str) -> int:
        fd = opener(path)
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        children.append(child)
        return fd

    lock, other = FileLock(str(tmp_path / "lock")), FileLock(str(tmp_path / "lock"))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(disk, "open_lock", forks)
            assert not lock.acquire()
        assert other.acquire()
        other.release()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_releasing_unlocks_whoever_else_has_the_file_open(tmp_path: Path) -> None:
    lock, other = FileLock(str(tmp_path / "lock")), FileLock(str(tmp_path / "lock"))
    assert lock.acquire()
    assert lock._fd is not None
    copy = os.dup(lock._fd)  # as a child has that was forked by other means than ``os.fork``
    lock.release()
    assert other.acquire()
    other.release()
    os.close(copy)


@pytest.mark.asyncio
async def test_a_forked_child_that_ends_leaves_its_parent_in_office(tmp_path: Path) -> None:
    async with backend(tmp_path) as files:
        assert files.is_janitor
        child = os.fork()
        if child == 0:
            os._exit(0)
        await asyncio.to_thread(os.waitpid, child, 0)
        assert files.janitor is not None
        await files.janitor.pass_()
        assert files.is_janitor
        async with backend(tmp_path) as other:
            assert not other.is_janitor
            await files.janitor.pass_()
            assert len(list(Path(Paths(str(tmp_path)).tmp).iterdir())) == 2


# -- a frozen disk --------------------------------------------------------------------------------


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on the disk answers no change: a read moves no time of access."""

    def freeze() -> None:
        monkeypatch.setattr("kvlayer_backends.file.pulse._PATIENCE_SECONDS", 0.05)
        monkeypatch.setattr("kvlayer_backends.file.pulse._POLL_SECONDS", 0.001)
        monkeypatch.setattr(Pulse, "_beats", lambda _: False)
        for name in ("mkdir", "link", "rename", "unlink", "rmdir", "pwritev", "utime"):
            monkeypatch.setattr(os, name, lambda *_, **__: pytest.fail("hangs in the kernel"))

    return freeze


@pytest.mark.asyncio
async def test_a_frozen_disk_is_noticed_before_anything_is_changed(
    tmp_path: Path, frozen: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = backend(tmp_path)
    async with first as files:
        assert await files.put([Write(KEY, (page(),))]) == [None]
        await files.recovered()
        frozen()
        other = ObjectKey(str(KEY).replace("g0", "g1"))
        for answers in (
            await files.put([Write(other, (page(),))]),
            await files.delete([KEY]),
        ):
            (error,) = answers
            assert isinstance(error, BackendError) and error.transient, error
            assert "ETIMEDOUT" in str(error) and "fsfreeze" in (error.hint or "")
        (read,) = await files.get([Read(KEY, (page(),))])
        assert not isinstance(read, BackendError)  # reading goes on
        assert await files.contains([KEY]) == [PAGE]
        await files.touch([KEY])
        await files.describe("cd" * 32, b"x")
        assert files.janitor is not None
        with pytest.raises(OSError, match="frozen"):
            await files.janitor.pass_()
        assert files.objects == 1
        with pytest.raises(BackendError, match="ETIMEDOUT"):
            await backend(tmp_path).open()
    monkeypatch.undo()
    async with backend(tmp_path) as files:  # nothing of the first one is left but its folder
        assert files.is_janitor
        assert files.janitor is not None
        await files.janitor.pass_()
        assert len(list(Path(Paths(str(tmp_path)).tmp).iterdir())) == 1


def test_a_pulse_beats_where_reads_move_the_time_of_access(tmp_path: Path) -> None:
    (tmp_path / "file").touch(0o600)
    pulse = Pulse(str(tmp_path / "file"))
    pulse.begin()
    if not os.fstatvfs(pulse._fd).f_flag & os.ST_NOATIME:
        os.pread(pulse._fd, 1, 0)
        assert os.fstat(pulse._fd).st_atime_ns > 0
    for _ in range(3):
        pulse.check()
    pulse.close()
    Pulse(str(tmp_path / "nothing")).check()  # nothing is known yet


def test_a_pulse_lets_go_of_a_disk_that_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch(0o600)
    pulse = Pulse(str(tmp_path / "file"))
    pulse.begin()

    def dead(*_: object) -> bytes:
        raise OSError(errno.EIO, "dead")

    with monkeypatch.context() as patch:
        patch.setattr("os.pread", dead)
        pulse.check()  # whatever is changed now says what is wrong
    assert pulse._fd == -1
    pulse.check()
    assert pulse._fd >= 0  # what lies there now
    pulse.close()


# -- threads that hang ----------------------------------------------------------------------------


class Hanging:
    """A system call that does not return until it is let go."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.inside = threading.Event()
        self.let_go = threading.Event()
        self.real = getattr(os, name)
        patch.setattr(os, name, self)

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.inside.set()
        assert self.let_go.wait(HANG)
        return self.real(*args, **more)

    async def entered(self) -> None:
        assert await asyncio.to_thread(self.inside.wait, HANG)


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ["pwritev", "preadv", "lstat", "unlink", "listdir"])
async def test_closing_that_is_cancelled_leaves_a_thread_that_hangs_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    files = backend(tmp_path)
    await files.open()
    await files.put([Write(KEY, (page(),))])
    await files.recovered()
    assert files.janitor is not None
    await files.janitor.pass_()
    hanging = Hanging(call, monkeypatch)
    other = ObjectKey(str(KEY).replace("g0", "g1"))
    work: dict[str, Callable[[], Any]] = {
        "pwritev": lambda: files.put([Write(other, (page(),))]),
        "preadv": lambda: files.get([Read(KEY, (page(),))]),
        "lstat": lambda: files.contains([KEY]),
        "unlink": lambda: files.delete([KEY]),
        "listdir": files.janitor.pass_,
    }
    running = asyncio.ensure_future(work[call]())
    await hanging.entered()
    running.cancel()
    await asyncio.sleep(0)
    closing = asyncio.create_task(files.aclose())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not closing.done()
    closing.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait_for(closing, HANG)
    with pytest.raises((asyncio.CancelledError, ClosedError)):
        await asyncio.wait_for(running, HANG)  # who waited for the thread is free, too
    assert "threads are left behind" in caplog.text
    await files.aclose()
    monkeypatch.undo()
    hanging.let_go.set()
    async with backend(tmp_path) as second:
        assert second.is_janitor  # the lock was given back


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file left open
async def test_notes_that_hang_hold_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk froze in the very moment: objects are moved, lookups answered, and closing ends."""
    others = [ObjectKey(str(KEY).replace("g0", f"g{n}")) for n in range(1, 4)]
    files = backend(tmp_path)
    await files.open()
    await files.put([Write(key, (page(),)) for key in (KEY, *others)])
    await files.recovered()
    inside, let_go, create = threading.Event(), threading.Event(), disk.create

    def hangs(path: str, flags: int = 0) -> int:
        if "/quarantine/" in path:
            inside.set()
            assert let_go.wait(HANG)
        return create(path, flags)

    monkeypatch.setattr(disk, "create", hangs)
    taking = [asyncio.create_task(files.quarantine([Damaged(key)])) for key in others]
    assert await asyncio.to_thread(inside.wait, HANG)
    assert await asyncio.wait_for(files.contains([KEY, *others]), HANG) == [4096, None, None, None]
    for task in taking:
        task.cancel()
    for task in taking:
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, HANG)
    closing = asyncio.create_task(files.aclose())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not closing.done()  # a note is worth waiting for, within its owner's patience
    closing.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait_for(closing, HANG)
    assert "1 threads are left behind" in caplog.text
    left = [each for each in threading.enumerate() if each.name.startswith("kvlayer-file-notes")]
    let_go.set()
    for thread in left:  # the file that it leaves open is this test's, not the next one's
        await asyncio.to_thread(thread.join, HANG)
        assert not thread.is_alive()


@pytest.mark.asyncio
async def test_notes_begun_before_a_call_was_cancelled_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with backend(tmp_path) as files:
        await files.put([Write(KEY, (page(),))])
        inside, let_go, create = threading.Event(), threading.Event(), disk.create

        def waits(path: str, flags: int = 0) -> int:
            inside.set()
            assert let_go.wait(HANG)
            return create(path, flags)

        monkeypatch.setattr(disk, "create", waits)
        taking = asyncio.create_task(files.quarantine([Damaged(KEY)]))
        assert await asyncio.to_thread(inside.wait, HANG)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        let_go.set()
    (note,) = (tmp_path / "v2" / "quarantine").glob("*.json")
    assert json.loads(note.read_bytes())["key"] == KEY


@pytest.mark.asyncio
async def test_a_note_without_its_object_is_cleared_away(tmp_path: Path) -> None:
    async with backend(tmp_path) as files:
        await files.put([Write(KEY, (page(),))])
        await files.quarantine([Damaged(KEY)])
        (tmp_path / "v2" / "quarantine" / "gone.json").touch()
        assert files.janitor is not None
        await files.janitor.pass_()
    names = sorted(path.name for path in (tmp_path / "v2" / "quarantine").iterdir())
    assert len(names) == 2 and names[1] == names[0] + ".json"


@pytest.mark.asyncio
@pytest.mark.parametrize("call", ["lstat", "mkdir", "pwritev"])
async def test_an_open_that_hangs_is_cancelled_at_once_and_gives_back_what_it_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    hanging = Hanging(call, monkeypatch)
    opening = asyncio.create_task(backend(tmp_path).open())
    await hanging.entered()
    (thread,) = (t for t in threading.enumerate() if t.name.startswith("kvlayer-file-meta"))
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert thread.is_alive()
    hanging.let_go.set()
    await asyncio.to_thread(thread.join, 30)
    monkeypatch.undo()
    assert list(Path(Paths(str(tmp_path)).tmp).iterdir()) == []
    async with backend(tmp_path) as files:
        assert files.is_janitor


def test_every_error_of_the_system_that_may_pass_is_transient() -> None:
    from kvlayer_backends.file.faults import explain

    assert explain(OSError(errno.ETIMEDOUT, "x"), "write", "y").transient
    assert not explain(OSError(errno.EACCES, "x"), "write", "y").transient


@pytest.mark.asyncio
async def test_where_reads_move_no_time_nothing_is_taken_for_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system answers a read from the client's memory: its server sees none."""
    pread = os.pread

    def unseen(fd: int, nbytes: int, offset: int) -> bytes:
        before = os.fstat(fd)
        read = pread(fd, nbytes, offset)
        os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        return read

    monkeypatch.setattr("kvlayer_backends.file.pulse._PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("kvlayer_backends.file.pulse.os.pread", unseen)
    for number in range(2):  # the second finds what the first has left
        async with FileBackend(str(tmp_path), FileOptions(interval=3600.0)) as files:
            for again in range(3):
                end = bytes([number, again]) * 16
                key = ObjectName.raw(ObjectKey.of("ab" * 32, "0", end, 16, Part(0, (0, 4), (0, 8))))
                assert await files.put([Write(key, (page(),))]) == [None]


def test_who_only_looks_sets_no_time_back(tmp_path: Path) -> None:
    """Before anything was changed nobody knows whether a read tells: the next may believe it."""
    path = tmp_path / "file"
    path.touch(mode=0o600)
    pulse = Pulse(str(path))
    pulse.check()
    pulse.check()
    assert path.stat().st_atime_ns > 0
    pulse.close()
