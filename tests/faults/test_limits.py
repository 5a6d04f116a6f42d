"""Limits of the process and of its clock: descriptors, memory, a time that jumps back."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from caches import stored_files
from ordeal import Ordeal, ordeal
from victims import COUNT, OBJECTS, file_tier, held, settings
from zygote import Zygote

from kvlayer import Cache
from kvlayer.results import Cause
from kvlayer_backends.file import uses

_MEMORY = Path("/sys/fs/cgroup/memory")  # version 1
HOUR_NS = 3_600_000_000_000


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.asyncio
async def test_without_descriptors_nothing_is_read_or_written_and_with_them_all_is(
    tmp_path: Path, figures: Any
) -> None:
    async with ordeal(tmp_path / "kv") as kv:
        with no_descriptors():
            report = await kv.load(1)
            assert report.tokens == 0
            stored = await kv.store(10)
            assert (stored.stored, len(stored.failed)) == (OBJECTS, OBJECTS)
            assert kv.causes() == {Cause.TIER_DOWN} and kv.says("EMFILE")
            assert await kv.in_host(0) and await kv.in_host(10)
        seconds = await kv.until(lambda: kv.loads(1))
        seconds += await kv.until(lambda: kv.stores(11))
        await kv.check_accounts()
        figures("faults.no_descriptors", **kv.row(recovered_seconds=round(seconds, 3)))


def test_without_memory_nothing_is_wrong_and_with_it_all_is_served(
    tmp_path: Path, zygote: Zygote, figures: Any
) -> None:
    """The process may map nothing more, by RLIMIT_AS: threads, buffers and objects fail to grow."""
    found = zygote.ask("starve", directory=str(tmp_path))
    assert found["in_host"] and found["recovered"]
    figures("faults.no_memory", **found["row"])


@pytest.mark.asyncio
async def test_a_cache_that_is_open_needs_no_thread_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ulimit -u`` or a container's pids limit is reached after opening and before a request."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with Cache.open(settings(str(tmp_path)), held()) as cache:
        await cache.recovered()
        monkeypatch.setattr(threading.Thread, "start", refuse)
        kv = Ordeal(cache, tmp_path)
        assert await kv.stores(0)
        await kv.check_accounts()
        assert not kv.failures


@pytest.mark.may_skip("needs a memory control group of version 1")
def test_a_process_killed_for_its_memory_leaves_what_it_had_committed(
    tmp_path: Path, zygote: Zygote, figures: Any
) -> None:
    if not (_MEMORY / "cgroup.procs").exists() or not os.access(_MEMORY, os.W_OK):
        pytest.skip("no memory control group (version 1) to limit a process with")
    group = _MEMORY / f"kvlayer-tests-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(24 << 20))
        shared = {"directory": str(tmp_path)}
        victim = zygote.start("store", first=0, count=200, host="64MiB", waits=True, **shared)
        assert victim.line() == "open"
        (group / "cgroup.procs").write_text(str(victim.pid))
        victim.say("go")
        stored = 0
        while line := victim.line():
            stored += line.startswith("stored")
        assert victim.end() == -signal.SIGKILL
        assert stored > 0
        found = zygote.ask("recover", seeds=list(range(stored)), **shared)
        assert set(found["tokens"].values()) == {COUNT}
        assert (found["wrong"], found["debris"], found["writers"]) == (0, [], 1)
        assert found["used_nbytes"] == found["on_disk_nbytes"]
        figures("faults.killed_for_memory", committed=stored, wrong=found["wrong"])
    finally:
        group.rmdir()


@pytest.mark.asyncio
async def test_a_clock_that_jumps_back_changes_neither_the_order_of_use_nor_the_accounts(
    tmp_path: Path, figures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File times are the order of use, for the janitor of this process and for the next one's."""
    now, jumped = time.time_ns, 0

    def clock() -> int:
        return now() - jumped

    monkeypatch.setattr(time, "time_ns", clock)
    monkeypatch.setattr(time, "time", lambda: clock() / 1e9)
    monkeypatch.setattr(uses.Uses.__init__, "__defaults__", (clock,))
    capacity = 12 * OBJECTS * (132 << 10)  # more than there is at first
    async with ordeal(tmp_path / "kv", options=f"&capacity={capacity}") as kv:
        before = {path.name: path.stat().st_mtime_ns for path in stored_files(tmp_path / "kv")}
        jumped = HOUR_NS
        for seed in range(10, 13):
            assert not (await kv.store(seed)).failed
        new = [p for p in stored_files(tmp_path / "kv") if p.name not in before]
        # In this process the order of use stays the order of time, whatever the clock says.
        assert min(path.stat().st_mtime_ns for path in new) > max(before.values())
        assert all([await kv.loads(seed) for seed in (0, 1, 2, 3, 10, 11, 12)])
        await kv.check_accounts()
    async with ordeal(tmp_path / "kv", options=f"&capacity={capacity}") as kv:
        # Another process, an hour before what it finds was used.
        assert all([await kv.loads(seed) for seed in (0, 1, 2, 3, 10, 11, 12)])
        for seed in range(20, 40):  # evicts
            assert not (await kv.store(seed)).failed
        assert await kv.loads(39)
        await kv.check_accounts()
        assert 0 < file_tier(kv.cache).used_nbytes <= capacity
        figures("faults.clock_back", **kv.row(jump_seconds=HOUR_NS // 10**9))
