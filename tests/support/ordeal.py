"""A cache on a disk that something happens to: what each request got, and how long it took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from caches import stored_files, tokens
from engine import same
from stacks import check_accounts
from victims import COUNT, debris, engine, file_tier, held, scrub, settings

from kvlayer import Cache
from kvlayer.errors import BackendError
from kvlayer.results import Cause, Failure, RetrieveReport, StoreReport

__all__ = ["SHORT", "Ordeal", "ordeal"]

T = TypeVar("T")

DEADLINE = 30.0
"""Seconds that a request waits for the tier, where it answers: a busy machine decides no test."""
SHORT = 0.5
"""The same where it does not answer."""
PAUSE = 0.05
_SECONDS = 300.0


class Ordeal:
    """Requests to one cache. Each asserts that what was loaded is right, bit for bit."""

    def __init__(self, cache: Cache, directory: Path) -> None:
        self.cache = cache
        self.directory = directory
        self.failures: list[Failure] = []
        self.compared = 0
        """Loads whose bytes were what had been stored; any other fails the test."""
        self.worst = 0.0
        """Seconds of the longest request."""
        self.is_starving = False
        """No memory to compare what is loaded with what was stored: see :meth:`compare`."""
        self._engine, self._other = engine(1), engine(2)
        self._loaded: list[Any] = []

    async def _timed(self, work: Awaitable[T]) -> T:
        began = time.monotonic()
        async with asyncio.timeout(_SECONDS):  # a hang is a failure, not a wait
            result = await work
        self.worst = max(self.worst, time.monotonic() - began)
        return result

    async def store(self, seed: int) -> StoreReport:
        slots = self._engine.slots(COUNT, seed=seed)
        report = await self._timed(self.cache.store(tokens(COUNT, seed), self._engine.view(slots)))
        self.failures += report.failed
        return report

    async def load(self, seed: int, *, from_disk: bool = True) -> RetrieveReport:
        """Load a prompt; first out of host memory with it, or it would be served from there."""
        if from_disk:
            await self.cache.control.evict(tokens(COUNT, seed), tier="cpu")
        report = await self._timed(self._load(seed))
        self.failures += report.failed
        return report

    async def _load(self, seed: int) -> RetrieveReport:
        slots = self._engine.slots(COUNT, seed=seed)
        if not self.is_starving:
            scrub(self._other, slots)
        async with self.cache.lookup(tokens(COUNT, seed)) as hit:
            report = await self.cache.retrieve(hit, self._other.view(slots))
        self._loaded.append(slots[: report.tokens])
        if not self.is_starving:
            self.compare()
        return report

    def compare(self) -> None:
        """Assert that what was loaded since is what had been stored."""
        for slots in self._loaded:
            assert same(self._engine.read(slots), self._other.read(slots)), "wrong bytes"
            self.compared += 1
        self._loaded.clear()

    async def in_host(self, seed: int) -> bool:
        """Whether all of a prompt is served from host memory, whatever the disk does."""
        return (await self.load(seed, from_disk=False)).tokens == COUNT

    async def until(self, attempt: Callable[[], Awaitable[bool]]) -> float:
        """Try again until it succeeds: the seconds that took. The pauses of a tier are real."""
        began = time.monotonic()
        async with asyncio.timeout(_SECONDS):
            while not await attempt():  # noqa: ASYNC110  # a disk comes back without a word
                await asyncio.sleep(PAUSE)
        return time.monotonic() - began

    async def stores(self, seed: int) -> bool:
        """Whether a prompt gets to the disk as a whole."""
        await self.cache.control.evict(tokens(COUNT, seed), tier="cpu")
        return not (await self.store(seed)).failed and await self.loads(seed)

    async def loads(self, seed: int) -> bool:
        return (await self.load(seed)).tokens == COUNT

    def causes(self) -> set[Cause]:
        return {failure.cause for failure in self.failures}

    def says(self, word: str) -> bool:
        """Whether some failure's detail names what happened."""
        return any(word in failure.detail for failure in self.failures)

    async def check_accounts(self) -> None:
        """Nothing is held, and what the tier counts is what lies on its disk."""
        disk = file_tier(self.cache)
        await self.cache.flush()
        await self.until(self._is_idle)
        check_accounts(self.cache.stack.planner, idle=True)
        assert disk.janitor is not None
        try:
            await disk.janitor.pass_()
        except BackendError as exc:
            raise AssertionError(f"a janitor's pass fails: {exc}") from exc
        files = stored_files(self.directory)
        assert disk.is_janitor
        assert debris(str(self.directory), files) == []
        assert disk.objects == len(files)
        assert disk.used_nbytes == sum(path.stat().st_size for path in files)

    async def _is_idle(self) -> bool:
        stats = self.cache.control.stats()
        return not any((tier.inflight, tier.orphans) != (0, 0) for tier in stats.tiers)

    def row(self, **more: float | str | bool) -> dict[str, Any]:
        """The figures of a fault."""
        return {
            "causes": " ".join(sorted(self.causes())),
            "deadline_seconds": self.cache.config.tiers[1].deadline_seconds,
            "worst_seconds": round(self.worst, 3),
            "loads_compared": self.compared,
            **more,
        }


@asynccontextmanager
async def ordeal(directory: Path, *, options: str = "", **tier: Any) -> AsyncIterator[Ordeal]:
    """A cache whose prompts 0 to 3 are on the disk, and 0 also in host memory."""
    below = {"deadline_seconds": DEADLINE, "pause_seconds": PAUSE, **tier}
    config = settings(str(directory), options=f"{options}&interval=3600", **below)
    async with Cache.open(config, held()) as cache:
        await cache.recovered()
        suffering = Ordeal(cache, directory)
        for seed in range(4):
            await suffering.until(partial(suffering.stores, seed))
        await suffering.until(partial(suffering.loads, 0))
        for seed in range(1, 4):
            await cache.control.evict(tokens(COUNT, seed), tier="cpu")
        suffering.failures.clear()
        suffering.worst = 0.0
        yield suffering
