"""The one seam through which blocking work leaves the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from threading import Event, Lock
from traceback import clear_frames
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from kvlayer.errors import ClosedError
from kvlayer.runtime.threads import NoThreadError, Threads

__all__ = ["Offload", "settled"]

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


class _Call(Generic[T]):
    """One piece of work that either starts on a thread or is dropped before it starts.

    What it returned is kept here for who waits, and not by the thread that ran it: that may be at
    its last steps still when who waits closes the memory that the result refers to.
    """

    def __init__(
        self, work: Callable[[], T], waiting: set[_Call[Any]], todo: _Todo | None = None
    ) -> None:
        """``todo``: what it takes its works from, where there are several."""
        self._work: Callable[[], T] | None = work
        self._results: list[T] = []
        self._lock = Lock()
        self._waiting = waiting
        self.todo = todo
        waiting.add(self)

    def __call__(self) -> None:
        work = self._take()
        if work is not None:
            self._results.append(work())

    def result(self) -> T:
        """What the work has returned; once."""
        return self._results.pop()

    def drop(self) -> bool:
        """Whether the work was stopped before it started."""
        return self._take() is not None

    def _take(self) -> Callable[[], T] | None:
        with self._lock:
            work, self._work = self._work, None
        self._waiting.discard(self)
        return work


class _Todo:
    """Works that several threads take from, in order."""

    def __init__(self, works: Iterable[Callable[[], object]]) -> None:
        self._works = iter(works)
        self._lock = Lock()

    def take(self) -> Callable[[], object] | None:
        """The next one; None when all are taken, or no more may be."""
        with self._lock:
            return next(self._works, None)

    def stop(self) -> None:
        """Nothing is taken from now on, nor kept: an error may refer to this for long."""
        with self._lock:
            self._works = iter(())


class _Items(Generic[T]):
    """What one thread after the other goes over, in order."""

    def __init__(self, items: Iterable[T], offload: Offload) -> None:
        self._items = iter(items)
        self._offload = offload
        self._stopped = Event()
        self.is_done = False

    def some(self) -> Iterator[T]:
        """On a thread: at least one, if there are any; fewer than all where others wait for it."""
        for item in self._items:
            if self._stopped.is_set():  # while it was made
                return
            yield item
            self._offload.check_open()
            if self._stopped.is_set() or self._offload.is_wanted:
                return
        self.is_done = True

    def stop(self) -> None:
        """There are no more."""
        self._stopped.set()


class Offload:
    """A bounded pool of threads owned by one object, created on first use.

    Where no further thread can be started, those that were do the work. :meth:`begin` starts one,
    so that there is one.

    ``run`` never abandons running work: when the awaiting task is cancelled, ``run`` still
    waits for the thread to finish before it re-raises, so memory lent to the work is untouched by
    then. Work that has not started yet is dropped at once. Work that was lent nothing may use
    ``run_unlent``, which a stuck thread cannot hold up.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._name = name
        self._pool: Threads | None = None
        self._waiting: set[_Call[Any]] = set()
        """Submitted, and not started; threads look at it, too."""
        self._futures: set[asyncio.Future[Any]] = set()
        """What is waited for on the loop."""
        self._closed = False

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(*args, **kwargs)`` on a thread of the pool and return its result.

        Raises what the work raises, and ``ClosedError`` when the pool closes before it starts.
        """
        return await self._run(partial(work, *args, **kwargs), None)

    async def run_unlent(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """:meth:`run` for work that was lent no memory: cancelled, this raises at once.

        The thread goes on by itself, and what the work does then has no witness. Until it ends the
        pool has one thread less.
        """
        call: _Call[T] = _Call(partial(work, *args, **kwargs), self._waiting)
        future = self._submit(call)
        try:
            await asyncio.shield(future)
            return call.result()
        except asyncio.CancelledError:
            if not call.drop() and not future.done():
                future.add_done_callback(_forgotten)
            if future.cancelled() and not _is_cancelled():
                raise ClosedError(f"the thread pool {self._name!r} was closed") from None
            raise
        finally:
            del future, call

    async def run_over(
        self, work: Callable[[Iterator[Item]], object], items: Iterable[Item]
    ) -> None:
        """Run ``work`` over ``items``, which are made on its thread as it asks for them.

        Cancelling ends the items; like ``run``, this then waits for the work before it re-raises.
        Where others wait for a thread the items end early, too, and ``work`` is called again with
        those that are left. It must take all it is given. Raises what the work raises, and
        ``ClosedError`` when the pool closes before everything has been taken.
        """
        left = _Items(items, self)
        while not left.is_done:
            await self._run(lambda: work(left.some()), left.stop)

    async def _run(self, work: Callable[[], T], on_cancel: Callable[[], None] | None) -> T:
        call: _Call[T] = _Call(work, self._waiting)
        future = self._submit(call)
        try:
            await asyncio.shield(future)
            return call.result()
        except asyncio.CancelledError:
            if on_cancel is not None:
                on_cancel()
            if not call.drop():
                await settled(future)
            if future.cancelled() and not _is_cancelled():
                raise ClosedError(f"the thread pool {self._name!r} was closed") from None
            raise
        finally:
            # An exception's traceback refers to this frame, and the future to the exception: left
            # alone, the cycle would keep lent memory alive until the garbage collector comes by.
            del future, call, work, on_cancel

    async def run_all(self, works: Sequence[Callable[[], object]]) -> None:
        """Run ``works`` in order, on all threads that are free.

        A thread goes from one to the next by itself: the loop, which may be serving an engine, is
        not woken for each. Where other work waits, the threads take turns.

        The first that raises ends it, and so does cancelling: nothing else starts, and whatever
        runs has ended before this raises. Other errors than the first are dropped. Raises
        ``ClosedError`` when the pool closes before everything has started.
        """
        todo = _Todo(works)
        running: _Running = {}
        try:
            for _ in range(min(self._threads, len(works))):
                self._start(todo, running)
            while running:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for _ in range(self._take_ended(running)):
                    self._start(todo, running)
        finally:
            todo.stop()
            await _dropped(running)

    def _start(self, todo: _Todo, running: _Running) -> None:
        call = _Call(lambda: self._work_off(todo), self._waiting, todo)
        running[self._submit(call)] = call

    def _work_off(self, todo: _Todo) -> bool:
        """On a thread. False: there may be more to do, but others wait for the thread."""
        while (work := todo.take()) is not None:
            self.check_open()
            try:
                work()
            except BaseException:
                todo.stop()  # at once: the loop hears of it later
                raise
            del work  # it may hold what the next waits for
            # Its own threads may start late: one that takes all the works makes nobody wait.
            if any(call.todo is not todo for call in tuple(self._waiting)):
                return False
        return True

    def _take_ended(self, running: _Running) -> int:
        """Remove what has ended; raise the first error among it, or say how much has to go on."""
        ended = [future for future in running if future.done()]
        calls = [running.pop(future) for future in ended]
        errors = [error for error in map(self._error, ended) if error is not None]
        _unheard(errors[1:])
        try:
            if errors:
                raise errors[0]
            return sum(not call.result() for call in calls)
        finally:
            # As in run: what is raised refers to this frame.
            del ended, calls, errors

    def _error(self, ended: asyncio.Future[None]) -> BaseException | None:
        if ended.cancelled():
            return ClosedError(f"the thread pool {self._name!r} was closed")
        return ended.exception()

    def _submit(self, call: _Call[Any]) -> asyncio.Future[None]:
        if self._closed:
            raise ClosedError(f"the thread pool {self._name!r} is closed")
        try:
            future = asyncio.get_running_loop().run_in_executor(self._started(), call)
        except NoThreadError:
            call.drop()  # queued all the same, for a thread that may come when nobody waits
            raise
        except RuntimeError:
            call.drop()
            detail = f"the thread pool {self._name!r} ends with the interpreter"
            raise ClosedError(detail) from None
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def _started(self) -> Threads:
        if self._pool is None:
            self._pool = Threads(self._threads, self._name)
        return self._pool

    @property
    def is_wanted(self) -> bool:
        """Whether something waits for a thread. Threads ask, too."""
        return bool(self._waiting)

    def check_open(self) -> None:
        """Raise ``ClosedError`` once the pool has been closed. Threads ask, too."""
        if self._closed:
            raise ClosedError(f"the thread pool {self._name!r} was closed")

    def begin(self) -> None:
        """Start a thread: while opening, where failing is still an error that somebody handles.

        Raises ``RuntimeError`` when the system gives none.
        """
        self._started().submit(int)

    def close(self, seconds: float | None = None) -> int:
        """Drop waiting work and end the threads. Idempotent. Blocks until running work has ended.

        With ``seconds``, on the loop, no longer than that: threads that are still at work are left
        to it, with whatever memory they were lent, and who waits for them gets ``ClosedError``.
        Returns how many; they do not hold up the end of the process.
        """
        self._closed = True
        pool, self._pool = self._pool, None
        if pool is None:
            return 0
        stuck = pool.end(seconds)
        self._waiting.clear()
        if stuck:
            for future in tuple(self._futures):
                future.cancel()
        return stuck


_Running: TypeAlias = dict[asyncio.Future[None], _Call[bool]]


async def _dropped(running: _Running) -> None:
    """Let nothing more of ``running`` start, and wait for what has; leaves it empty."""
    started = [future for future, call in running.items() if not call.drop()]
    running.clear()
    for future in started:
        await settled(future)


async def settled(future: asyncio.Future[Any]) -> None:
    """Wait until ``future`` is done whatever its outcome, outliving further cancellations."""
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            continue
    if not future.cancelled() and (error := future.exception()) is not None:
        _unheard([error])


def _forgotten(future: asyncio.Future[Any]) -> None:
    """Work that nobody waited for has ended."""
    if not future.cancelled() and (error := future.exception()) is not None:
        _unheard([error])


def _is_cancelled() -> bool:
    """Whether this task was cancelled. A frame that held the task would be a cycle: see run."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _unheard(errors: Iterable[BaseException]) -> None:
    """Errors nobody gets: the caller was cancelled, or has another one.

    Their frames let go of lent memory now, not when the thread lets go of the error.
    """
    for error in errors:
        clear_frames(error.__traceback__)
