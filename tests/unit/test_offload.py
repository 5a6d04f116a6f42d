"""The one seam to threads: running work is never abandoned, waiting work is dropped at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any

import pytest
from hang import HANG

from kvlayer.errors import ClosedError
from kvlayer.runtime import threads
from kvlayer.runtime.offload import Offload, _Todo


class Work:
    """Blocks a thread until it is let go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.gate = threading.Event()
        self.has_ended = False

    def __call__(self) -> str:
        self.began.set()
        assert self.gate.wait(HANG)
        self.has_ended = True
        return "done"

    async def has_begun(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.began.wait, HANG)


@pytest.mark.asyncio
async def test_work_runs_on_a_thread_of_the_pool_and_returns() -> None:
    offload = Offload(1, "kvlayer-test")

    def who(*parts: str, end: str) -> str:
        return f"{threading.current_thread().name} {''.join(parts)}{end}"

    assert (await offload.run(who, "a", "b", end="!")).endswith(" ab!")
    assert (await offload.run(who, end="")).startswith("kvlayer-test")
    offload.close()


@pytest.mark.asyncio
async def test_an_error_of_the_work_is_raised_to_who_waits() -> None:
    offload = Offload(1, "test")

    def fail() -> None:
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        await offload.run(fail)
    offload.close()


@pytest.mark.asyncio
async def test_work_cancelled_before_it_starts_is_dropped_at_once() -> None:
    offload, busy, waiting = Offload(1, "test"), Work(), Work()
    first = asyncio.create_task(offload.run(busy))
    await busy.has_begun()
    second = asyncio.create_task(offload.run(waiting))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second  # while the only thread is still busy
    assert not first.done()
    busy.gate.set()
    assert await first == "done"
    assert await offload.run(lambda: "next") == "next"  # the queue is past the dropped work
    assert not waiting.began.is_set()
    offload.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("times", [1, 3])
async def test_work_cancelled_while_it_runs_is_waited_for_however_often(times: int) -> None:
    offload, work = Offload(1, "test"), Work()
    task = asyncio.create_task(offload.run(work))
    await work.has_begun()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()  # its memory is still in use
    work.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.has_ended
    offload.close()


@pytest.mark.asyncio
async def test_an_error_of_work_nobody_waits_for_any_more_is_no_warning() -> None:
    offload, began, gate = Offload(1, "test"), threading.Event(), threading.Event()

    def fail() -> None:
        began.set()
        assert gate.wait(HANG)
        raise ZeroDivisionError

    task = asyncio.create_task(offload.run(fail))
    await asyncio.get_running_loop().run_in_executor(None, began.wait, HANG)
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    offload.close()


@pytest.mark.asyncio
async def test_a_task_cancelled_before_its_first_step_starts_nothing() -> None:
    offload, work = Offload(1, "test"), Work()
    task = asyncio.create_task(offload.run(work))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not work.began.is_set()
    offload.close()


@pytest.mark.asyncio
async def test_a_closed_pool_takes_no_work_and_closes_again() -> None:
    offload = Offload(1, "test")
    await offload.run(lambda: None)
    offload.close()
    offload.close()
    with pytest.raises(ClosedError):
        await offload.run(lambda: None)
    never_used = Offload(1, "test")
    never_used.close()
    with pytest.raises(ClosedError):
        await never_used.run(lambda: None)


@pytest.mark.asyncio
async def test_closing_waits_for_running_work_and_refuses_what_waits() -> None:
    """Whoever waits learns that the pool was closed; nobody cancelled them."""
    offload, running, waiting = Offload(1, "test"), Work(), Work()
    first = asyncio.create_task(offload.run(running))
    await running.has_begun()
    second = asyncio.create_task(offload.run(waiting))
    await asyncio.sleep(0)
    closing = asyncio.get_running_loop().run_in_executor(None, offload.close)
    with pytest.raises(ClosedError):
        await second
    assert not closing.done()
    running.gate.set()
    await closing
    assert await first == "done"
    assert not waiting.began.is_set()


@pytest.mark.asyncio
async def test_no_more_threads_run_than_the_pool_has() -> None:
    offload, works = Offload(2, "test"), [Work() for _ in range(4)]
    tasks = [asyncio.create_task(offload.run(work)) for work in works]
    await works[0].has_begun()
    await works[1].has_begun()
    assert not works[2].began.is_set()
    for work in works:
        work.gate.set()
    assert await asyncio.gather(*tasks) == ["done"] * 4
    offload.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("threads", [1, 2, 5])
async def test_many_works_run_each_once_and_wake_the_loop_once_a_thread(threads: int) -> None:
    offload, done, woken = Offload(threads, "test"), list[int](), 0
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal woken
        woken += 1
        return wake(*args, **kwargs)

    loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
    await offload.run_all([partial(done.append, number) for number in range(40)])
    assert sorted(done) == list(range(40))
    assert woken <= threads
    await offload.run_all([])
    offload.close()


@pytest.mark.asyncio
async def test_threads_that_start_late_do_not_make_the_others_take_turns() -> None:
    """Nobody else waits for a thread: one of them does all there is to do in one go."""
    offload, blocker = Offload(2, "test"), Work()
    blocking = asyncio.create_task(offload.run(blocker))
    await blocker.has_begun()
    submit, submitted = offload._submit, list[object]()
    asked, ended = threading.Event(), threading.Event()

    def counted(call: Any) -> Any:
        future = submit(call)
        submitted.append(call)
        if len(submitted) == 2:
            asked.set()  # both threads, of which one is busy
        return future

    offload._submit = counted  # type: ignore[method-assign]
    works = [partial(asked.wait, HANG)] * 40
    task = asyncio.create_task(offload.run_all([*works, ended.set]))
    await asyncio.get_running_loop().run_in_executor(None, ended.wait, HANG)
    blocker.gate.set()
    await asyncio.gather(blocking, task)
    assert len(submitted) == 2
    offload.close()


@pytest.mark.asyncio
async def test_a_work_goes_over_items_that_are_made_on_its_thread() -> None:
    offload = Offload(1, "kvlayer-test")
    taken: list[tuple[int, str]] = []

    def work(items: Iterator[tuple[int, str]]) -> None:
        taken.extend(items)

    made = ((number, threading.current_thread().name) for number in range(4))
    await offload.run_over(work, made)
    assert [number for number, _ in taken] == [0, 1, 2, 3]
    assert all(name.startswith("kvlayer-test") for _, name in taken)
    with pytest.raises(ZeroDivisionError):
        await offload.run_over(lambda items: [1 // item for item in items], [1, 0, 1])
    offload.close()
    with pytest.raises(ClosedError):
        await offload.run_over(work, made)


@pytest.mark.asyncio
async def test_whoever_waits_for_the_thread_gets_it_between_two_items() -> None:
    offload = Offload(1, "kvlayer-test")
    first, done = Work(), list[object]()

    def work(items: Iterator[Callable[[], object]]) -> None:
        for item in items:
            item()

    items = [first, *(partial(done.append, number) for number in range(3))]
    over = asyncio.create_task(offload.run_over(work, items))
    await first.has_begun()
    other = asyncio.create_task(offload.run(done.append, "other"))
    await asyncio.sleep(0)
    first.gate.set()
    await asyncio.gather(over, other)
    assert done == ["other", 0, 1, 2]
    offload.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_ends_the_items_and_waits_for_the_work(times: int) -> None:
    offload = Offload(1, "kvlayer-test")
    first, later, ended = Work(), list[int](), threading.Event()

    def work(items: Iterator[Callable[[], object]]) -> None:
        try:
            for item in items:
                item()
        finally:
            ended.set()

    task = asyncio.create_task(offload.run_over(work, [first, partial(later.append, 1)]))
    await first.has_begun()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    first.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set() and not later
    offload.close()


@pytest.mark.asyncio
async def test_an_item_that_is_being_made_when_the_work_is_cancelled_is_not_worked_on() -> None:
    offload = Offload(1, "kvlayer-test")
    making, taken = Work(), list[object]()
    task = asyncio.create_task(offload.run_over(taken.extend, (each() for each in [making])))
    await making.has_begun()
    task.cancel()
    await asyncio.sleep(0)
    making.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert making.has_ended and not taken
    offload.close()


@pytest.mark.asyncio
async def test_the_works_of_two_calls_take_turns() -> None:
    offload, first, order = Offload(1, "test"), Work(), list[str]()
    one = [first, *[partial(order.append, f"one {n}") for n in range(3)]]
    two = [partial(order.append, f"two {n}") for n in range(3)]
    tasks = [asyncio.create_task(offload.run_all(one))]
    await first.has_begun()
    tasks.append(asyncio.create_task(offload.run_all(two)))
    await asyncio.sleep(0)
    first.gate.set()
    await asyncio.gather(*tasks)
    assert order.index("two 0") < order.index("one 1")
    assert [entry for entry in order if entry[:3] == "one"] == ["one 0", "one 1", "one 2"]
    assert [entry for entry in order if entry[:3] == "two"] == ["two 0", "two 1", "two 2"]
    offload.close()


@pytest.mark.asyncio
async def test_the_first_of_many_that_fails_starts_no_other_and_waits_for_those_that_run() -> None:
    offload, running, waiting = Offload(2, "test"), Work(), [Work(), Work()]

    def fail() -> None:
        running.began.wait(HANG)
        raise ZeroDivisionError("here")

    async with asyncio.timeout(HANG):
        blocker = Work()  # takes the thread that failed, so that what waits cannot begin
        task = asyncio.create_task(offload.run_all([running, fail, *waiting]))
        await running.has_begun()
        blocking = asyncio.create_task(offload.run(blocker))
        await blocker.has_begun()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        running.gate.set()
        with pytest.raises(ZeroDivisionError, match="here"):
            await task
        assert running.has_ended
        assert not any(work.began.is_set() for work in waiting)
        blocker.gate.set()
        await blocking
    offload.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("times", [1, 3])
async def test_many_works_that_are_cancelled_end_what_runs_and_drop_what_waits(times: int) -> None:
    offload, running, waiting = Offload(1, "test"), Work(), [Work(), Work()]
    task = asyncio.create_task(offload.run_all([running, *waiting]))
    await running.has_begun()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    running.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running.has_ended
    assert await offload.run(lambda: "next") == "next"
    assert not any(work.began.is_set() for work in waiting)
    offload.close()


@pytest.mark.asyncio
async def test_many_works_whose_pool_closes_say_so_and_end_what_runs() -> None:
    offload, running, waiting = Offload(1, "test"), Work(), Work()
    task = asyncio.create_task(offload.run_all([running, waiting]))
    await running.has_begun()
    behind = asyncio.create_task(offload.run(Work()))
    await asyncio.sleep(0)
    closing = asyncio.get_running_loop().run_in_executor(None, offload.close)
    with pytest.raises(ClosedError):
        await behind  # so the pool has dropped what waited
    assert not task.done()
    running.gate.set()
    with pytest.raises(ClosedError):
        await task
    await closing
    assert running.has_ended
    assert not waiting.began.is_set()
    with pytest.raises(ClosedError):
        await offload.run_all([waiting])


class Leak:
    """Fails with a view of its memory in the frame, and keeps the error for as long as it can."""

    def __init__(self, gate: threading.Barrier) -> None:
        self.memory = bytearray(8)
        self.error: ZeroDivisionError | None = None
        self.began = threading.Event()
        self._gate = gate

    def __call__(self) -> None:
        view = memoryview(self.memory)[2:]
        self.began.set()
        try:
            self._gate.wait(HANG)
            raise ZeroDivisionError(len(view))
        except ZeroDivisionError as error:
            self.error = error
            raise


@pytest.mark.asyncio
async def test_an_error_nobody_gets_keeps_nothing_of_what_its_work_was_lent() -> None:
    """Memory that was lent can be unmapped right after the call, whoever holds the error."""
    offload, gate = Offload(2, "test"), threading.Barrier(2)
    works = [Leak(gate), Leak(gate)]
    with pytest.raises(ZeroDivisionError) as caught:
        await offload.run_all(works)
    (unheard,) = (work for work in works if work.error is not caught.value)
    unheard.memory.append(0)  # BufferError while a view is out
    offload.close()


@pytest.mark.asyncio
async def test_the_error_of_cancelled_work_keeps_nothing_of_what_it_was_lent() -> None:
    offload, gate = Offload(1, "test"), threading.Barrier(2)
    work = Leak(gate)
    task = asyncio.create_task(offload.run(work))
    await asyncio.get_running_loop().run_in_executor(None, work.began.wait, HANG)
    task.cancel()
    await asyncio.sleep(0)
    gate.wait(HANG)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.error is not None
    work.memory.append(0)
    offload.close()


# -- a system that gives no more threads ---------------------------------------------------------


@pytest.fixture
def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, no thread can be started."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.asyncio
async def test_where_no_more_threads_start_those_there_are_do_all_the_work(
    no_more_threads: Callable[[], None],
) -> None:
    offload = Offload(4, "test")
    offload.begin()
    no_more_threads()
    names = await asyncio.gather(
        *(offload.run(lambda: threading.current_thread().name) for _ in range(8))
    )
    assert len(set(names)) == 1
    offload.close()


@pytest.mark.asyncio
async def test_work_that_no_thread_took_is_refused_and_never_done_later(
    no_more_threads: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is the caller's again once it was refused."""
    offload, done = Offload(2, "test"), list[str]()
    no_more_threads()
    with pytest.raises(RuntimeError, match="start new thread"):
        await offload.run(done.append, "refused")
    monkeypatch.undo()
    await offload.run(done.append, "taken")
    offload.close()
    assert done == ["taken"]


def test_nothing_starts_after_a_failure_although_the_loop_has_not_heard_of_it() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    offload, todo = Offload(1, "test"), _Todo([fail, list])
    with pytest.raises(ZeroDivisionError):
        offload._work_off(todo)  # as a thread of the pool does
    assert todo.take() is None


@pytest.mark.asyncio
async def test_work_that_was_lent_nothing_cannot_hold_up_who_is_cancelled() -> None:
    offload, work = Offload(1, "test"), Work()
    task = asyncio.create_task(offload.run_unlent(work))
    await work.has_begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not work.has_ended
    waiting = asyncio.create_task(offload.run_unlent(lambda: "dropped"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    work.gate.set()
    assert await offload.run_unlent(lambda: "next") == "next"
    offload.close()


@pytest.mark.asyncio
async def test_closing_may_leave_a_thread_that_does_not_end_and_says_so() -> None:
    offload, work = Offload(2, "test"), Work()
    task = asyncio.create_task(offload.run(work))
    await work.has_begun()
    task.cancel()
    await asyncio.sleep(0)  # it waits for its thread all the same
    assert await offload.run(lambda: 1) == 1
    assert offload.close(0.01) == 1
    assert offload.close() == 0  # nothing is waited for a second time
    with pytest.raises(asyncio.CancelledError):
        await task
    work.gate.set()


_HANGS = """
import asyncio, os, sys
from kvlayer.runtime.offload import Offload
os.mkfifo(sys.argv[1])
async def main():
    offload = Offload(1, "hangs")
    loop = asyncio.get_running_loop()
    began = asyncio.Event()
    def hang():
        loop.call_soon_threadsafe(began.set)
        os.open(sys.argv[1], os.O_RDONLY)
    task = asyncio.ensure_future(offload.run(hang))
    await began.wait()
    return task
import kvlayer.runtime.threads
kvlayer.runtime.threads._EXIT_SECONDS = 0.1
loop = asyncio.new_event_loop()
kept = loop.run_until_complete(main())
sys.exit(3)
"""


def test_a_thread_that_hangs_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HANGS, str(tmp_path / "fifo")]
    ended = subprocess.run(command, timeout=HANG, capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr


def test_work_that_runs_at_exit_is_waited_for() -> None:
    code = (
        "import threading\n"
        "from kvlayer.runtime.threads import Threads\n"
        "gate = threading.Event()\n"
        "def work():\n"
        "    gate.wait()\n"
        "    print('done', flush=True)\n"
        "threads = Threads(1, 'test')\n"
        "threads.submit(work)\n"
        "import atexit; atexit.register(gate.set)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], timeout=HANG, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


class Lent:
    """What work was lent, and may return."""

    def itself(self) -> Lent:
        return self

    def fail(self) -> None:
        raise ZeroDivisionError


@pytest.mark.asyncio
@pytest.mark.parametrize("way", ["run", "run_unlent", "run_all", "fails", "all_fail"])
async def test_a_thread_keeps_nothing_once_who_waits_has_heard(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits may close the memory at once; the thread may be held up at its last steps."""
    gate = threading.Event()

    class Slow(Future[Any]):
        def set_result(self, result: Any) -> None:
            super().set_result(result)
            assert gate.wait(HANG)

        def set_exception(self, exception: BaseException | None) -> None:
            super().set_exception(exception)
            assert gate.wait(HANG)

    monkeypatch.setattr(threads, "Future", Slow)
    offload, lent = Offload(1, "test"), [Lent() for _ in range(3)]
    kept = [weakref.ref(each) for each in lent]
    error: BaseException | None = None
    try:
        if way == "run":
            assert [await offload.run(lent.pop().itself) is None] == [False]
        elif way == "run_unlent":
            assert [await offload.run_unlent(lent.pop().itself) is None] == [False]
        elif way == "run_all":
            await offload.run_all([each.itself for each in lent])
        elif way == "fails":
            await offload.run(lent.pop().fail)
        else:
            await offload.run_all([each.fail for each in lent])
    except ZeroDivisionError as exc:
        clear_frames(exc.__traceback__)
        error = exc
    lent.clear()
    assert [each() for each in kept] == [None] * 3
    assert (error is not None) == ("fail" in way)
    gate.set()
    offload.close()
