"""Real disks that fail under a running cache: each costs a shorter prefix, a cause, and a deadline.

Every test ends with requests that succeed again and with accounts that are exact.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from caches import tokens
from disks import Disk, disk
from ordeal import SHORT, ordeal
from victims import COUNT, OBJECTS, file_tier

from kvlayer.results import Cause

NEEDS_MOUNT = pytest.mark.may_skip(
    "mounting a file system takes root, which a sandbox may withhold"
)
OBJECT = 132 * 1024
"""Bytes of a chunk with its header."""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path) as mounted:
        yield mounted


@NEEDS_MOUNT
@pytest.mark.asyncio
async def test_a_full_disk_serves_what_it_holds_and_takes_more_once_there_is_room(
    small: Disk, figures: Any
) -> None:
    async with ordeal(small.point / "kv") as kv:
        with small.filled(leaving=2 * OBJECT):
            for seed in range(10, 16):
                report = await kv.store(seed)
                assert report.stored == OBJECTS  # in host memory
            assert len(kv.failures) >= 6 * OBJECTS - 3  # tails are small
            assert kv.causes() == {Cause.TIER_DOWN} and kv.says("ENOSPC")
            assert all([await kv.in_host(seed) for seed in range(10, 16)])
            assert all([await kv.loads(seed) for seed in range(4)])
            assert not kv.cache.control.health().ok
        seconds = await kv.until(lambda: kv.stores(20))
        await kv.check_accounts()
        figures("faults.full_disk", **kv.row(recovered_seconds=round(seconds, 3)))


@NEEDS_MOUNT
@pytest.mark.asyncio
async def test_a_directory_that_cannot_be_written_serves_what_it_holds(
    small: Disk, figures: Any
) -> None:
    async with ordeal(small.point / "kv") as kv:
        folders = [path for path in (small.point / "kv").rglob("*") if path.is_dir()]
        with small.immutable(*folders):
            report = await kv.store(10)
            assert (report.stored, len(report.failed)) == (OBJECTS, OBJECTS)
            assert kv.causes() == {Cause.TIER_DOWN} and kv.says("EPERM")
            assert await kv.in_host(10)
            assert all([await kv.loads(seed) for seed in range(4)])
        seconds = await kv.until(lambda: kv.stores(11))
        await kv.check_accounts()
        figures("faults.not_writable", **kv.row(recovered_seconds=round(seconds, 3)))


@NEEDS_MOUNT
@pytest.mark.asyncio
async def test_a_disk_that_turns_read_only_serves_what_it_holds_and_is_whole_after_a_repair(
    small: Disk, figures: Any
) -> None:
    directory = small.point / "kv"
    async with ordeal(directory) as kv:
        small.turn_read_only()
        report = await kv.store(10)
        assert (report.stored, len(report.failed)) == (OBJECTS, OBJECTS)
        assert kv.causes() == {Cause.TIER_DOWN} and kv.says("EROFS")
        assert await kv.in_host(10)
        assert all([await kv.loads(seed) for seed in range(4)])
        row = kv.row(recovered="at reopening")
    small.unmount()
    small.mount()  # the journal is replayed
    async with ordeal(directory) as kv:  # which stores what the repair has cost
        assert await kv.stores(10)
        await kv.check_accounts()
    figures("faults.turned_read_only", **row)


@NEEDS_MOUNT
@pytest.mark.asyncio
async def test_a_disk_that_dies_costs_a_miss_and_a_new_one_in_its_place_is_used(
    small: Disk, figures: Any
) -> None:
    directory = small.point / "kv"
    async with ordeal(directory) as kv:
        small.die()
        report = await kv.load(1)
        assert report.tokens == 0
        assert (await kv.store(10)).stored == OBJECTS
        assert kv.causes() <= {Cause.TIER_DOWN, Cause.VANISHED} and kv.says("EIO")
        assert await kv.in_host(0) and await kv.in_host(10)
        small.unmount()
        small.replace()  # somebody replaces it, under the running process
        seconds = await kv.until(lambda: kv.stores(11))
        await kv.check_accounts()
        figures("faults.dead_disk", **kv.row(recovered_seconds=round(seconds, 3)))


@NEEDS_MOUNT
@pytest.mark.asyncio
async def test_a_disk_that_hangs_costs_one_deadline_and_nothing_after_and_is_used_again(
    small: Disk, figures: Any
) -> None:
    async with ordeal(small.point / "kv", deadline_seconds=SHORT, pause_seconds=1.0) as kv:
        with small.frozen():
            report = await kv.store(10)
            assert (report.stored, len(report.failed)) == (OBJECTS, OBJECTS)
            assert Cause.DEADLINE in kv.causes()
            slowest = kv.worst
            kv.worst = 0.0
            for seed in range(11, 15):
                assert (await kv.store(seed)).stored == OBJECTS
            assert all([await kv.in_host(seed) for seed in (0, *range(10, 15))])
            quick, kv.worst = kv.worst, slowest
            assert kv.cache.control.stats().tiers[1].writes == "open"
            assert kv.says("not asked for now")
        seconds = await kv.until(lambda: kv.stores(20))
        assert await kv.loads(1)
        await kv.check_accounts()
        figures(
            "faults.hung_disk",
            **kv.row(next_5_stores_worst=round(quick, 3), recovered_seconds=round(seconds, 3)),
        )


@NEEDS_MOUNT
@pytest.mark.may_skip("needs a blkio control group of version 1")
@pytest.mark.asyncio
async def test_a_disk_that_crawls_costs_a_deadline_and_is_used_again(
    small: Disk, figures: Any
) -> None:
    async with ordeal(small.point / "kv", deadline_seconds=SHORT) as kv:
        with small.throttled(OBJECT):  # four chunks in as many seconds
            report = await kv.load(1)
            assert report.tokens < COUNT
            assert Cause.DEADLINE in kv.causes()
            slowest = kv.worst
            kv.worst = 0.0
            again = await kv.load(2)
            assert again.tokens < COUNT
            quick, kv.worst = kv.worst, slowest
            assert await kv.in_host(0)
        seconds = await kv.until(lambda: kv.loads(1))
        assert await kv.stores(20)
        await kv.check_accounts()
        figures(
            "faults.slow_disk",
            **kv.row(next_load_seconds=round(quick, 3), recovered_seconds=round(seconds, 3)),
        )


@pytest.mark.asyncio
async def test_a_directory_deleted_under_a_running_cache_is_a_miss_and_is_made_anew(
    tmp_path: Path, figures: Any
) -> None:
    async with ordeal(tmp_path / "kv") as kv:
        shutil.rmtree(tmp_path / "kv")
        report = await kv.load(1)
        assert report.tokens == 0
        assert await kv.in_host(0)
        explained = await kv.cache.control.explain(tokens(COUNT, 1))
        assert explained.hit_tokens == 0 and explained.misses
        seconds = await kv.until(lambda: kv.stores(1))
        disk_tier = file_tier(kv.cache)
        assert disk_tier.janitor is not None
        await disk_tier.janitor.pass_()  # takes office again: its lock went with the directory
        await kv.check_accounts()
        figures("faults.deleted_directory", **kv.row(recovered_seconds=round(seconds, 3)))
