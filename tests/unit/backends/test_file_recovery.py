"""A directory that is already well filled: one scan, writes meanwhile, and nothing that grows."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from hang import HANG
from sparse import fill

from kvlayer.abc.backend import Write, WriteResult
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer_backends.file import FileBackend, FileOptions
from kvlayer_backends.file.descriptions import NAME
from kvlayer_backends.file.ledger import Ledger
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.scan import Scan

PAGE = 4096
SPACE = "ab" * 32
PART = Part(0, (0, 4), (0, 8))


def key(number: int) -> ObjectKey:
    return ObjectName.raw(ObjectKey.of(SPACE, "0", sha256(b"%d" % number).digest(), 16, PART))


@asynccontextmanager
async def opened(root: Path, **more: Any) -> AsyncIterator[FileBackend]:
    options = FileOptions(**{"interval": 3600.0, **more})
    async with FileBackend(str(root), options, policy=PrefixLRU) as backend:
        yield backend


async def put(backend: FileBackend, *numbers: int) -> list[WriteResult]:
    memory = memoryview(mmap(-1, PAGE))
    return await backend.put([Write(key(n), (memory,)) for n in numbers])


class Held:
    """A scan that does not begin until it is let go."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.let_go = threading.Event()
        more = Scan.more

        def held(scan: Scan, count: int) -> Any:
            assert self.let_go.wait(HANG)
            return more(scan, count)

        patch.setattr(Scan, "more", held)


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["closed", "killed"])
async def test_writes_are_granted_against_what_the_last_janitor_had_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async with opened(tmp_path, capacity=48 * PAGE) as backend:
        await put(backend, *range(40))
        if how == "killed":  # what it noted at the end of its last pass is all it left
            assert backend.janitor is not None
            await backend.janitor.pass_()
            noted = (tmp_path / "v2" / "janitor.lock").read_bytes()
            await put(backend, 40, 41)
    if how == "killed":
        (tmp_path / "v2" / "janitor.lock").write_bytes(noted)
    held = Held(monkeypatch)
    async with opened(tmp_path, capacity=48 * PAGE) as backend:
        assert backend.used_nbytes == 40 * PAGE
        new = range(100, 111)  # 8 fit, 3 more are a sixteenth of the capacity
        for number in new:
            assert await asyncio.wait_for(put(backend, number), HANG) == [None]
        waiting = asyncio.create_task(put(backend, 111))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not waiting.done()
        held.let_go.set()
        assert await waiting == [None]
        await backend.recovered()
        assert backend.used_nbytes <= 48 * PAGE
        assert backend.janitor is not None
        await backend.janitor.pass_()
        there = [path for path in (tmp_path / "v2").glob("*/??/*") if path.is_file()]
        assert len(there) == backend.objects == 48
        # The oldest went.
        assert await backend.contains([key(n) for n in new]) == [PAGE] * len(new)


@pytest.mark.asyncio
async def test_what_is_being_found_goes_before_what_was_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is made between the moment others' objects are found and that they are in order."""
    async with opened(tmp_path, capacity=4 * PAGE) as backend, opened(tmp_path) as other:
        await backend.recovered()
        janitor = backend.janitor
        assert janitor is not None
        await put(other, 0, 1)
        held = Held(monkeypatch)
        sorting, may_sort = threading.Event(), threading.Event()
        by_use = Ledger.by_use

        def slow(ledger: Ledger) -> Iterator[tuple[int, int, int]]:
            used = by_use(ledger)
            sorting.set()
            assert may_sort.wait(HANG)
            yield from used

        monkeypatch.setattr(Ledger, "by_use", slow)
        passing = asyncio.create_task(janitor.pass_())
        await asyncio.sleep(0)
        assert await put(backend, 10, 11) == [None] * 2
        held.let_go.set()
        assert await asyncio.to_thread(sorting.wait, HANG)
        storing = asyncio.create_task(put(backend, 12))
        for _ in range(100):
            await asyncio.sleep(0)
        may_sort.set()
        assert await storing == [None]
        await passing
        assert await backend.contains([key(n) for n in (10, 11, 12)]) == [PAGE] * 3
        assert (await backend.contains([key(0), key(1)])).count(PAGE) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("note", [b"", b"x", b"-5", b"9" * 30, b"1e3", b"\xff" * 20])
async def test_a_note_that_is_nonsense_is_none(tmp_path: Path, note: bytes) -> None:
    async with opened(tmp_path, capacity=8 * PAGE) as backend:
        await put(backend, 1)
    (tmp_path / "v2" / "janitor.lock").write_bytes(note)
    async with opened(tmp_path, capacity=8 * PAGE) as backend:
        assert await put(backend, 2) == [None]
        await backend.recovered()
        assert backend.used_nbytes == 2 * PAGE


@pytest.mark.asyncio
async def test_a_directory_is_listed_in_one_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 300)
    for shard in (tmp_path / "v2").glob("*/??"):
        os.utime(shard, (1, 1))
    looked: list[str] = []
    lstat = os.lstat

    def counted(path: str) -> os.stat_result:
        looked.append(str(path))
        return lstat(path)

    monkeypatch.setattr(os, "lstat", counted)
    async with opened(tmp_path) as backend:
        found = [listed.key async for listed in backend.list()]
        found += [listed.key async for listed in backend.list()]
        assert len(found) == 2 * len(set(found)) == 600
        objects = [path for path in looked if ".canonical" in path]
        assert len(objects) == len(set(objects)) == 300  # each was looked at once


@pytest.mark.asyncio
async def test_a_listing_shows_what_another_process_wrote_just_now(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend, opened(tmp_path) as other:
        await backend.recovered()
        await put(other, 1)
        for each in (backend, other):
            assert [listed.key async for listed in each.list()] == [key(1)]


@pytest.mark.asyncio
async def test_evicting_much_goes_in_slices_and_lets_writes_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 1500, nbytes=PAGE)
    async with opened(tmp_path, capacity=2000 * PAGE) as backend:
        await backend.recovered()
        janitor = backend.janitor
        assert janitor is not None and janitor.ledger is not None
        assert backend.objects == 1500
        slices: list[int] = []
        backend.on_evicted = lambda gone, _: slices.append(len(gone))
        janitor.ledger.capacity = 100 * PAGE
        asked = asyncio.create_task(janitor.pass_())
        written = await put(backend, *range(5))
        await asked
        assert written == [None] * 5
        assert backend.used_nbytes == 100 * PAGE
        assert max(slices) <= 256 and sum(slices) == 1405


def test_what_became_of_victims_is_added_up_once() -> None:
    from kvlayer_backends.file.victims import Eviction, Victim

    eviction = Eviction()
    for number in range(4):
        (eviction.go if number % 2 else eviction.lose)(Victim(key(number), 10, 0, number))
    assert eviction.freed_nbytes == 40


@pytest.mark.asyncio
async def test_what_is_listed_is_nothing_the_garbage_collector_walks(tmp_path: Path) -> None:
    fill(tmp_path, 3000)
    async with opened(tmp_path) as backend:
        await backend.recovered()
        gc.collect()
        before = len(gc.get_objects())
        assert backend.objects == 3000
    empty = tmp_path / "empty"
    async with opened(empty) as backend:
        await backend.recovered()
        gc.collect()
        assert before - len(gc.get_objects()) < 1500  # shards, not objects


# -- folders that hold nothing --------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_namespace_that_holds_nothing_any_more_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "v2" / SPACE
    async with opened(tmp_path) as backend:
        assert backend.janitor is not None
        await backend.describe(SPACE, b"what it is")
        await backend.janitor.pass_()
        assert (folder / NAME).exists()  # nothing was stored yet: it may be about to
        await put(backend, *range(20))
        await backend.delete([key(n) for n in range(1, 20)])
        await backend.janitor.pass_()
        assert [path.name for path in folder.iterdir() if path.is_dir()] == [
            Path(Paths(str(tmp_path)).object(key(0))).parent.name
        ]
        await backend.delete([key(0)])
        await backend.janitor.pass_()
        assert not folder.exists()
        await put(backend, 3)
        assert (folder / NAME).read_bytes() == b"what it is"  # it came back with its description
        assert backend.objects == 1


@pytest.mark.asyncio
async def test_a_namespace_in_which_nothing_was_ever_stored_vanishes_after_an_hour(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "v2" / SPACE
    async with opened(tmp_path) as backend:
        assert backend.janitor is not None
        await backend.describe(SPACE, b"x")
        (folder / "someone's").touch()
        os.utime(folder, (1, 1))
        await backend.janitor.pass_()
        assert (folder / NAME).exists()
        (folder / "someone's").unlink()
        os.utime(folder, (1, 1))
        await backend.janitor.pass_()
        assert not folder.exists()


@pytest.mark.asyncio
async def test_a_shard_that_fills_while_it_is_removed_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes the folder, loses it to the janitor, and makes it again."""
    async with opened(tmp_path) as backend, opened(tmp_path) as other:
        link, losses = os.link, 1

        def beaten(source: str, target: str) -> None:
            nonlocal losses
            if losses and Path(target).parent.is_dir():
                losses -= 1
                Path(target).parent.rmdir()
                (tmp_path / "v2" / SPACE).rmdir()
            link(source, target)

        monkeypatch.setattr(os, "link", beaten)
        assert await put(other, 1) == [None]
        assert await backend.contains([key(1)]) == [PAGE]


@pytest.mark.asyncio
async def test_a_listing_that_is_left_leaves_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    async with opened(tmp_path, capacity=8 * PAGE) as backend:

        async def read() -> None:
            async for _ in backend.list():
                pass

        before = asyncio.all_tasks()
        listing = asyncio.create_task(read())
        while len(asyncio.all_tasks() - before) < 3:  # noqa: ASYNC110  # itself, a count, a wait
            await asyncio.sleep(0)
        listing.cancel()
        held.let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await listing
        await asyncio.sleep(0)
        assert asyncio.all_tasks() - before == set()
