"""An event loop on a thread of its own, and the one object that lives on it.

Work crosses to the loop in batches: whatever is posted before the loop wakes shares one wake-up.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future, wait
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import Context, copy_context
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from kvlayer._values import callee
from kvlayer.errors import ClosedError, ForkedError, UnsupportedError
from kvlayer.runtime.job import Job

__all__ = ["LoopThread"]

S = TypeVar("S")
T = TypeVar("T")
P = ParamSpec("P")

_log = logging.getLogger(__name__)

_TURN = 128  # entries per turn of the loop: a flood of work must not hold it for milliseconds
_EXIT_SECONDS = 5.0  # what an interpreter that exits waits for a portal nobody closed
_REFUSAL_SECONDS = 5.0  # what cancelled work has to end: a copy that must be over first takes less
_BLOCKED_SECONDS = 30.0  # how long a closing loop may hold its thread without a turn


class LoopThread(Generic[S]):
    """Runs coroutines with ``subject`` on its loop, for any number of threads. Thread-safe.

    Made by :meth:`start`. Close it with :meth:`close` or leave its ``with`` block: every job is
    answered, with its result or by being cancelled, before that returns. Work that refuses to be
    cancelled has five seconds; then it is left behind on its thread, a daemon: see
    :attr:`left_behind`.
    """

    def __init__(self, subject: S, loop: asyncio.AbstractEventLoop) -> None:
        self.subject = subject
        self._loop = loop
        self._thread = threading.current_thread()
        self._ident = threading.get_ident()
        self._pid = os.getpid()
        self._ended: Future[None] = Future()
        self._leaving = asyncio.Event()
        self._tasks: dict[Job[Any], asyncio.Task[Any]] = {}
        self._gate = threading.Lock()
        """Guards what follows: everything posted before it closed is run or answered."""
        self._inbox: deque[Callable[[], None]] = deque()
        self._is_woken = False
        self._is_closed = False
        self._is_abandoned = False

    # -- opening and closing ---------------------------------------------------------------------

    @classmethod
    def start(
        cls, opener: Callable[[], AbstractAsyncContextManager[S]], *, name: str = "kvlayer-portal"
    ) -> Self:
        """Enter ``opener()`` on the loop of a new thread. Raises what entering it raises."""
        opened: Future[Self] = Future()
        thread = threading.Thread(target=partial(cls._run, opener, opened), name=name, daemon=True)
        thread.start()
        try:
            started = opened.result()
        except KeyboardInterrupt:  # nobody will use it: it closes once it is open
            opened.add_done_callback(cls._leave_unused)
            raise
        except BaseException:
            thread.join(_REFUSAL_SECONDS)
            raise
        atexit.register(started._at_exit)
        return started

    @classmethod
    def _run(
        cls, opener: Callable[[], AbstractAsyncContextManager[S]], opened: Future[Self]
    ) -> None:
        started: list[Self] = []

        async def serve() -> None:
            async with opener() as subject:
                self = cls(subject, asyncio.get_running_loop())
                started.append(self)
                opened.set_result(self)
                try:
                    await self._serve()
                finally:
                    self._refuse()  # also when the loop dies of a SystemExit in some work

        error: BaseException | None = None
        with asyncio.Runner() as runner:
            try:
                runner.run(serve())
            except _Abandoned:
                pass
            except BaseException as exc:  # noqa: BLE001  # carried to the thread that waits
                error = exc
            # Said before the runner ends: it waits for whatever does not end when cancelled.
            if started:
                started[0]._say_ended(error)
            else:
                assert error is not None
                opened.set_exception(error)

    def _say_ended(self, error: BaseException | None) -> None:
        self._run_entries(len(self._inbox))
        self._give_up()
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    @classmethod
    def _leave_unused(cls, opened: Future[Self]) -> None:
        if opened.exception() is None:
            opened.result()._leave(abandon=True)

    def close(self, *, abandon: bool = False) -> None:
        """Cancel what runs, close the subject, end the thread. Idempotent.

        ``abandon`` leaves as an exception would: a cache then writes nothing more to its lower
        tiers. Raises what closing raised, and ``UnsupportedError`` on the loop's own thread. Where
        a piece of work holds the loop itself, this gives up after half a minute without a turn.
        """
        self._check_process()
        if threading.get_ident() == self._ident:
            raise UnsupportedError(
                "the loop's own thread cannot wait for itself to end",
                hint="close it from the thread that opened it",
            )
        self._leave(abandon=abandon)
        has_ended = self._wait_for_end()
        atexit.unregister(self._at_exit)
        if not has_ended:
            self._give_up()
            _log.error(
                "%s did not close: its loop has been held for %g s. Left behind: %s",
                self._thread.name,
                _BLOCKED_SECONDS,
                ", ".join(self.left_behind) or "no work of its own",
            )
            return
        if names := self.left_behind:
            said = "%s was closed. %d pieces of work refuse to be cancelled and are left behind: %s"
            _log.warning(said, self._thread.name, len(names), ", ".join(names))
        else:
            self._thread.join(_REFUSAL_SECONDS)
        self._ended.result()

    def _wait_for_end(self) -> bool:
        """Whether it ended. Closing may take its time, as long as the loop takes its turns."""
        while True:
            turned = threading.Event()
            with suppress(RuntimeError):  # the loop is closed: it has ended
                self._loop.call_soon_threadsafe(turned.set)
            if wait([self._ended], _BLOCKED_SECONDS).done:
                return True
            if not turned.is_set():
                return False

    @property
    def left_behind(self) -> tuple[str, ...]:
        """What goes on although this was closed, by name: work that refuses to be cancelled.

        It keeps its thread, and whatever it was lent, until it ends.
        """
        if not self._is_closed:
            return ()
        tasks = tuple(self._tasks.values())
        return tuple(task.get_name() for task in tasks if not task.done())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(abandon=error is not None)

    def _leave(self, *, abandon: bool) -> None:
        self._is_abandoned = self._is_abandoned or abandon
        self._refuse()
        with suppress(RuntimeError):  # the loop has died already: ``_ended`` says of what
            self._loop.call_soon_threadsafe(self._leaving.set)

    def _refuse(self) -> None:
        with self._gate:
            self._is_closed = True

    def _at_exit(self) -> None:
        """The interpreter exits and nobody closed this: its thread must not be caught at work."""
        if os.getpid() != self._pid:
            return  # a forked child inherits the registration, not the thread
        self._leave(abandon=False)
        self._thread.join(_EXIT_SECONDS)

    async def _serve(self) -> None:
        await self._leaving.wait()
        self._part()
        self._run_entries(len(self._inbox))
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=_REFUSAL_SECONDS)
            await asyncio.sleep(0)  # their jobs are answered by callbacks of the same turn
        if self._is_abandoned:
            raise _Abandoned  # tells Cache.open not to flush

    def _part(self) -> None:
        """Closing begins, on the loop. For subjects whose work would not end when cancelled."""

    def _give_up(self) -> None:
        """Nobody may wait for what is not answered; what goes on has not ended for its job, too."""
        begin: list[partial[Any]] = [
            entry for entry in tuple(self._inbox) if isinstance(entry, partial)
        ]
        waiting = [entry.args[0] for entry in begin if entry.func == self._begin]
        for job in (*tuple(self._tasks), *waiting):
            job.cancel()

    # -- work ------------------------------------------------------------------------------------

    def submit(
        self,
        work: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Job[T]:
        """Start ``work(subject, *args, **kwargs)`` on the loop; a job to poll or wait for.

        Work begins in the order it was submitted, and not at all when it was cancelled before.
        Raises ``ClosedError`` and ``ForkedError``.
        """
        job: Job[T] = Job(self._ident, self._stop)
        bound = partial(callee("work", work), self.subject, *args, **kwargs)
        self.post([partial(self._begin, job, bound, copy_context())])
        return job

    def submit_all(self, works: Iterable[Callable[[S], Coroutine[Any, Any, T]]]) -> list[Job[T]]:
        """Start every ``work(subject)`` in one hop; a job for each. See :meth:`submit`."""
        jobs: list[Job[T]] = []
        entries: list[Callable[[], None]] = []
        context = copy_context()
        for work in works:
            job: Job[T] = Job(self._ident, self._stop)
            bound = partial(callee("work", work), self.subject)
            jobs.append(job)
            entries.append(partial(self._begin, job, bound, context))
        self.post(entries)
        return jobs

    def call(
        self,
        work: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run ``work(subject, *args, **kwargs)`` on the loop and wait for its result.

        Raises ``ClosedError`` when it is closed meanwhile, and ``UnsupportedError`` on the loop's
        own thread, which it would block: await there.
        """
        if threading.get_ident() == self._ident:
            raise UnsupportedError(
                "call waits, so it cannot run on the portal's own loop",
                hint="await the cache's own methods there, or use submit",
            )
        job = self.submit(work, *args, **kwargs)
        try:
            return job.result()
        except CancelledError:
            raise ClosedError("the portal was closed while this call was running") from None
        except KeyboardInterrupt:
            job.cancel()
            raise

    def post(self, entries: Iterable[Callable[[], None]]) -> None:
        """Call every entry on the loop's thread, in order and soon; they must not raise.

        Raises ``ClosedError`` and ``ForkedError``; then none is called.
        """
        self._check_process()
        with self._gate:
            self._check_open()
            self._inbox.extend(entries)
            wake, self._is_woken = not self._is_woken, True
        if wake:
            with suppress(RuntimeError):  # the loop has died: its thread answers what is left
                self._loop.call_soon_threadsafe(self._take)

    def check_open(self) -> None:
        """Raise ``ClosedError`` or ``ForkedError`` unless work may be posted."""
        self._check_process()
        self._check_open()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the portal is closed", hint="use it inside `with Portal.open`")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"the portal was opened in process {self._pid} and used in {os.getpid()}",
                hint="open a portal in each process, after the fork",
            )

    # -- on the loop -----------------------------------------------------------------------------

    def _take(self) -> None:
        """Run what was posted, a bounded number of entries each turn."""
        with self._gate:
            count = len(self._inbox)
            self._is_woken = count > _TURN
        if count > _TURN:
            self._loop.call_soon(self._take)
        self._run_entries(min(count, _TURN))

    def _run_entries(self, count: int) -> None:
        for _ in range(count):
            self._inbox.popleft()()

    def _begin(
        self, job: Job[T], work: Callable[[], Coroutine[Any, Any, T]], context: Context
    ) -> None:
        if self._is_closed or job.cancelled():
            job.drop()
            return
        # In its submitter's context: that of whoever woke the loop is another request's.
        task = self._loop.create_task(_contained(work), name=_name(work), context=context)
        self._tasks[job] = task
        task.add_done_callback(partial(self._end, job))

    def _end(self, job: Job[T], task: asyncio.Task[T | _Raised]) -> None:
        if self._tasks.pop(job, None) is None:
            return
        if task.cancelled():
            job.drop()
            return
        error, result = task.exception(), None
        if error is None:
            result = task.result()
            if not isinstance(result, _Raised):
                job.answer(result)
                return
            error = result.error
        if not job.fail(error):
            self._loop.call_exception_handler(
                {"message": "cancelled work failed", "exception": error, "task": task}
            )

    def _stop(self, job: Job[Any]) -> None:
        """A job was cancelled by its user: the work is to end, too."""
        with suppress(ClosedError, ForkedError):  # closing cancels everything anyway
            self.post([partial(self._cancel, job)])

    def _cancel(self, job: Job[Any]) -> None:
        task = self._tasks.get(job)
        if task is not None:
            task.cancel()


def _name(work: Callable[..., object]) -> str:
    """What to call it: no argument of its may stand in a log."""
    while isinstance(work, partial):
        work = work.func
    return getattr(work, "__qualname__", type(work).__qualname__)


class _Raised:
    """What would have ended the loop, and everybody's work with it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _contained(work: Callable[[], Coroutine[Any, Any, T]]) -> T | _Raised:
    """``await work()``; what asyncio would raise out of the loop is the waiter's alone."""
    try:
        return await work()
    except (SystemExit, KeyboardInterrupt) as exc:
        return _Raised(exc)


class _Abandoned(Exception):  # noqa: N818  # a signal to Cache.open, never seen outside
    """The block was left by an exception."""
