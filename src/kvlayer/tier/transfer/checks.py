"""The threads that checksum and decode, for all tiers of a cache: bounded, and queued by bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from kvlayer.runtime.offload import Offload

__all__ = ["CODED_AT_ONCE", "RAW_AT_ONCE", "Checks"]

RAW_AT_ONCE = 256 << 10
"""Bytes whose checksum takes 30 us, where waking a thread and being woken takes 90 us of CPU."""
CODED_AT_ONCE = 16 << 10
"""Bytes that any codec codes, or decodes, in about that time."""


class Checks:
    """Runs work over so many bytes on its threads, in the order it came.

    At most ``max_nbytes`` are under way, or one work that alone is larger; the rest waits here,
    where cancelling it costs nothing. What is done sooner than a thread is woken is done at once.
    """

    def __init__(self, threads: int, max_nbytes: int) -> None:
        self._offload = Offload(threads, "kvlayer-check")
        self._max_nbytes = max_nbytes
        self._nbytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def begin(self) -> None:
        """Start a thread: later the system may have none to give."""
        self._offload.begin()

    def close(self) -> None:
        """Wait for what runs and end the threads. Idempotent."""
        self._offload.close()

    async def run(
        self, work: Callable[[], None], nbytes: int, at_once: int = CODED_AT_ONCE
    ) -> None:
        """Run ``work``, which reads ``nbytes`` bytes. Cancelled, it returns once that has ended.

        No more than ``at_once`` bytes are done here and now. Raises what the work raises.
        """
        if nbytes <= at_once:
            work()
            return
        if self._waiting or not self._fits(nbytes):
            await self._turn(nbytes)
        else:
            self._nbytes += nbytes
        try:
            await self._offload.run(work)
        finally:
            self._nbytes -= nbytes
            self._next()

    def _fits(self, nbytes: int) -> bool:
        return not self._nbytes or self._nbytes + nbytes <= self._max_nbytes

    async def _turn(self, nbytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (nbytes, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was granted just then
                self._nbytes -= nbytes
            else:
                with suppress(ValueError):  # somebody's end has passed over it already
                    self._waiting.remove(entry)
            self._next()
            raise

    def _next(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            nbytes, turn = self._waiting.popleft()
            if not turn.done():
                self._nbytes += nbytes
                turn.set_result(None)
