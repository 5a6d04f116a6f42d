"""``kvlayer bench`` prints figures with ceilings taken in the same run. Their size is no test."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvlayer.bench.loop import Heartbeat, LongestCallback
from kvlayer.bench.measure import Row
from kvlayer.cli.bench import bench

ROWS = {
    "hash.int32",
    "hash.int64",
    "hash.list",
    "lookup.32k.1k",
    "host.store.native",
    "host.store.canonical",
    "host.retrieve.native",
    "host.retrieve.canonical",
    "loop.callback.host",
    "loop.callback.file",
    "loop.wall.host",
    "loop.wall.file",
}
NO_CEILING = {"lookup.32k.1k", "loop.callback.host", "loop.callback.file"}


def test_every_row_has_its_ceiling_and_the_file_holds_what_was_shown(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    ran = CliRunner().invoke(bench, ["--size", "32MiB", "--rounds", "1", "--json", str(path)])
    assert ran.exit_code == 0, ran.output
    report = json.loads(path.read_text())
    results = {row["name"]: row for row in report["results"]}
    assert set(results) == ROWS
    for name, row in results.items():
        assert row["value"] > 0
        assert name in ran.output
        if name not in NO_CEILING:
            assert row["ceiling"] > 0
            assert row["ratio"] == Row(name, row["value"], row["unit"], row["ceiling"]).ratio


def test_a_ratio_is_one_at_the_ceiling_whichever_way_is_better() -> None:
    assert Row("rate", 8.0, "B/s", 10.0).ratio == 0.8
    assert Row("time", 10.0, "s", 8.0).ratio == 0.8
    assert Row("alone", 10.0, "s").ratio is None


@pytest.mark.asyncio
async def test_a_beat_that_comes_late_stands_for_those_it_kept_from_running() -> None:
    heart = Heartbeat()
    loop = asyncio.get_running_loop()
    with heart.watching():
        await heart.taken(1)
        before = len(heart.late)
        started = loop.time()
        while loop.time() < started + 0.02:
            pass
        stood_still = loop.time() - started
        await heart.taken(before + 1)
    missed = [late for late in heart.late[before:] if late < heart.late[before]]
    assert heart.late[before] >= stood_still - 0.001
    assert len(missed) >= 18  # 1 ms less each
    assert heart.percentile(50) <= heart.percentile(99) <= max(heart.late)


@pytest.mark.asyncio
async def test_the_longest_callback_is_that_of_the_task_that_works_longest() -> None:
    longest = LongestCallback()

    async def work(seconds: float) -> None:
        started = time.thread_time()
        while time.thread_time() < started + seconds:
            pass

    with longest.watching():
        await asyncio.gather(work(0.001), work(0.02), asyncio.sleep(0.04))
    assert 0.02 <= longest.seconds < 0.04
    seen = longest.seconds
    await asyncio.create_task(work(seen + 0.01))
    assert longest.seconds == seen  # it looks no longer
