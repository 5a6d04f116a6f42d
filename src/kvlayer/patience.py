"""How long a store waits for room: for seconds, until it is told to stop, or while it helps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from math import inf

from kvlayer._values import waiting

__all__ = ["Patience"]


class Patience:
    """Given to ``Cache.store``, which waits at most ``seconds`` (None: no limit) for room.

    Room comes as lower tiers write what host memory holds; where none would, nothing waits.
    :meth:`end` ends the waiting at once: an engine calls it when it wants its blocks back. Any
    thread may. Several stores, on any loops, may have the same one: all of them end then.
    """

    def __init__(self, seconds: float | None = None) -> None:
        limit = waiting("patience", seconds)
        self._seconds = inf if limit is None else limit
        self._has_ended = False
        self._until: float | None = None
        self._wakes: list[Callable[[], None]] = []
        """Of each store that waits now. Threads look at it, too."""

    @classmethod
    def of(cls, patience: Patience | float | None) -> Patience:
        """The same, or one of so many seconds."""
        return patience if isinstance(patience, Patience) else cls(patience)

    def end(self) -> None:
        """Wait no more."""
        self._has_ended = True
        for wake in tuple(self._wakes):
            wake()

    def left(self, now: float) -> float:
        """Seconds it still waits; they count from the first time it is asked."""
        if self._has_ended:
            return 0.0
        if self._until is None:
            self._until = now + self._seconds
        return max(self._until - now, 0.0)

    async def wait(self, work: asyncio.Future[bool], now: float) -> bool:
        """Wait for ``work`` as long as it lasts; its result, or False. Cancels it otherwise."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()

        def end() -> None:
            if not ended.done():
                ended.set_result(False)

        def wake() -> None:
            with suppress(RuntimeError):  # its loop has closed: it waits no more
                loop.call_soon_threadsafe(end)

        self._wakes.append(wake)
        try:
            left = self.left(now)
            await asyncio.wait(
                {work, ended},
                timeout=None if left == inf else left,
                return_when=asyncio.FIRST_COMPLETED,
            )
            return work.done() and work.result()
        finally:
            self._wakes.remove(wake)
            ended.cancel()
            work.cancel()
