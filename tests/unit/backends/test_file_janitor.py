"""The janitor of ``file://``: exact capacity, order of use, recovery, election, clearing up."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import subprocess
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from hang import HANG

from kvlayer.abc.backend import Damaged, Hit, Read, Write, WriteResult
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.errors import BackendError, NoRoomError
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer_backends.file import FileBackend, FileOptions
from kvlayer_backends.file.ledger import Eviction, Ledger
from kvlayer_backends.file.locks import FileLock
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.scan import Scan
from kvlayer_backends.file.uses import Uses

PAGE = 4096
NAMESPACE = "ab" * 32
PART = Part(0, (0, 4), (0, 8))


def key(number: int) -> ObjectKey:
    return ObjectName.raw(ObjectKey.of(NAMESPACE, "0", sha256(b"%d" % number).digest(), 16, PART))


KEYS = [key(n) for n in range(64)]
NUMBERS = {k: n for n, k in enumerate(KEYS)}


@asynccontextmanager
async def opened(
    root: Path,
    *,
    policy: type[EvictionPolicy] = PrefixLRU,
    wait: bool = True,
    **more: Any,
) -> AsyncIterator[FileBackend]:
    values: dict[str, Any] = {"interval": 3600.0, **more}
    async with FileBackend(str(root), FileOptions(**values), policy=policy) as backend:
        if wait:
            await backend.recovered()
            await asyncio.sleep(0)
        yield backend


async def put(backend: FileBackend, *numbers: int, pages: int = 1) -> list[WriteResult]:
    memory = memoryview(mmap(-1, pages * PAGE))
    return await backend.put([Write(KEYS[n], (memory,)) for n in numbers])


async def get(backend: FileBackend, *numbers: int) -> list[bool]:
    reads = [Read(KEYS[n], (memoryview(mmap(-1, PAGE)),)) for n in numbers]
    return [isinstance(result, Hit) for result in await backend.get(reads)]


def present(root: Path) -> set[int]:
    return {NUMBERS[k] for k in KEYS if Path(Paths(str(root)).object(k)).exists()}


def weight(root: Path) -> int:
    """Bytes of everything on disk but notes and locks; a file with two names counts once."""
    sizes: dict[int, int] = {}
    for directory, _, names in os.walk(root):
        for name in names:
            if not name.endswith((".json", "lock")):
                try:
                    status = os.stat(f"{directory}/{name}")
                    sizes[status.st_ino] = status.st_size
                except FileNotFoundError:
                    continue
    return sum(sizes.values())


async def pass_(backend: FileBackend) -> None:
    assert backend.janitor is not None
    await backend.janitor.pass_()


# -- capacity ------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(3))
async def test_the_directory_never_exceeds_its_capacity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    capacity = 20 * PAGE
    heaviest = 0
    pwritev, unlink = os.pwritev, os.unlink
    still = threading.Lock()  # nothing grows or goes while the directory is weighed

    def weighed_pwritev(*args: Any) -> int:
        nonlocal heaviest
        with still:
            written = pwritev(*args)
            heaviest = max(heaviest, weight(tmp_path))
            return written

    def careful_unlink(path: str) -> None:
        with still:
            unlink(path)

    async with opened(tmp_path, capacity=capacity, threads=4) as backend:
        monkeypatch.setattr(os, "pwritev", weighed_pwritev)
        monkeypatch.setattr(os, "unlink", careful_unlink)
        for _ in range(12):
            jobs = [
                put(backend, *chance.sample(range(pages, 64, 6), k=3), pages=pages)
                for pages in chance.choices(range(1, 7), k=4)
            ]
            for results in await asyncio.gather(*jobs):
                assert results == [None] * 3
            if chance.random() < 0.3:
                await backend.quarantine([Damaged(KEYS[chance.randrange(64)])])
            if chance.random() < 0.3:
                await backend.delete([KEYS[chance.randrange(64)]])
        assert backend.used_nbytes == weight(tmp_path) <= capacity
        assert backend.objects == len(present(tmp_path))
    assert capacity // 2 < heaviest <= capacity


@pytest.mark.asyncio
async def test_an_object_larger_than_the_capacity_is_an_error_naming_both(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=2 * PAGE) as backend:
        assert await put(backend, 1) == [None]
        (error,) = await put(backend, 2, pages=3)
        assert isinstance(error, BackendError) and error.hint
        assert str(3 * PAGE) in str(error) and str(2 * PAGE) in str(error)
        assert present(tmp_path) == {1}


@pytest.mark.asyncio
async def test_a_batch_larger_than_the_capacity_does_not_wait_for_itself(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=3 * PAGE, threads=2) as backend:
        assert await asyncio.wait_for(put(backend, *range(10)), HANG) == [None] * 10
        assert len(present(tmp_path)) == 3


@pytest.mark.asyncio
async def test_evidence_counts_and_gives_way_to_objects(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=4 * PAGE) as backend:
        await put(backend, 1, 2, 3)
        await backend.quarantine([Damaged(KEYS[1]), Damaged(KEYS[2])])
        assert backend.used_nbytes == 3 * PAGE
        await put(backend, 4, 5)
        assert present(tmp_path) == {4, 5}, "an object goes before evidence does"
        (result,) = await put(backend, 6, pages=4)
        assert result is None and present(tmp_path) == {6}
        assert not list((tmp_path / "v2" / "quarantine").iterdir())


@pytest.mark.asyncio
async def test_evidence_that_resists_is_asked_to_go_once(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=2 * PAGE) as backend:
        await put(backend, 1)
        await backend.quarantine([Damaged(KEYS[1])])
        kept, _ = sorted((tmp_path / "v2" / "quarantine").iterdir())  # and a note beside it
        kept.unlink()
        kept.mkdir()  # as an object becomes that somebody replaced by a folder
        (kept / "something").write_bytes(bytes(PAGE))
        (error,) = await asyncio.wait_for(put(backend, 2, pages=2), HANG)
        assert isinstance(error, NoRoomError) and not present(tmp_path)
        assert await put(backend, 3) == [None]  # one page is left beside it
    async with opened(tmp_path, capacity=PAGE // 2) as backend:
        with pytest.raises(NoRoomError):  # which the janitor says in the log, and goes on
            await asyncio.wait_for(pass_(backend), HANG)
        assert not present(tmp_path)


@pytest.mark.asyncio
async def test_what_cannot_be_evicted_is_an_error_and_stays_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", path)

    async with opened(tmp_path, capacity=2 * PAGE) as backend:
        await put(backend, 1, 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            (error,) = await put(backend, 3)
        assert isinstance(error, BackendError) and "evict" in str(error)
        assert backend.used_nbytes == 2 * PAGE
        assert await put(backend, 3) == [None]
        assert backend.used_nbytes == 2 * PAGE


@pytest.mark.asyncio
async def test_a_cancelled_put_keeps_the_order_of_what_it_would_have_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, let_go = threading.Event(), threading.Event()
    unlink = os.unlink

    def slow(path: str) -> None:
        entered.set()
        assert let_go.wait(HANG)
        unlink(path)

    async with opened(tmp_path, capacity=4 * PAGE, policy=LRU) as backend:
        for n in range(4):
            await put(backend, n)
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", slow)
            task = asyncio.create_task(put(backend, 9, pages=2))
            await asyncio.to_thread(entered.wait, HANG)
            task.cancel()
            let_go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        gone = {0, 1, 2, 3} - present(tmp_path)
        assert gone == {0, 1} and backend.used_nbytes == weight(tmp_path)
        await put(backend, 10, 11, 12)
        assert present(tmp_path) == {3, 10, 11, 12}


@pytest.mark.asyncio
async def test_evictions_are_named(tmp_path: Path) -> None:
    seen: list[tuple[list[tuple[ObjectKey, int]], str]] = []
    async with opened(tmp_path, capacity=2 * PAGE) as backend:
        backend.on_evicted = lambda gone, policy: seen.append((gone, policy))
        for n in range(3):
            await put(backend, n)
    assert seen == [([(KEYS[0], PAGE)], "prefix-lru")]


# -- order of use --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_end_of_a_prompt_goes_before_its_start(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=4 * PAGE) as backend:
        await put(backend, 0, 1, 2, 3)
        await put(backend, 9)
        assert present(tmp_path) == {0, 1, 2, 9}


@pytest.mark.asyncio
async def test_a_hit_is_a_use(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=3 * PAGE) as backend:
        for n in range(3):
            await put(backend, n)
        assert await get(backend, 0) == [True]
        await put(backend, 9)
        assert present(tmp_path) == {0, 2, 9}


@pytest.mark.asyncio
async def test_storing_again_is_a_use_that_comes_before_making_room(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=3 * PAGE) as backend:
        for n in range(3):
            await put(backend, n)
        assert await put(backend, 0, 9) == [None, None]
        assert present(tmp_path) == {0, 2, 9}


@pytest.mark.asyncio
async def test_storing_again_makes_no_room_for_what_is_there(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity=3 * PAGE) as backend:
        await put(backend, 0, 1, 2)
        gone: list[ObjectKey] = []
        backend.on_evicted = lambda named, _: gone.extend(k for k, _ in named)
        assert await put(backend, 0, 1, 2) == [None] * 3
        assert gone == []


@pytest.mark.asyncio
@pytest.mark.parametrize("capacity", [0, 2 * PAGE, PAGE])
async def test_storing_what_another_process_stored_writes_nothing_and_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    async with (
        opened(tmp_path, capacity=capacity) as mine,
        opened(tmp_path, capacity=capacity) as other,
    ):
        await put(other, 3)
        before = os.stat(Paths(str(tmp_path)).object(KEYS[3])).st_ino
        assert mine.is_janitor and mine.objects == 0
        monkeypatch.setattr(os, "pwritev", lambda *args: pytest.fail("written"))
        assert await put(mine, 3) == [None]
        assert os.stat(Paths(str(tmp_path)).object(KEYS[3])).st_ino == before
        assert (mine.objects, mine.used_nbytes) == (1, PAGE)


@pytest.mark.asyncio
@pytest.mark.parametrize("wait", [False, True])
async def test_reading_a_touched_path_root_first_keeps_its_root_longest(
    tmp_path: Path, wait: bool
) -> None:
    async with opened(tmp_path, capacity=4 * PAGE) as backend:
        for n in range(4):  # stored one by one, root first: the root is the oldest now
            await put(backend, n)
        await backend.touch([KEYS[n] for n in (3, 2, 1, 0)])
        for n in range(4):  # and loaded one by one
            assert await get(backend, n) == [True]
        if not wait:
            await put(backend, 9)
            assert present(tmp_path) == {0, 1, 2, 9}
            return
    async with opened(tmp_path, capacity=4 * PAGE) as backend:
        await put(backend, 9)
        assert present(tmp_path) == {0, 1, 2, 9}


@pytest.mark.asyncio
@pytest.mark.parametrize("use", ["get", "touch"])
async def test_the_order_of_use_survives_a_restart(tmp_path: Path, use: str) -> None:
    async with opened(tmp_path, capacity=8 * PAGE) as backend:
        await put(backend, 0, 1, 2, 3)
        await put(backend, 4, 5)
        if use == "get":
            await get(backend, 0, 1)
        else:
            await backend.touch([KEYS[1], KEYS[0]])
    gone: list[ObjectKey] = []
    async with opened(tmp_path, capacity=8 * PAGE) as backend:
        assert backend.objects == 6 and backend.used_nbytes == 6 * PAGE
        backend.on_evicted = lambda named, _: gone.extend(k for k, _ in named)
        await put(backend, 9, pages=8)
    assert [NUMBERS[k] for k in gone] == [3, 2, 5, 4, 1, 0]


@pytest.mark.asyncio
async def test_what_another_process_used_is_spared_once(tmp_path: Path) -> None:
    async with (
        opened(tmp_path, capacity=6 * PAGE) as mine,
        opened(tmp_path, capacity=6 * PAGE) as other,
    ):
        assert mine.is_janitor and not other.is_janitor
        for n in range(6):
            await put(mine, n)
        assert await get(other, 0, 1, 2, 3) == [True] * 4
        await put(mine, 9)
        assert present(tmp_path) == {0, 1, 2, 3, 5, 9}
        await put(mine, 10, 11, pages=2)
        assert present(tmp_path) == {0, 9, 10, 11}, "the root of what the other read stays longest"
        assert mine.used_nbytes == weight(tmp_path) == 6 * PAGE


@pytest.mark.asyncio
async def test_readers_elsewhere_cannot_stop_eviction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, capacity=4 * PAGE) as backend:
        for n in range(4):
            await put(backend, n)
        stat = os.stat

        def busy(path: str | int, **more: Any) -> os.stat_result:
            if isinstance(path, str) and path.endswith("canonical"):
                os.utime(path)  # used by somebody just before every look
                status = stat(path)
                os.utime(path, ns=(0, status.st_mtime_ns + 10**12))
            return stat(path, **more)

        monkeypatch.setattr(os, "stat", busy)
        assert await asyncio.wait_for(put(backend, 9), HANG) == [None]
        monkeypatch.undo()
        assert len(present(tmp_path)) == 4


def test_times_of_use_only_grow_and_favour_the_root() -> None:
    now = 1_000_000_000
    uses = Uses(lambda: now)
    first, second = uses.stamps(3), uses.stamps(2)
    assert list(first) == sorted(first, reverse=True)
    assert min(second) > max(first)
    now -= 500  # the clock was set back
    assert min(uses.stamps(1)) > max(second)


def test_a_read_long_after_a_touch_is_a_use_of_its_own() -> None:
    now = 0
    uses = Uses(lambda: now)
    uses.touched([KEYS[0]])
    now = 9_000_000_000
    assert not uses.is_new(KEYS[0]) and uses.is_new(KEYS[1])
    now = 11_000_000_000
    assert uses.is_new(KEYS[0])


# -- recovery ------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_open_does_not_wait_for_recovery_but_a_capped_put_and_a_listing_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as backend:
        await put(backend, 0, 1, 2)
    let_go = threading.Event()
    more = Scan.more

    def slow(scan: Scan, count: int) -> Any:
        assert let_go.wait(HANG)
        return more(scan, count)

    monkeypatch.setattr(Scan, "more", slow)
    async with opened(tmp_path, wait=False, capacity=3 * PAGE) as backend:
        assert backend.is_janitor and backend.objects == 0
        assert await get(backend, 0, 7) == [True, False]
        assert await backend.contains(KEYS[:4]) == [PAGE, PAGE, PAGE, None]
        writing = asyncio.create_task(put(backend, 9))

        async def everything() -> set[int]:
            return {NUMBERS[found.key] async for found in backend.list()}

        listing = asyncio.create_task(everything())
        recovering = asyncio.create_task(backend.recovered())
        for _ in range(50):
            await asyncio.sleep(0)
        assert not (writing.done() or listing.done() or recovering.done())
        assert 9 not in present(tmp_path)
        let_go.set()
        assert await writing == [None]
        await recovering
        assert await listing >= {0, 1}
        assert present(tmp_path) == {0, 1, 9}
        assert backend.used_nbytes == 3 * PAGE


@pytest.mark.asyncio
async def test_a_directory_without_a_limit_is_written_while_it_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as backend:
        await put(backend, 0, 1)
    let_go = threading.Event()
    more = Scan.more

    def slow(scan: Scan, count: int) -> Any:
        seen = more(scan, count)
        assert let_go.wait(HANG)  # what it saw is old by the time it is told
        return seen

    monkeypatch.setattr(Scan, "more", slow)
    async with opened(tmp_path, wait=False) as backend:
        assert await put(backend, 2) == [None]
        await backend.delete([KEYS[1]])
        let_go.set()
        await backend.recovered()
        assert backend.objects == 2 and backend.used_nbytes == 2 * PAGE


@pytest.mark.asyncio
async def test_a_failing_janitor_says_so_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as backend:
        await put(backend, 0)
    passes = asyncio.Queue[None]()
    loop = asyncio.get_running_loop()

    def broken(*_: object) -> None:
        loop.call_soon_threadsafe(passes.put_nowait, None)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(Scan, "more", broken)
        async with opened(tmp_path, wait=False, capacity=4 * PAGE, interval=1e-6) as backend:
            assert await asyncio.wait_for(put(backend, 1), HANG) == [None]  # no put waits for ever
            for _ in range(4):
                await asyncio.wait_for(passes.get(), HANG)
            patch.undo()
            await pass_(backend)
            assert backend.objects == 2
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text


@pytest.mark.asyncio
async def test_what_is_no_object_is_neither_counted_nor_evicted(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend:
        await put(backend, 0)
        shard = Path(Paths(str(tmp_path)).object(KEYS[0])).parent
    foreign = [shard / "notes.txt", tmp_path / "v2" / "notes.txt", tmp_path / "notes.txt"]
    for path in foreign:
        path.write_bytes(bytes(10 * PAGE))
    (tmp_path / "v2" / ("0" * 64)).write_text("a file where a namespace would be")
    async with opened(tmp_path, capacity=2 * PAGE) as backend:
        assert backend.objects == 1 and backend.used_nbytes == PAGE
        await put(backend, 1, 2, 3)
        await pass_(backend)
        assert all(path.exists() for path in foreign)


# -- other processes -----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_others_write_is_found_and_evicted_down(tmp_path: Path) -> None:
    async with (
        opened(tmp_path, capacity=4 * PAGE) as mine,
        opened(tmp_path, capacity=4 * PAGE) as other,
    ):
        await put(mine, 0, 1, 2)
        await put(other, *range(10, 18))  # the other does not count
        assert weight(tmp_path) == 11 * PAGE and mine.used_nbytes == 3 * PAGE
        await pass_(mine)
        assert weight(tmp_path) == mine.used_nbytes == 4 * PAGE
        assert present(tmp_path) == {10, 11, 12, 13}, "the oldest went, and the ends of paths"
        (error,) = await put(other, 20, pages=5)
        assert isinstance(error, BackendError), "too large is too large for everyone"


@pytest.mark.asyncio
async def test_what_others_delete_is_forgotten(tmp_path: Path) -> None:
    async with opened(tmp_path) as mine, opened(tmp_path) as other:
        await put(mine, 0, 1, 2)
        await other.delete([KEYS[1]])
        await pass_(mine)
        assert mine.objects == 2 and mine.used_nbytes == 2 * PAGE
        for shard in (tmp_path / "v2" / NAMESPACE).iterdir():
            for path in shard.iterdir():
                path.unlink()
            shard.rmdir()
        await pass_(mine)
        assert mine.objects == 0 and mine.used_nbytes == 0


@pytest.mark.asyncio
async def test_a_pass_reads_only_directories_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as backend:
        await put(backend, *range(30))
        shards = list((tmp_path / "v2" / NAMESPACE).iterdir())
        for shard in shards:
            os.utime(shard, (1, 1))  # long settled
        await pass_(backend)
        read: list[str] = []
        listdir = os.listdir

        def counted(path: str) -> list[str]:
            read.append(path)
            return listdir(path)

        monkeypatch.setattr(os, "listdir", counted)
        await pass_(backend)
        assert not {str(s) for s in shards} & set(read)
        other = Path(Paths(str(tmp_path)).object(KEYS[40]))
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(bytes(PAGE))
        await pass_(backend)
        assert backend.objects == 31
        # Fresh when it was read, it may have changed again within one tick of its time.
        tick = other.parent.stat().st_mtime_ns
        late = Path(Paths(str(tmp_path)).object(KEYS[40]).replace("g0", "g1"))
        late.write_bytes(bytes(PAGE))
        os.utime(other.parent, ns=(tick, tick))
        await pass_(backend)
        assert backend.objects == 32


@pytest.mark.asyncio
async def test_there_is_one_janitor_and_the_next_takes_over(tmp_path: Path) -> None:
    async with (
        opened(tmp_path, capacity=4 * PAGE) as first,
        opened(tmp_path, capacity=4 * PAGE) as second,
    ):
        assert [first.is_janitor, second.is_janitor] == [True, False]
        await pass_(second)
        assert [first.is_janitor, second.is_janitor] == [True, False]
        await first.aclose()
        await pass_(second)
        assert [first.is_janitor, second.is_janitor] == [False, True]
        await put(second, *range(9))
        assert second.used_nbytes == weight(tmp_path) == 4 * PAGE


@pytest.mark.asyncio
async def test_a_janitor_whose_lock_was_deleted_leaves_office(tmp_path: Path) -> None:
    async with opened(tmp_path) as first, opened(tmp_path) as second:
        (tmp_path / "v2" / "janitor.lock").unlink()
        await pass_(second)
        assert second.is_janitor
        await pass_(first)
        assert not first.is_janitor and first.objects == 0


@pytest.mark.asyncio
async def test_only_the_private_directories_of_the_dead_are_cleared(tmp_path: Path) -> None:
    async with opened(tmp_path) as backend, opened(tmp_path):
        tmp = tmp_path / "v2" / "tmp"
        living = {p.name for p in tmp.iterdir()}
        assert len(living) == 2
        dead, busy, unborn, odd = (tmp / uuid.uuid4().hex for _ in range(4))
        for directory in (dead, busy, odd):
            directory.mkdir()
            (directory / "lock").touch()
            (directory / "7.part").write_bytes(bytes(PAGE))
        unborn.mkdir()
        (odd / "thesis.txt").write_text("not ours")
        (tmp / "someone").mkdir()
        held = FileLock(str(busy / "lock"))
        assert held.acquire()
        await pass_(backend)
        held.release()
        left = {p.name for p in tmp.iterdir()}
        assert left == living | {busy.name, odd.name, "someone"}
        assert [p.name for p in odd.iterdir()] == ["thesis.txt"]
        assert (busy / "7.part").exists()


# -- the ledger alone ----------------------------------------------------------------------------


def test_a_ledger_adds_up() -> None:
    chance = random.Random(1)
    ledger = Ledger(PrefixLRU, 100)
    model: dict[ObjectKey, int] = {}
    for step in range(3000):
        k = KEYS[chance.randrange(20)]
        match chance.randrange(4):
            case 0:
                ledger.add(k, n := chance.randrange(30), step)
                model.setdefault(k, n)
            case 1:
                ledger.forget(k)
                model.pop(k, None)
            case 2:
                ledger.use([k], [step])
            case _:
                victims = ledger.take(chance.randrange(60), chance.randrange(3), 0.0)
                fate = Eviction()
                for victim in victims:
                    where = chance.choice([fate.go, fate.lose, fate.failed.append, None])
                    if where is None and chance.random() < 0.5:
                        fate.spared.append((victim, step))
                    elif where is not None:
                        where(victim)
                ledger.settle(victims, fate)
                ledger.spare({victim.key: used_ns for victim, used_ns in fate.spared})
                for victim in (*fate.gone, *fate.lost):
                    model.pop(victim.key, None)
        assert ledger.used_nbytes == sum(model.values()) == ledger.excess() + 100
        assert set(ledger) == set(model)
    named = {victim.key for victim in ledger.take(10**9, 0, 0.0)}
    assert named == set(model), "every object can be evicted, each once"


def test_victims_that_nothing_happened_to_keep_their_order() -> None:
    ledger = Ledger(LRU, 0)
    for k in KEYS[:6]:
        ledger.add(k, 1, 0)
    victims = ledger.take(4, 0, 0.0)
    ledger.settle(victims, Eviction(gone=[victims[1]]))
    assert [v.key for v in ledger.take(9, 0, 0.0)] == [KEYS[n] for n in (0, 2, 3, 4, 5)]


@pytest.mark.asyncio
async def test_files_of_any_year_are_counted_used_and_evicted(tmp_path: Path) -> None:
    """A clock that jumped has stamped one: it is that object's trouble alone."""
    async with opened(tmp_path) as files:
        assert await put(files, *range(4)) == ([None] * 4)
    paths = [Paths(str(tmp_path)).object(key) for key in KEYS[:3]]
    _stamp(paths[0], "2400-01-01")
    _stamp(paths[1], "1902-01-01")
    if os.stat(paths[0]).st_mtime_ns < 1 << 63:
        pytest.skip("this file system keeps no such times")
    async with opened(tmp_path, capacity=6 * PAGE) as files:
        assert files.objects == 4
        assert await put(files, *range(3)) == [None] * 3
        assert len([entry async for entry in files.list()]) == 4
        _stamp(paths[2], "2400-01-01")  # while it is open
        results = await put(files, *range(10, 30))
        assert results == [None] * 20
        assert files.used_nbytes <= 6 * PAGE


@pytest.mark.asyncio
async def test_a_clock_of_a_later_century_stamps_what_can_be_read(tmp_path: Path) -> None:
    uses = Uses(lambda: 1 << 63)
    stamps = [*uses.stamps(3), *uses.stamps(2)]
    assert all(0 < stamp < 1 << 63 for stamp in stamps)
    async with opened(tmp_path, capacity=6 * PAGE) as files:
        files._uses = Uses(lambda: 1 << 64)
        assert await put(files, *range(20)) == [None] * 20
        assert files.used_nbytes <= 6 * PAGE


def _stamp(path: str, date: str) -> None:
    subprocess.run(["touch", "-d", date, path], check=True)  # Python's own does not go so far


@pytest.mark.parametrize("what", ["file", "link"])
@pytest.mark.asyncio
async def test_what_stands_in_an_empty_folders_place_does_not_stop_the_janitor(
    tmp_path: Path, what: str
) -> None:
    async with opened(tmp_path) as backend:
        assert await put(backend, 1) == [None]
        folder = Path(Paths(str(tmp_path)).object(KEYS[1])).parent
        assert await backend.delete([KEYS[1]]) == [None]
        if folder.exists():
            folder.rmdir()
        if what == "file":
            folder.write_text("not ours")
        else:
            folder.symlink_to(tmp_path)
        for _ in range(2):
            await pass_(backend)
        assert folder.is_symlink() or folder.read_text() == "not ours"
        assert await put(backend, 2) == [None]


@pytest.mark.asyncio
@pytest.mark.parametrize("obstacle", ["quarantine", "shard"])
async def test_what_stands_in_one_places_way_leaves_the_others_tidied(
    tmp_path: Path, obstacle: str
) -> None:
    paths = Paths(str(tmp_path))
    async with opened(tmp_path) as files:
        assert await put(files, *range(8)) == [None] * 8
        folders = [Path(paths.object(key)).parent for key in KEYS[:8]]
        await files.delete(KEYS[:8])
        if obstacle == "quarantine":
            Path(paths.quarantine).write_bytes(b"")
        else:
            folders[0].rmdir()
            folders[0].symlink_to(tmp_path)
        with suppress(OSError):
            await pass_(files)
        left = [folder for folder in folders if folder.exists()]
        assert left == ([] if obstacle == "quarantine" else folders[:1])
        assert Path(paths.janitor_lock).read_bytes().isdigit()  # what it counted is noted, too
