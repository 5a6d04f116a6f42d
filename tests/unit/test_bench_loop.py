"""The figures of the event loop: late beats and long callbacks are seen for what they are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from struct import pack
from types import SimpleNamespace

import pytest

from kvlayer.bench import loop as bench_loop
from kvlayer.bench.heartbeat import Heartbeat
from kvlayer.bench.loop import LongestCallback


@pytest.fixture
def beats() -> Iterator[tuple[Heartbeat, Callable[..., None]]]:
    """A heartbeat, and what sends it beats that bear these times."""
    ours, theirs = os.pipe()
    heart = Heartbeat()
    with open(ours, "rb") as end:
        heart._process = SimpleNamespace(stdout=end)  # type: ignore[assignment]
        yield heart, lambda *times: os.write(theirs, pack(f"{len(times)}d", *times)) and None
    os.close(theirs)


@pytest.mark.asyncio
async def test_beats_wait_for_a_loop_that_stands_still_and_are_all_late(
    beats: tuple[Heartbeat, Callable[..., None]],
) -> None:
    heart, send = beats
    with heart.watching():
        begun = heart._since
        send(begun - 0.5, begun, begun + 0.001, begun + 0.002)  # and the loop has not run since
        await heart.taken(3)
        taken = asyncio.get_running_loop().time()
    assert len(heart.late) == 3  # what was sent before it was watched is passed over
    assert [a - b for a, b in pairwise(heart.late)] == [pytest.approx(0.001)] * 2
    assert heart.late[0] <= taken - begun
    assert heart.percentile(50) == heart.late[1] and heart.percentile(99) == heart.late[0]
    send(begun)  # nobody watches
    with heart.watching():
        send(heart._since)
        await heart.taken(4)
    assert len(heart.late) == 4


@pytest.mark.asyncio
async def test_another_process_sends_beats_until_it_is_left() -> None:
    with Heartbeat() as heart:
        with heart.watching():
            await heart.taken(10)
        assert len(heart.late) >= 10 and min(heart.late) >= 0.0
        process = heart._process
    assert process is not None and process.returncode is not None


@pytest.mark.asyncio
async def test_the_longest_callback_is_that_of_the_task_that_works_longest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest, spent = LongestCallback(), 0.0
    monkeypatch.setattr(bench_loop, "time", SimpleNamespace(thread_time=lambda: spent))

    async def work(*seconds: float) -> None:
        nonlocal spent
        for each in seconds:
            spent += each
            await asyncio.sleep(0)

    with longest.watching():
        await asyncio.gather(work(0.5, 0.75), work(2.0, 0.25), asyncio.sleep(0.001))
    assert longest.seconds == 2.0
    await asyncio.create_task(work(3.0))
    assert longest.seconds == 2.0  # it looks no longer
