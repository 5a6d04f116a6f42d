"""The figures of the event loop: late beats and long callbacks are seen for what they are."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvlayer.bench.loop import Heartbeat, LongestCallback


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
