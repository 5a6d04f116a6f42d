"""The figures of the event loop: late beats and long callbacks are seen for what they are."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvlayer.bench.heartbeat import Heartbeat
from kvlayer.bench.loop import LongestCallback


@pytest.mark.asyncio
async def test_beats_wait_for_a_loop_that_stands_still_and_are_all_late() -> None:
    loop = asyncio.get_running_loop()
    with Heartbeat() as heart:
        with heart.watching():
            await heart.taken(10)
            before = len(heart.late)
            started = loop.time()
            while loop.time() < started + 0.1:
                pass
            await heart.taken(before + 1)
        taken = len(heart.late)
        assert heart.late[before] >= 0.05  # however busy the machine, it was told by then
        assert heart.late[before:] == sorted(heart.late[before:], reverse=True)
        assert heart.percentile(50) <= heart.percentile(99) <= max(heart.late)
        asleep = loop.time()
        while loop.time() < asleep + 0.1:  # nobody watches: what is sent meanwhile is not late
            pass
        awake = loop.time()
        with heart.watching():
            await heart.taken(taken + 1)
        assert max(heart.late[taken:]) <= loop.time() - awake


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
