"""Work crosses to a loop in batches, and whoever waits for it is answered whatever happens."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ALL_COMPLETED, CancelledError, wait
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from hang import HANG

from kvlayer.errors import ClosedError, KVLayerError, PendingError, UnsupportedError
from kvlayer.runtime.job import Job
from kvlayer.runtime.loop_thread import _TURN, LoopThread


class Subject:
    """What lives on the loop; remembers how it was left."""

    def __init__(self) -> None:
        self.left: BaseException | str | None = None
        self.log: list[Any] = []


@contextmanager
def opened(subject: Subject | None = None) -> Generator[LoopThread[Subject]]:
    """A loop's thread; nothing of it is left afterwards."""
    kept = subject or Subject()

    @asynccontextmanager
    async def opener() -> AsyncGenerator[Subject]:
        try:
            yield kept
            kept.left = "clean"
        except BaseException as exc:
            kept.left = exc
            raise

    before = set(threading.enumerate())
    with LoopThread.start(opener) as thread:
        yield thread
    assert set(threading.enumerate()) <= before


@contextmanager
def busy(thread: LoopThread[Subject]) -> Generator[None]:
    """The loop does nothing while the block runs."""
    reached, go = threading.Event(), threading.Event()

    async def block(_: Subject) -> None:
        reached.set()
        go.wait(HANG)  # the point

    blocked = thread.submit(block)
    assert reached.wait(HANG)
    try:
        yield
    finally:
        go.set()
    blocked.wait(HANG)


async def nothing(_: Subject) -> None:
    pass


async def forever(_: Subject) -> None:
    await asyncio.Event().wait()


def note(value: object) -> Callable[[Subject], Any]:
    async def work(subject: Subject) -> object:
        subject.log.append(value)
        return value

    return work


# -- batches --------------------------------------------------------------------------------------


def test_what_is_submitted_before_the_loop_wakes_shares_one_wake_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with opened() as thread:
        woken = 0
        wake = thread._loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> asyncio.Handle:
            nonlocal woken
            woken += 1
            return wake(*args, **kwargs)

        with busy(thread):
            monkeypatch.setattr(thread._loop, "call_soon_threadsafe", counted)
            jobs = [thread.submit(note(i)) for i in range(50)]
            jobs += thread.submit_all(note(i) for i in range(50, 100))
        assert [job.wait(HANG) for job in jobs] == list(range(100))
        assert woken == 1
        thread.call(nothing)
        assert woken == 2


def test_work_begins_in_the_order_it_was_submitted() -> None:
    with opened() as thread:
        with busy(thread):
            jobs = [thread.submit(note(0)), *thread.submit_all(map(note, range(1, 5 * _TURN)))]
        wait(jobs, HANG)
        assert thread.subject.log == list(range(5 * _TURN))


def test_a_flood_of_work_leaves_the_loop_its_turns() -> None:
    with opened() as thread:

        async def mark(subject: Subject) -> None:
            asyncio.get_running_loop().call_soon(subject.log.append, "turn")

        with busy(thread):
            thread.submit(mark)
            jobs = thread.submit_all([note(0)] * 3 * _TURN)
        wait(jobs, HANG)
        assert "turn" in thread.subject.log[: 2 * _TURN]


def test_work_runs_in_the_context_of_its_own_submitter() -> None:
    request = contextvars.ContextVar("request", default="nobody")

    async def who(_: Subject) -> str:
        return request.get()

    def submit(name: str, jobs: list[Job[str]]) -> None:
        request.set(name)
        jobs += [thread.submit(who), *thread.submit_all([who])]

    with opened() as thread:
        jobs: list[Job[str]] = []
        with busy(thread):
            for name in ("a", "b", "c"):
                caller = threading.Thread(target=submit, args=(name, jobs))
                caller.start()
                caller.join()
        assert [job.wait(HANG) for job in jobs] == ["a", "a", "b", "b", "c", "c"]


# -- waiting --------------------------------------------------------------------------------------


def test_waiting_ends_at_its_deadline_and_the_work_goes_on() -> None:
    with opened() as thread:
        with busy(thread):
            job = thread.submit(note("late"))
            with pytest.raises(PendingError, match="not done within 0") as caught:
                job.wait(0.001)
            assert isinstance(caught.value, TimeoutError) and isinstance(caught.value, KVLayerError)
            assert caught.value.hint
            with pytest.raises(PendingError):
                job.wait(0)
            assert not job.done()
            assert not job.has_ended
        assert job.wait(HANG) == "late"
        assert job.has_ended
        assert job.wait(0) == "late"


def test_a_timeout_of_the_work_is_not_taken_for_ones_own() -> None:
    async def late(_: Subject) -> None:
        raise TimeoutError("the disk's")

    with opened() as thread:
        with pytest.raises(TimeoutError, match="the disk's") as caught:
            thread.submit(late).wait(HANG)
        assert not isinstance(caught.value, PendingError)


def test_waiting_on_the_loops_own_thread_is_refused() -> None:
    async def work(_: Subject) -> None:
        job = thread.submit(nothing)
        with pytest.raises(UnsupportedError) as caught:
            job.wait(HANG)
        assert caught.value.hint
        with pytest.raises(UnsupportedError):
            thread.call(nothing)
        with pytest.raises(UnsupportedError):
            thread.close()
        await asyncio.wrap_future(job)
        job.wait(0)  # it is done: nothing to block for

    with opened() as thread:
        thread.call(work)


def test_what_work_was_lent_is_let_go_when_its_job_is_answered() -> None:
    class Lent:
        pass

    async def use(_: Subject, lent: Lent, fail: bool) -> None:
        await asyncio.sleep(0)
        if fail:
            raise ZeroDivisionError

    with opened() as thread:
        for fail in (False, True):
            lent = Lent()
            alive = weakref.ref(lent)
            job = thread.submit(use, lent, fail)
            del lent
            wait([job], HANG)
            assert job.done()
            if fail:
                error = job.exception()
                assert isinstance(error, ZeroDivisionError)
                error.__traceback__ = None  # it shows the frame, as every traceback does
                del error
            assert alive() is None


# -- cancelling -----------------------------------------------------------------------------------


def test_work_cancelled_before_it_began_never_begins() -> None:
    with opened() as thread:
        with busy(thread):
            jobs = thread.submit_all(map(note, range(4)))
            assert jobs[1].cancel() and jobs[1].cancel()
            assert jobs[1].cancelled()
        assert wait(jobs, HANG, return_when=ALL_COMPLETED).not_done == set()
        assert thread.subject.log == [0, 2, 3]
        with pytest.raises(CancelledError):
            jobs[1].wait(HANG)
        assert not jobs[0].cancel()


def test_cancelling_a_job_ends_its_work() -> None:
    begun, ended, may_end = threading.Event(), threading.Event(), threading.Event()

    async def work(_: Subject) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            may_end.wait(HANG)  # as a copy that must be over first
            ended.set()

    with opened() as thread:
        job = thread.submit(work)
        assert begun.wait(HANG)
        assert job.cancel()
        assert job.done() and not job.has_ended
        may_end.set()
        assert wait([job], HANG).not_done == set()
        assert job.has_ended and ended.is_set()
        thread.call(nothing)
        assert not thread._tasks


def test_work_that_fails_after_it_was_cancelled_is_reported_to_the_loop() -> None:
    begun, heard = threading.Event(), threading.Event()
    reported: list[object] = []

    def hear(_: object, context: dict[str, Any]) -> None:
        reported.append(context["exception"])
        heard.set()

    async def work(_: Subject) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ZeroDivisionError

    with opened() as thread:
        thread._loop.set_exception_handler(hear)
        job = thread.submit(work)
        assert begun.wait(HANG)
        job.cancel()
        assert heard.wait(HANG)
        assert isinstance(reported[0], ZeroDivisionError)


def test_what_is_no_coroutine_function_is_the_callers_error() -> None:
    def wrong(_: Subject) -> int:
        return 1

    with opened() as thread:
        with pytest.raises(TypeError):
            thread.call(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            thread.call(nothing, 1)  # type: ignore[call-arg]
        thread.call(nothing)


# -- closing --------------------------------------------------------------------------------------


def test_leaving_answers_everything_that_runs_or_never_began() -> None:
    subject = Subject()
    begun = threading.Event()

    async def begin(_: Subject) -> None:
        begun.set()
        await asyncio.Event().wait()

    with opened(subject) as thread:
        running = thread.submit(begin)
        assert begun.wait(HANG)
        reached, go = threading.Event(), threading.Event()

        async def block(_: Subject) -> None:
            reached.set()
            go.wait(HANG)  # the point

        blocked = thread.submit(block)
        assert reached.wait(HANG)
        waiting = [thread.submit(note(i)) for i in range(3 * _TURN)]
        told: list[int] = []
        thread.post([lambda: told.append(threading.get_ident())])
        thread._leave(abandon=False)
        go.set()
    assert blocked.done() and not blocked.cancelled()
    assert running.cancelled() and all(job.cancelled() for job in waiting)
    assert wait([running, *waiting], 0).not_done == set()
    assert subject.left == "clean"
    assert subject.log == []
    assert told == [thread._ident]
    for use in (lambda: thread.submit(nothing), lambda: thread.call(nothing), thread.check_open):
        with pytest.raises(ClosedError):
            use()
    thread.close()  # again


def test_a_call_that_is_closed_upon_says_so() -> None:
    begun = threading.Event()
    said: list[BaseException] = []

    async def begin(_: Subject) -> None:
        begun.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            thread.call(begin)
        except BaseException as exc:  # noqa: BLE001  # asserted by the test's thread
            said.append(exc)

    with opened() as thread:
        caller = threading.Thread(target=call)
        caller.start()
        assert begun.wait(HANG)
        thread.close()
        caller.join(HANG)
    assert [type(exc) for exc in said] == [ClosedError]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
def test_a_block_left_by_an_exception_is_abandoned(error: type[BaseException]) -> None:
    subject = Subject()
    jobs: list[Job[None]] = []

    def use() -> None:
        with opened(subject) as thread:
            jobs.append(thread.submit(forever))
            raise error

    with pytest.raises(error):
        use()
    assert jobs[0].cancelled()
    assert isinstance(subject.left, Exception)  # told not to flush


def test_submitting_while_it_closes_is_either_answered_or_refused() -> None:
    started = threading.Barrier(4)

    def flood(mine: list[Job[None]], thread: LoopThread[Subject]) -> None:
        started.wait(HANG)
        try:
            while True:
                mine += thread.submit_all([nothing, forever])
                mine.append(thread.submit(nothing))
        except ClosedError:
            pass

    for _ in range(20):
        jobs: list[list[Job[None]]] = [[], [], []]
        with opened() as thread:
            floods = [threading.Thread(target=flood, args=(mine, thread)) for mine in jobs]
            for each in floods:
                each.start()
            started.wait(HANG)
            thread.close()
            for each in floods:
                each.join(HANG)
        assert all(job.done() for mine in jobs for job in mine)


def test_a_loop_that_dies_answers_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kvlayer.runtime.loop_thread._TURN", 1
    )  # it dies long before it has begun all

    async def leave(_: Subject) -> None:
        asyncio.get_running_loop().stop()

    said: list[bool] = []

    def use() -> None:
        with opened() as thread:
            running = thread.submit(forever)
            thread.call(nothing)
            with busy(thread):
                dying, *later = thread.submit_all([leave, *[note(1)] * 100])
            said.append(wait([dying, running, *later], HANG).not_done == set())
            said.append(later[-1].cancelled())
            thread._thread.join(HANG)
            try:
                thread.call(nothing)
            except ClosedError:
                said.append(thread._loop.is_closed())

    with pytest.raises(RuntimeError, match="loop stopped"):  # it is what leaving the block says
        use()
    assert said == [True] * 3


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_work_that_exits_ends_nobody_elses(error: type[BaseException]) -> None:
    def at_once(_: Subject) -> None:
        raise error

    async def later(_: Subject) -> None:
        await asyncio.sleep(0)
        raise error

    with opened() as thread:
        jobs = thread.submit_all([at_once, later, note(1)])  # type: ignore[list-item]
        assert isinstance(jobs[0].exception(HANG), error)
        assert isinstance(jobs[1].exception(HANG), error)
        assert jobs[2].wait(HANG) == 1
        assert thread.call(note(2)) == 2


def test_a_failing_close_is_raised_where_it_is_closed_and_leaves_nothing() -> None:
    @asynccontextmanager
    async def opener() -> AsyncGenerator[int]:
        yield 1
        raise ZeroDivisionError

    before = set(threading.enumerate())
    thread = LoopThread.start(opener)
    with pytest.raises(ZeroDivisionError):
        thread.close()
    assert set(threading.enumerate()) <= before


class Refusing:
    """Work that ends when it is allowed to, and not when it is cancelled."""

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()
        self._may_end = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def work(self, _: Subject, secret: str) -> str:
        self._loop = asyncio.get_running_loop()
        self.begun.set()
        while not self._may_end.is_set():
            try:
                await self._may_end.wait()
            except asyncio.CancelledError:
                pass
        self.ended.set()
        return secret

    def allow(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._may_end.set)


def test_work_that_refuses_to_be_cancelled_is_left_behind_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvlayer.runtime.loop_thread._REFUSAL_SECONDS", 0.01)
    subject, refusing = Subject(), Refusing()

    @asynccontextmanager
    async def opener() -> AsyncGenerator[Subject]:
        yield subject
        subject.left = "clean"

    thread = LoopThread.start(opener)
    job = thread.submit(refusing.work, "geheim")
    assert refusing.begun.wait(HANG)
    assert not thread.left_behind  # nothing is, before it was closed
    thread.close()
    assert subject.left == "clean"
    with pytest.raises(CancelledError):
        job.wait(HANG)
    assert not job.has_ended  # what it was lent it has
    assert thread.left_behind == ("Refusing.work",)
    assert "1 pieces of work refuse to be cancelled" in caplog.text
    assert "Refusing.work" in caplog.text and "geheim" not in caplog.text
    assert thread._thread.daemon
    thread.close()  # again
    refusing.allow()
    thread._thread.join(HANG)
    assert not thread._thread.is_alive()
    assert refusing.ended.is_set() and job.has_ended
    assert not thread.left_behind


def test_a_loop_that_is_held_by_its_work_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvlayer.runtime.loop_thread._BLOCKED_SECONDS", 0.01)
    reached, go = threading.Event(), threading.Event()

    async def block(_: Subject) -> None:
        reached.set()
        go.wait(HANG)  # the point

    @asynccontextmanager
    async def opener() -> AsyncGenerator[Subject]:
        yield Subject()

    thread = LoopThread.start(opener)
    blocking = thread.submit(block)
    assert reached.wait(HANG)
    waiting = thread.submit(nothing)
    thread.close()
    for job in (blocking, waiting):
        with pytest.raises(CancelledError):
            job.wait(HANG)
    assert not blocking.has_ended
    assert [name.split(".")[-1] for name in thread.left_behind] == ["block"]
    assert "did not close: its loop has been held" in caplog.text
    go.set()
    thread._thread.join(HANG)
    assert not thread._thread.is_alive()
    assert blocking.has_ended and waiting.has_ended


def test_closing_takes_its_time_while_the_loop_takes_its_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache that writes what is queued is not given up."""
    may_end, subject = asyncio.Event(), Subject()
    rounds = 0

    @asynccontextmanager
    async def opener() -> AsyncGenerator[int]:
        yield 1
        await may_end.wait()
        subject.left = "clean"

    def waited(ended: list[Any], _: float) -> Any:
        nonlocal rounds
        rounds += 1
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), thread._loop).result(HANG)  # a turn
        if rounds < 3:
            return wait(ended, 0)  # the time is over, and it has not ended
        thread._loop.call_soon_threadsafe(may_end.set)
        return wait(ended, HANG)

    thread = LoopThread.start(opener)
    monkeypatch.setattr("kvlayer.runtime.loop_thread.wait", waited)
    thread.close()
    assert (rounds, subject.left) == (3, "clean")


@pytest.mark.parametrize("is_open", [True, False])
def test_a_task_that_nobody_knows_and_nobody_can_cancel_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    monkeypatch.setattr("kvlayer.runtime.loop_thread._REFUSAL_SECONDS", 0.01)
    refusing, threads = Refusing(), list[threading.Thread]()

    @asynccontextmanager
    async def opener() -> AsyncGenerator[int]:
        threads.append(threading.current_thread())
        task = asyncio.ensure_future(refusing.work(Subject(), ""))
        await asyncio.sleep(0)
        if not is_open:
            raise ZeroDivisionError
        yield 1
        assert not task.done()

    try:
        LoopThread.start(opener).close()
    except ZeroDivisionError:
        assert not is_open
    else:
        assert is_open
    assert not refusing.ended.is_set()
    refusing.allow()
    threads[0].join(HANG)
    assert not threads[0].is_alive()


def test_a_forked_child_can_neither_use_it_nor_hang_on_it() -> None:
    code = """
import asyncio, os, sys, warnings
from contextlib import asynccontextmanager
from kvlayer.errors import ForkedError
from kvlayer.runtime.loop_thread import LoopThread

@asynccontextmanager
async def opener():
    yield None

async def nothing(_): pass

async def lasting(_): await asyncio.sleep(3600)

thread = LoopThread.start(opener)
job = thread.submit(lasting)
warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads and fork
thread._gate.acquire()  # as any thread may hold it at this moment
pid = os.fork()
if not pid:
    refused = 0
    uses = (lambda: thread.submit(nothing), lambda: thread.call(nothing), thread.close, job.wait)
    for use in uses:
        try:
            use()
        except ForkedError as error:
            refused += bool(error.hint)
    sys.exit(10 + refused)  # through the handlers it inherited
thread._gate.release()
_, status = os.waitpid(pid, 0)
thread.call(nothing)
thread.close()
print(os.waitstatus_to_exitcode(status))
"""
    assert _python(code) == "14\n"


def test_an_interpreter_that_exits_without_closing_ends_cleanly() -> None:
    code = """
import asyncio, atexit, threading
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from kvlayer.runtime.loop_thread import LoopThread

answered = threading.Event()
atexit.register(lambda: print("answered" if answered.wait(300) else "left waiting"))

def wait_for(job):
    try:
        job.wait()
    except CancelledError:
        answered.set()

@asynccontextmanager
async def opener():
    try:
        yield None
    finally:
        print("left")

begun = threading.Event()

async def forever(_):
    begun.set()
    try:
        await asyncio.Event().wait()
    finally:
        print("ended")

thread = LoopThread.start(opener)  # and nobody closes it
threading.Thread(target=wait_for, args=[thread.submit(forever)], daemon=True).start()
begun.wait()
"""
    assert _python(code).split() == ["ended", "left", "answered"]


def test_an_interpreter_that_exits_does_not_wait_for_work_that_will_not_end() -> None:
    code = """
import threading
from contextlib import asynccontextmanager
from kvlayer.runtime import loop_thread

loop_thread._EXIT_SECONDS = 0.1

@asynccontextmanager
async def opener():
    yield None

begun = threading.Event()

async def block(_):
    begun.set()
    threading.Event().wait()

thread = loop_thread.LoopThread.start(opener)
thread.submit(block)
begun.wait()
print("exits")
"""
    assert _python(code) == "exits\n"


def _python(code: str) -> str:
    """What ``code`` prints in an interpreter of its own, which must end well and say nothing."""
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    # Development mode reports callbacks that take long, as they do on a busy machine.
    said = [line for line in ran.stderr.splitlines() if not line.startswith("Executing <")]
    assert (ran.returncode, said) == (0, [])
    return ran.stdout
