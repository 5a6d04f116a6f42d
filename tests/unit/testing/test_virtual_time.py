"""The virtual clock of the tests: exact, ordered, patient with threads, never stuck in silence."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hang import HANG

from kvlayer.testing.sim import Stuck, VirtualTimeLoop, in_virtual_time, run


@in_virtual_time
async def test_hours_pass_at_once_and_exactly() -> None:
    loop = asyncio.get_running_loop()
    assert loop.time() == 0.0
    await asyncio.sleep(3600.1)
    assert loop.time() == 3600.1
    await asyncio.sleep(0.3)
    assert loop.time() == 3600.1 + 0.3


@in_virtual_time
async def test_a_timer_finds_the_time_it_was_set_to() -> None:
    """``now + (when - now)`` is not always ``when``."""
    loop, late = asyncio.get_running_loop(), list[float]()
    times = [0.1 * i + 1e-7 * i * i for i in range(1, 2000)]
    for when in times:
        loop.call_at(when, lambda when=when: late.append(loop.time() - when))
    await asyncio.sleep(times[-1] + 1)
    assert set(late) == {0.0}
    assert len(late) == len(times)


@in_virtual_time
async def test_timers_ring_in_order_and_cancelled_ones_do_not_stop_the_clock() -> None:
    loop, order = asyncio.get_running_loop(), list[int]()
    for at in (5, 1, 3, 2, 4):
        loop.call_later(at, order.append, at)
    loop.call_later(2.5, order.append, 0).cancel()
    await asyncio.sleep(10)
    assert order == [1, 2, 3, 4, 5]


@in_virtual_time
async def test_timers_that_are_close_ring_together_and_none_before_its_time() -> None:
    """Who rings early would be set again, for the same time, for ever."""
    loop, early = asyncio.get_running_loop(), list[float]()
    for number in range(50):
        when = 1.0 + number * 4e-10
        loop.call_at(when, lambda when=when: early.append(max(when - loop.time(), 0)))
    await asyncio.sleep(2)
    assert early == [0.0] * 50


@in_virtual_time
async def test_time_stands_still_while_a_thread_works() -> None:
    loop, gate = asyncio.get_running_loop(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        working = loop.run_in_executor(pool, gate.wait, HANG)
        sleeping = asyncio.ensure_future(asyncio.sleep(1000))
        threading.Timer(0.05, gate.set).start()
        assert await working
        assert loop.time() == 0.0
        await sleeping
        assert loop.time() == 1000.0


def test_what_would_hang_is_an_error_that_names_who_waits() -> None:
    async def wait_for_nothing() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match="wait_for_nothing"):
        run(wait_for_nothing())


def test_timeouts_and_the_default_pool_work() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7):
                await asyncio.Event().wait()
        return await asyncio.to_thread(asyncio.get_running_loop().time)

    loop = VirtualTimeLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        assert runner.run(main()) == 7.0
    assert loop.is_closed()
