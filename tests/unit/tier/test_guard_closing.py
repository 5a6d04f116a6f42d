"""Closing a guard waits for everything that was lent, and no longer than it was told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

import pytest

from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.guard import Guard, Lane

NEVER = 3600.0


def deaf(seconds: float) -> Callable[[], Coroutine[object, object, str]]:
    """A call that takes so long, and does not hear that it is cancelled."""

    async def work() -> str:
        until = asyncio.get_running_loop().time() + seconds
        while (left := until - asyncio.get_running_loop().time()) > 0:
            try:
                await asyncio.sleep(left)
            except asyncio.CancelledError:
                pass
        return "done"

    return work


@pytest.mark.parametrize("seconds", [None, 10.0])
@in_virtual_time
async def test_closing_waits_for_the_last_call_to_end(seconds: float | None) -> None:
    loop, guard = asyncio.get_running_loop(), Guard(NEVER, 8)
    for takes in (2.0, 4.0, 6.0):
        guard.start(deaf(takes))
    await asyncio.sleep(0)
    assert await guard.aclose(seconds) == 0
    assert loop.time() == pytest.approx(6.0)
    assert guard.running == 0


@in_virtual_time
async def test_closing_ends_when_its_time_is_over_and_says_how_many_calls_go_on() -> None:
    loop, guard = asyncio.get_running_loop(), Guard(NEVER, 8)
    for takes in (2.0, 40.0, 60.0):
        guard.start(deaf(takes))
    await asyncio.sleep(0)
    assert await guard.aclose(5.0) == 2
    assert loop.time() == pytest.approx(5.0)


@in_virtual_time
async def test_closing_waits_for_a_probe_as_it_does_for_a_call() -> None:
    for takes, left, at in ((3.0, 0, 3.0), (30.0, 1, 5.0)):
        loop, guard = asyncio.get_running_loop(), Guard(1.0, 3, pause=0.5)
        probed = asyncio.Event()

        async def probe(takes: float = takes, probed: asyncio.Event = probed) -> None:
            probed.set()
            await deaf(takes)()

        guard.probe = probe
        guard.missed(Lane.READS, "late")  # the breaker opens, and asks after a pause
        await probed.wait()
        began = loop.time()
        assert await guard.aclose(5.0) == left
        assert loop.time() - began == pytest.approx(at)
