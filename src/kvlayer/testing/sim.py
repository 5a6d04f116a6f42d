"""The simulator: event loops whose clock jumps, and whose every choice follows from a seed.

:class:`VirtualTimeLoop` lets deadlines, pauses and leases of hours pass in no time, and in the same
order every time; what goes to threads still does. :class:`SeededLoop` has no threads and leaves
nothing to chance: which of the ready callbacks is next, and how long blocking work takes, is drawn
from its seed, so that thousands of seeds are thousands of schedules and a seed that fails fails
again. The idea is FoundationDB's (J. Zhou et al., "FoundationDB", SIGMOD 2021, section 4).

::

    @in_virtual_time
    async def test_a_lease_ends() -> None:
        await asyncio.sleep(3600)  # at once

    for seed in range(1000):
        run(scenario(), seed=seed)
"""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextlib import contextmanager
from heapq import heappop, heappush
from itertools import count
from typing import Any, Generic, ParamSpec, TypeVar, cast
from unittest import mock

from kvlayer.tier.guard import guard

__all__ = ["Awaits", "SeededLoop", "Stuck", "VirtualTimeLoop", "in_virtual_time", "run"]

P = ParamSpec("P")
T = TypeVar("T")

_SAME = 1e-9  # seconds; timers closer than this ring together


class Stuck(RuntimeError):  # noqa: N818  # what the loop is
    """Every task waits, no timer is set and no thread works for the loop: nothing would happen."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time begins at 0.0 and moves only when nothing is ready: to the next timer, exactly.

    While work that went to threads through ``run_in_executor`` is running, the loop waits for it
    and time stands still. Sockets, subprocesses and other threads do not stop the clock: keep them
    on a loop that lives in real time. Raises :class:`Stuck` where a real loop would hang.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._rings: list[float] = []
        """When timers were set to ring, the earliest first; cancelled and past ones included."""
        self._outside = 0
        """Pieces of work that threads are doing for this loop."""
        super().__init__(_Idle(self))

    def time(self) -> float:
        return self._now

    def call_at(  # type: ignore[override]  # passed on as it comes
        self, when: float, *args: Any, **kwargs: Any
    ) -> asyncio.TimerHandle:
        heappush(self._rings, when)
        return super().call_at(when, *args, **kwargs)

    def run_in_executor(  # type: ignore[override]  # typeshed says so too: it is no coroutine
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._outside += 1
        future.add_done_callback(self._came_back)
        return future

    async def shutdown_default_executor(self, *args: Any) -> None:
        self._outside += 1  # a thread of its own waits for the pool
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self._outside -= 1

    def _came_back(self, _: asyncio.Future[Any]) -> None:
        self._outside -= 1

    def pass_idle(self, seconds: float | None) -> bool:
        """Nothing is ready for ``seconds`` (None: for ever). False: wait for threads instead."""
        if self._outside:
            return False
        if seconds is None:
            waiting = "\n  ".join(sorted(map(repr, asyncio.all_tasks(self))))
            raise Stuck(f"at {self._now} s nothing will ever happen; waiting:\n  {waiting}")
        at = self._now + seconds
        while self._rings and self._rings[0] < at - _SAME:
            heappop(self._rings)
        # The sum is rounded: a timer finds exactly its own time. Close ones ring together, none
        # before its time: it would be set again for the same one, for ever.
        if self._rings and self._rings[0] < at + _SAME:
            at = self._rings[0]
        while self._rings and self._rings[0] < at + _SAME:
            at = max(at, heappop(self._rings))
        self._now = max(at, self._now)
        return True


class _Idle(selectors.DefaultSelector):
    """Looks for events without waiting, and lets the loop's clock jump where there are none."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if isinstance(self._loop, SeededLoop):  # nothing comes from outside: not worth a call
            if timeout is None or timeout > 0:
                self._loop.pass_idle(timeout)
            return []
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0) or self._loop.pass_idle(timeout):
            return events
        return super().select(None)


class SeededLoop(VirtualTimeLoop):
    """A :class:`VirtualTimeLoop` that draws from ``seed`` whatever a real loop leaves to chance.

    **Order.** Of all ready callbacks any may be next. Those of one future keep their order. A real
    loop takes them as they came, but in which order they come depends on sockets, threads and
    timers, which are not simulated: that is what is explored.

    **Threads.** Blocking work runs inline, at one instant: after a drawn time of ``work_seconds``
    on average (mostly none), and its end is known to the loop after another. Work that blocks on
    other work would wait for ever. Work of an executor that was shut down before it began is
    cancelled, as a pool's is. Nothing may be called from other threads.

    **Repeating.** Equal programs and seeds take equal steps, in any process: tasks and futures
    hash by their number, so that a set of them has one order. With ``trace`` every step appends
    a line: the time, and what runs. Raises :class:`Stuck` where a real loop would hang.
    """

    def __init__(
        self, seed: int, *, work_seconds: float = 0.001, trace: list[str] | None = None
    ) -> None:
        super().__init__()
        self.chance = random.Random(seed)  # noqa: S311  # a schedule, not a secret
        """What the loop draws from. Others shall have sources of their own."""
        self._work_seconds = work_seconds
        self._numbers = count(1)
        # CPython keeps what is ready in a deque of handles, and takes from its left.
        self._ready = _Ready(self, trace)
        self.set_task_factory(_numbered_task)

    def number(self) -> int:
        """The next number of a task or future."""
        return next(self._numbers)

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self)

    def run_in_executor(  # type: ignore[override]  # as in the class above
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        self._later(self._begin, future, executor, functools.partial(func, *args))
        return future

    def _later(self, what: Callable[..., object], *args: Any) -> None:
        if self.chance.random() < 0.7:
            self.call_soon(what, *args)
        else:
            self.call_later(self.chance.expovariate(1.0) * self._work_seconds, what, *args)

    def _begin(
        self, future: asyncio.Future[T], executor: Executor | None, work: Callable[[], T]
    ) -> None:
        if future.cancelled():
            return
        if getattr(executor, "_shutdown", False):
            future.cancel()
            return
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001  # as a pool does: it belongs to who waits
            self._later(_fail, future, exc)
        else:
            self._later(_finish, future, result)


def _finish(future: asyncio.Future[T], result: T) -> None:
    if not future.cancelled():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.cancelled():
        future.set_exception(error)


class _Ready(deque[asyncio.Handle]):
    """What is ready to run; the next one is drawn."""

    def __init__(self, loop: SeededLoop, trace: list[str] | None) -> None:
        super().__init__()
        self._loop = loop
        self._trace = trace

    def popleft(self) -> asyncio.Handle:
        at = 0
        if len(self) > 1:
            at = int(self._loop.chance.random() * len(self))
            if args := _args(self[at]):  # the callbacks of a future get that future
                at = next(i for i, each in enumerate(self) if _args(each)[:1] == args[:1])
        handle = self[at]
        del self[at]
        if self._trace is not None and not handle.cancelled():
            self._trace.append(f"{self._loop.time():.9f} {_name(handle)}")
        return handle


def _args(handle: asyncio.Handle) -> tuple[Any, ...]:
    args: Any = getattr(handle, "_args", None) or ()
    return args if args and isinstance(args[0], asyncio.Future) else ()


def _name(handle: asyncio.Handle) -> str:
    """What a handle runs; of a task also the line it is at."""
    callback: Any = getattr(handle, "_callback", None)
    while isinstance(callback, functools.partial):
        callback = cast("Any", callback).func
    task = getattr(callback, "__self__", None)
    if not isinstance(task, _Task):
        return str(getattr(callback, "__qualname__", type(callback).__name__))
    coro: Any = task.get_coro()
    names: list[str] = []
    while (frame := getattr(coro, "cr_frame", None)) is not None:
        names.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        coro = coro.cr_await
    return f"task {hash(task)} {' '.join(names)}"


class _Future(asyncio.Future[Any]):
    """A future that hashes by its number: no memory address decides the order of a set."""

    def __init__(self, *, loop: SeededLoop) -> None:
        self._number = loop.number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number

    __eq__ = object.__eq__


class _Task(asyncio.Task[Any]):
    """A task that hashes by its number."""

    def __init__(self, coro: Any, *, loop: SeededLoop, **rest: Any) -> None:
        self._number = loop.number()
        super().__init__(coro, loop=loop, **rest)

    def __hash__(self) -> int:
        return self._number

    __eq__ = object.__eq__


def _numbered_task(loop: Any, coro: Any, **rest: Any) -> _Task:
    return _Task(coro, loop=loop, **rest)


def run(
    main: Coroutine[Any, Any, T],
    *,
    seed: int | None = None,
    work_seconds: float = 0.001,
    trace: list[str] | None = None,
) -> T:
    """``asyncio.run`` in virtual time: on a :class:`SeededLoop` if there is a ``seed``.

    With a seed the ``random`` module and the pauses of guards follow from it too, and are as they
    were before when this returns; the garbage collector, whose finalizers would run at some step
    or other, waits until then.
    """
    if seed is None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main)
    loop = functools.partial(SeededLoop, seed, work_seconds=work_seconds, trace=trace)
    with _seeded(seed), asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(main)


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    before, collects = random.getstate(), gc.isenabled()
    random.seed(seed)
    gc.disable()
    try:
        with mock.patch.object(guard, "Random", functools.partial(_derived, random.getrandbits)):
            yield
    finally:
        random.setstate(before)
        if collects:
            gc.enable()


def _derived(bits: Callable[[int], int]) -> random.Random:
    return random.Random(bits(64))  # noqa: S311  # the pauses of a breaker


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """A plain function that runs the coroutine function ``test`` on a loop of its own."""

    @functools.wraps(test)
    def run_test(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(test(*args, **kwargs))

    return run_test


class Awaits(Generic[T]):
    """A coroutine whose awaits are counted, to cancel it at each of them in turn. Await it once.

    At await number ``cancel_at`` (from 1; 0: never) the running task is cancelled, as if somebody
    else had done so while it waited there. An await that does not suspend is none.
    """

    def __init__(self, work: Coroutine[Any, Any, T], cancel_at: int = 0) -> None:
        self._work = work
        self._cancel_at = cancel_at
        self.count = 0
        """How often the coroutine has waited."""

    def __await__(self) -> Generator[Any, Any, T]:
        task = asyncio.current_task()
        assert task is not None, "awaited outside of a task"
        step = functools.partial(self._work.send, None)
        while True:
            try:
                waits = step()
            except StopIteration as end:
                return cast("T", end.value)
            self.count += 1
            if self.count == self._cancel_at:
                task.cancel()
            try:
                step = functools.partial(self._work.send, (yield waits))
            except BaseException as exc:  # noqa: BLE001  # thrown on, whatever it is
                step = functools.partial(self._work.throw, exc)
