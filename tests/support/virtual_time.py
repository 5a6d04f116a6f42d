"""An event loop whose clock stands still while there is work and jumps when there is none.

Deadlines, pauses and leases of hours pass in no time, and in the same order every time: nothing
depends on how busy the machine is. What a coroutine hands to threads takes no virtual time.

::

    @in_virtual_time
    async def test_a_lease_ends() -> None:
        await asyncio.sleep(3600)  # at once
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from heapq import heappop, heappush
from typing import Any, ParamSpec, TypeVar

__all__ = ["Stuck", "VirtualTimeLoop", "in_virtual_time", "run"]

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

    def call_at(self, when: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
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
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0) or self._loop.pass_idle(timeout):
            return events
        return super().select(None)


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` on a :class:`VirtualTimeLoop`."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """A plain function that runs the coroutine function ``test`` on a loop of its own."""

    @functools.wraps(test)
    def run_test(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(test(*args, **kwargs))

    return run_test
