"""A batch is one job for one thread, or a few where it is large."""

from __future__ import annotations

import asyncio
import threading
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from hang import HANG

from kvlayer.abc.backend import Hit, Read, Write
from kvlayer.errors import BackendError, NoRoomError
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.runtime.offload import Offload
from kvlayer_backends.file import FileBackend, FileOptions
from kvlayer_backends.file.batches import spread

PAGE = 4096
PART = Part(0, (0, 4), (0, 8))


def key(number: int) -> ObjectKey:
    return ObjectName.raw(ObjectKey.of("ab" * 32, "0", sha256(b"%d" % number).digest(), 16, PART))


def write(number: int, pages: int = 1) -> Write:
    return Write(key(number), (memoryview(mmap(-1, pages * PAGE)),))


def backend(root: Path, **more: Any) -> FileBackend:
    return FileBackend(str(root), FileOptions(**{"interval": 3600.0, **more}))


class Jobs:
    """Counts what is handed to threads."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        submit = Offload._submit

        def counted(offload: Offload, call: Any) -> Any:
            self.count += 1
            return submit(offload, call)

        patch.setattr(Offload, "_submit", counted)

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.mark.asyncio
async def test_a_batch_of_small_objects_is_one_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with backend(tmp_path, capacity=1 << 30) as files:
        await files.recovered()
        assert files.janitor is not None
        await files.janitor.pass_()
        jobs = Jobs(monkeypatch)
        assert await files.put([write(n) for n in range(16)]) == [None] * 16
        assert jobs.taken() == 1
        memory = [memoryview(mmap(-1, PAGE)) for _ in range(16)]
        landed: list[int] = []
        found = await files.get(
            [
                Read(key(n), (m,), landed=lambda _: landed.append(threading.get_ident()))
                for n, m in enumerate(memory)
            ]
        )
        assert all(isinstance(each, Hit) for each in found)
        assert jobs.taken() == 1
        assert len(landed) == 16 and set(landed) != {threading.get_ident()}


@pytest.mark.asyncio
async def test_a_full_directory_makes_room_for_a_batch_in_two_jobs_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One looks at what is there, one evicts for all of it, one writes."""
    async with backend(tmp_path, capacity=32 * PAGE) as files:
        await files.recovered()
        assert files.janitor is not None
        await files.janitor.pass_()
        await files.put([write(n) for n in range(32)])
        jobs = Jobs(monkeypatch)
        assert await files.put([write(n) for n in range(100, 116)]) == [None] * 16
        assert jobs.taken() == 3
        assert files.used_nbytes == 32 * PAGE


@pytest.mark.asyncio
async def test_large_objects_go_side_by_side() -> None:
    pool = Offload(4, "test")
    together = threading.Barrier(3)

    def work(some: Any) -> None:
        for _ in some:
            together.wait(HANG)

    await spread(pool, work, [(n, 1 << 20) for n in range(3)])
    pool.close()


@pytest.mark.asyncio
async def test_a_cancelled_batch_begins_nothing_more() -> None:
    pool = Offload(1, "test")
    inside, let_go, done = threading.Event(), threading.Event(), list[int]()

    def work(some: Any) -> None:
        for number in some:
            inside.set()
            assert let_go.wait(HANG)
            done.append(number)

    task = asyncio.create_task(spread(pool, work, [(n, 1) for n in range(16)]))
    assert await asyncio.to_thread(inside.wait, HANG)
    task.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    let_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [0]
    pool.close()


@pytest.mark.asyncio
async def test_a_batch_answers_for_each_object(tmp_path: Path) -> None:
    """One that is larger than everything, one with no name, one that finds no room."""
    async with backend(tmp_path, capacity=4 * PAGE) as files:
        odd = Write(ObjectKey("x"), (memoryview(mmap(-1, PAGE)),))
        giant, plain = write(1, pages=5), [write(n) for n in range(2, 5)]
        answers = await files.put([giant, plain[0], odd, *plain[1:]])
        assert [answer is None for answer in answers] == [False, True, False, True, True]
        assert all(isinstance(answers[at], BackendError) for at in (0, 2))
        assert not isinstance(answers[0], NoRoomError)
        assert (await files.contains([w.key for w in plain])) == [PAGE] * 3
        assert files.used_nbytes == 3 * PAGE  # what was granted and not used is free again
