"""What an open cache consists of, and how it ends. ``assembly`` puts it together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

from kvlayer.config.model import CacheConfig
from kvlayer.events import Emitter
from kvlayer.identity.namespace import Namespace
from kvlayer.tier.ranks.rank_team import RankTeam
from kvlayer.tier.stack import Stack

__all__ = ["OpenCache"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class OpenCache:
    """Everything an open cache consists of."""

    config: CacheConfig
    namespace: Namespace
    stack: Stack
    emit: Emitter
    clock: Callable[[], float]
    ranks: RankTeam | None
    resources: AsyncExitStack
    lookups: int = 0
    asked_tokens: int = 0
    hit_tokens: int = 0
    _counting: Lock = field(default_factory=Lock)
    _jobs: set[asyncio.Task[Any]] = field(default_factory=set)
    _flushing: asyncio.Task[None] | None = None
    _is_hurried: bool = False

    def count_lookup(self, asked: int, hit: int) -> None:
        """Keep the totals that ``Control.stats`` reports. In any thread."""
        with self._counting:
            self.lookups += 1
            self.asked_tokens += asked
            self.hit_tokens += hit

    def spawn(self, job: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a background job that ends with the cache at the latest."""
        task = asyncio.get_running_loop().create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

    async def aclose(self, *, flush: bool) -> None:
        """End jobs, flush if asked (bounded), take all lent memory back, close the tiers.

        Must not be cancelled: see :meth:`stop_flushing`.
        """
        self.part_from_ranks()
        for job in tuple(self._jobs):
            job.cancel()
        if self._jobs:
            await asyncio.wait(tuple(self._jobs))
        if flush and not self._is_hurried:
            self._flushing = asyncio.ensure_future(self.stack.flush(drain=True))
            # What is not written in time is a miss later; closing must not hang.
            await asyncio.wait({self._flushing}, timeout=self.config.close_seconds)
            self._flushing.cancel()
            await asyncio.wait({self._flushing})
        self.say_lost("the cache was closed")
        try:
            await self.stack.aclose(self.config.close_seconds)
        finally:
            await self.resources.aclose()

    def say_lost(self, when: str) -> None:
        """One line in the log for each tier that has not got what it should have. In any thread."""
        for left in self.stack.spills.unwritten():
            _log.warning(
                "%s before %d objects (%d bytes) were written to %s: they are lost to it",
                when,
                left.objects,
                left.nbytes,
                left.tier,
            )

    def part_from_ranks(self) -> None:
        """Wait for no rank any more: the cache closes."""
        if self.ranks is not None:
            self.stack.planner.retire()  # a rank may be writing into what it was lent all the same
            self.ranks.close()

    def stop_flushing(self) -> None:
        """Whoever closes has no time left: give up what is not written yet."""
        self._is_hurried = True
        if self._flushing is not None:
            self._flushing.cancel()
