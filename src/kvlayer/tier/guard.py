"""What stands between a request and a tier: a deadline and a bound on what is in flight.

A deadline frees the waiter, never the memory: the call goes on until the backend has really let go
of its buffers, and counts as an orphan meanwhile. When too much waits, or abandoned calls hold
every slot, work is refused at once instead of queued without limit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Generic, TypeVar

__all__ = ["Busy", "Call", "Guard"]

T = TypeVar("T")


class Busy(Exception):  # noqa: N818  # a refusal, not an error: callers turn it into a cause
    """The tier has as much in flight as it may."""


class Call(Generic[T]):
    """One call to a tier. It has *ended* once its outcome was booked, not merely computed."""

    __slots__ = ("_ended", "_task")

    def __init__(self, task: asyncio.Task[T], booked: Callable[[Call[T]], None] | None) -> None:
        self._task = task
        self._ended: asyncio.Future[None] = task.get_loop().create_future()

        def book(_: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # seen: whoever waits asks for it, a hint may fail unheard
            try:
                if booked is not None:
                    booked(self)
            finally:
                self._ended.set_result(None)

        task.add_done_callback(book)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    def cancel(self) -> None:
        """Ask it to stop. It ends when the backend has let go of what it was lent."""
        self._task.cancel()

    @property
    def error(self) -> BaseException | None:
        """What it raised, ``CancelledError`` included; None when there is a result."""
        if self._task.cancelled():
            return asyncio.CancelledError()
        return self._task.exception()

    @property
    def was_cancelled(self) -> bool:
        """Whether it ended by being cancelled."""
        return self._task.cancelled()

    def result(self) -> T:
        """Its result. Raises what it raised."""
        return self._task.result()

    @staticmethod
    async def any_ended(calls: Iterable[Call[Any]], seconds: float) -> bool:
        """Wait until one of ``calls`` has ended, at most ``seconds``."""
        done, _ = await asyncio.wait(
            {call._ended for call in calls}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        return bool(done)

    async def ended(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most ``seconds``. Cancelling the waiter leaves it alone."""
        done, _ = await asyncio.wait({self._ended}, timeout=seconds)
        return bool(done)


class Guard:
    """Bounds one tier. ``deadline`` in seconds, ``max_inflight`` running calls.

    At most ``max_queued`` more wait for their turn.
    """

    def __init__(self, deadline: float, max_inflight: int, *, max_queued: int = 1024) -> None:
        self.deadline = deadline
        self._orphans: set[Call[Any]] = set()
        self._is_closing = False
        self._turns = asyncio.Semaphore(max_inflight)
        self._max_orphans = max_inflight
        self._max_calls = max_inflight + max_queued
        self._calls: set[Call[Any]] = set()

    @property
    def orphans(self) -> int:
        """Calls that someone waited for until the deadline and that have not ended yet."""
        return len(self._orphans)

    @property
    def inflight(self) -> int:
        """Calls running or waiting for their turn."""
        return len(self._calls)

    def start(
        self,
        call: Callable[[], Coroutine[Any, Any, T]],
        booked: Callable[[Call[T]], None] | None = None,
    ) -> Call[T]:
        """Run ``call()`` when it is its turn.

        Raises :class:`Busy` when too much waits, and once :meth:`aclose` was called.

        ``booked`` is called once when the call is over, in whatever way, before anyone who waits
        for it goes on: the place to give memory back.
        """
        is_full = len(self._calls) >= self._max_calls or self.orphans >= self._max_orphans
        if is_full or self._is_closing:
            raise Busy

        def book(ended: Call[T]) -> None:
            self._calls.discard(ended)
            self._orphans.discard(ended)
            if booked is not None:
                booked(ended)

        started = Call(asyncio.get_running_loop().create_task(self._run(call)), book)
        self._calls.add(started)
        return started

    def hint(self, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run ``call()`` for no one: not at all when busy, cancelled at the deadline."""

        def book(_: Call[object]) -> None:
            expiry.cancel()

        try:
            started = self.start(call, book)
        except Busy:
            return
        expiry = asyncio.get_running_loop().call_later(self.deadline, started.cancel)

    async def settle(self, calls: Iterable[Call[Any]]) -> set[Call[Any]]:
        """Wait for calls while one of them ends within each deadline.

        Returns those that were given up: they go on, counted as orphans.
        """
        left = {call for call in calls if not call.has_ended}
        while left:
            if not await Call.any_ended(left, self.deadline):
                self._orphans |= left
                break
            left = {call for call in left if not call.has_ended}
        return left

    async def _run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self._turns:
            return await call()

    async def wait(self, call: Call[Any]) -> bool:
        """Wait for a call until the deadline. False: it goes on, counted as an orphan.

        Cancelling the waiter leaves the call alone.
        """
        if await call.ended(self.deadline):
            return True
        self._orphans.add(call)
        return False

    async def aclose(self) -> None:
        """Admit nothing more, cancel everything in flight, wait until all lent memory is back."""
        self._is_closing = True
        while self._calls:
            call = next(iter(self._calls))
            for each in self._calls:
                each.cancel()
            await call.ended()
