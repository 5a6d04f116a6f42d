"""The seeded loop: any order but one per seed, work without threads, awaits that can be counted."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvlayer.runtime.offload import Offload
from kvlayer.testing.sim import Awaits, Stuck, run
from kvlayer.tier.guard.guard import Guard


async def _race() -> list[int]:
    order: list[int] = []

    async def enter(number: int) -> None:
        await asyncio.sleep(0)
        order.append(number)

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(enter(number))
    return order


def test_seeds_give_many_orders_and_each_its_own() -> None:
    orders = {tuple(run(_race(), seed=seed)) for seed in range(50)}
    assert len(orders) > 20
    assert all(run(_race(), seed=3) == run(_race(), seed=3) for _ in range(3))


def test_the_callbacks_of_a_future_keep_their_order() -> None:
    async def main() -> list[int]:
        future = asyncio.get_running_loop().create_future()
        told: list[int] = []
        for number in range(5):
            future.add_done_callback(lambda _, number=number: told.append(number))
        future.set_result(None)
        await _race()
        return told

    for seed in range(30):
        assert run(main(), seed=seed) == [0, 1, 2, 3, 4]


def test_a_set_of_tasks_has_one_order() -> None:
    """Or what iterates over one would do so by memory addresses."""

    async def main() -> list[int]:
        tasks = {asyncio.ensure_future(asyncio.sleep(0, number)) for number in range(40)}
        rubbish = [object() for _ in range(random.randrange(100))]  # other addresses every time
        await asyncio.wait(tasks)
        del rubbish
        return [task.result() for task in tasks]

    assert run(main(), seed=1) == run(main(), seed=1)


def test_blocking_work_runs_without_threads_after_some_virtual_time() -> None:
    async def main(pool: Offload) -> tuple[str, float]:
        name = await pool.run(lambda: threading.current_thread().name)
        for _ in range(20):
            await pool.run(int)
        return name, asyncio.get_running_loop().time()

    pool, times = Offload(1, "test"), set[float]()
    for seed in range(5):
        name, took = run(main(pool), seed=seed, work_seconds=0.5)
        assert name == threading.main_thread().name
        times.add(took)
    assert len(times) == 5 and min(times) > 0.0


def test_an_error_of_blocking_work_is_its_callers() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().run_in_executor(None, lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        run(main(), seed=0)


def test_work_of_a_pool_that_was_shut_down_is_cancelled() -> None:
    async def main() -> list[str]:
        pool, done = ThreadPoolExecutor(1), list[str]()
        future = asyncio.get_running_loop().run_in_executor(pool, done.append, "done")
        pool.shutdown(cancel_futures=True)
        await asyncio.wait({future})
        assert future.cancelled()
        return done

    assert run(main(), seed=2) == []


def test_work_that_was_cancelled_before_it_began_never_runs() -> None:
    async def main() -> list[str]:
        done: list[str] = []
        future = asyncio.get_running_loop().run_in_executor(None, done.append, "done")
        future.cancel()
        await asyncio.sleep(1)
        return done

    assert run(main(), seed=2) == []


def test_what_would_hang_is_an_error() -> None:
    async def hang() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck, match="nothing will ever happen"):
        run(hang(), seed=0)


def test_chance_and_the_pauses_of_guards_follow_from_the_seed() -> None:
    async def main() -> list[float]:
        guard = Guard(1.0, 1)
        breakers = [turns.breaker for turns in (guard._reads, guard._writes)]
        return [random.random(), *(breaker._jitter() for breaker in breakers)]

    random.seed(99)
    state = random.getstate()
    drawn = [run(main(), seed=seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert random.getstate() == state


def test_a_trace_names_every_step() -> None:
    async def main() -> None:
        await asyncio.sleep(1.5)

    trace: list[str] = []
    run(main(), seed=0, trace=trace)
    assert any(line.startswith("1.500000000 ") for line in trace)
    assert any("main:" in line for line in trace)


def test_a_coroutine_is_cancelled_at_each_of_its_awaits() -> None:
    reached: list[int] = []

    async def three(stop: asyncio.Event) -> str:
        await asyncio.sleep(0)
        reached.append(1)
        await stop.wait()
        reached.append(2)
        await asyncio.sleep(2)
        return "done"

    async def main(cancel_at: int) -> tuple[int, str]:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_later(1, stop.set)
        steps = Awaits(three(stop), cancel_at)

        async def wait() -> str:
            return await steps

        task = asyncio.ensure_future(wait())
        await asyncio.wait({task})
        return steps.count, "cancelled" if task.cancelled() else task.result()

    assert run(main(0)) == (3, "done")
    reached.clear()
    outcomes = [run(main(at)) for at in (1, 2, 3, 4)]
    assert outcomes == [(1, "cancelled"), (2, "cancelled"), (3, "cancelled"), (3, "done")]
    assert reached == [1, 1, 2, 1, 2]


def test_who_swallows_a_cancellation_goes_on() -> None:
    async def deaf() -> str:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            await asyncio.sleep(1)
        return "went on"

    async def main() -> str:
        return await Awaits(deaf(), 1)

    assert run(main()) == "went on"
