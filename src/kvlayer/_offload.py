"""The one seam through which blocking work leaves the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Generic, ParamSpec, TypeVar, cast

from kvlayer.errors import ClosedError

__all__ = ["Offload"]

P = ParamSpec("P")
T = TypeVar("T")


class _Call(Generic[T]):
    """One piece of work that either starts on a thread or is dropped before it starts."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._lock = Lock()

    def __call__(self) -> T | None:
        with self._lock:
            work, self._work = self._work, None
        return work() if work is not None else None

    def drop(self) -> bool:
        """Whether the work was stopped before it started."""
        with self._lock:
            waiting, self._work = self._work is not None, None
        return waiting


class Offload:
    """A bounded pool of threads owned by one object, created on first use.

    ``run`` never abandons running work: when the awaiting task is cancelled, ``run`` still
    waits for the thread to finish before it re-raises, so memory lent to the work is untouched by
    then. Work that has not started yet is dropped at once.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work(*args, **kwargs)`` on a thread of the pool and return its result.

        Raises what the work raises, and ``ClosedError`` when the pool closes before it starts.
        """
        if self._closed:
            raise ClosedError(f"the thread pool {self._name!r} is closed")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix=self._name)
        call: _Call[T] = _Call(lambda: work(*args, **kwargs))
        future = asyncio.get_running_loop().run_in_executor(self._pool, call)
        try:
            return cast(T, await asyncio.shield(future))  # None only for work that was dropped
        except asyncio.CancelledError:
            if not call.drop():
                await _settled(future)
            task = asyncio.current_task()
            if future.cancelled() and task is not None and not task.cancelling():
                raise ClosedError(f"the thread pool {self._name!r} was closed") from None
            raise
        finally:
            # An exception's traceback refers to this frame, and the future to the exception: left
            # alone, the cycle would keep lent memory alive until the garbage collector comes by.
            del future, call

    def close(self) -> None:
        """Drop waiting work, wait for running work and end the threads. Idempotent. Blocks."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


async def _settled(future: asyncio.Future[T]) -> None:
    """Wait until ``future`` is done whatever its outcome, outliving further cancellations."""
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()  # retrieved: the caller was cancelled and no longer wants it
