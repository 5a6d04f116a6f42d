"""What stands between a request and a tier: a deadline and a bound on what is in flight.

A deadline frees the waiter, never the memory: the call goes on until the backend has really let go
of its buffers, and counts as an orphan meanwhile. When too much waits, or abandoned calls hold
every slot, work is refused at once instead of queued without limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["Busy", "Guard"]

T = TypeVar("T")


class Busy(Exception):  # noqa: N818  # a refusal, not an error: callers turn it into a cause
    """The tier has as much in flight as it may."""


class Guard:
    """Bounds one tier. ``deadline`` in seconds, ``max_inflight`` running calls.

    At most ``max_queued`` more wait for their turn.
    """

    def __init__(self, deadline: float, max_inflight: int, *, max_queued: int = 1024) -> None:
        self.deadline = deadline
        self.orphans = 0
        self._turns = asyncio.Semaphore(max_inflight)
        self._max_orphans = max_inflight
        self._max_tasks = max_inflight + max_queued
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def inflight(self) -> int:
        """Calls running or waiting for their turn."""
        return len(self._tasks)

    def start(
        self,
        call: Callable[[], Coroutine[Any, Any, T]],
        ended: Callable[[asyncio.Task[T]], None] | None = None,
    ) -> asyncio.Task[T]:
        """Run ``call()`` when it is its turn. Raises :class:`Busy` when too much waits.

        ``ended`` is called once, when the task is over in whatever way, before anyone who waits
        for the task learns of it: the place to give memory back.
        """
        if len(self._tasks) >= self._max_tasks or self.orphans >= self._max_orphans:
            raise Busy
        task = asyncio.get_running_loop().create_task(self._run(call))
        if ended is not None:
            task.add_done_callback(ended)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self._turns:
            return await call()

    async def wait(self, task: asyncio.Task[T]) -> bool:
        """Wait for a task until the deadline. False: it goes on, counted as an orphan.

        Cancelling the waiter leaves the task alone.
        """
        done, _ = await asyncio.wait({task}, timeout=self.deadline)
        if done:
            return True
        self.orphans += 1
        task.add_done_callback(self._came_back)
        return False

    def _came_back(self, _: asyncio.Task[Any]) -> None:
        self.orphans -= 1

    async def aclose(self) -> None:
        """Cancel everything in flight and wait until all lent memory is back."""
        for task in tuple(self._tasks):
            task.cancel()
        while self._tasks:
            await asyncio.wait(set(self._tasks))
