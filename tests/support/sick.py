"""Tiers that fall ill on command, for caches in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ClassVar, TypeVar

from caches import WEIGHTS, layout, tokens
from engine import Engine

from kvlayer import Cache, CacheConfig, KVLayout, ModelConfig, TierConfig
from kvlayer.abc.backend import (
    DeleteResult,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.bench.sick import Sickness, SickTier
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey

T = TypeVar("T")

DEADLINE = 2.0
PAUSE = 1.0


class Patient(SickTier):
    """Also: deaf to being cancelled, full, and slow by the byte."""

    deadline: ClassVar[float] = DEADLINE
    only: ClassVar[frozenset[str]] = frozenset()
    """The calls that are concerned; empty: all of them."""
    is_stubborn: ClassVar[bool] = False
    """A sick call goes on through cancellations, as a thread that cannot be stopped does."""
    is_full: ClassVar[bool] = False
    latency: ClassVar[float] = 0.0
    bandwidth: ClassVar[float] = 0.0
    """What a healthy ``get`` takes: seconds, and bytes per second (0: no time)."""
    running: ClassVar[int] = 0
    calls: ClassVar[list[tuple[str, float]]] = []
    """What was asked of each object, and when."""
    cured: ClassVar[asyncio.Event]

    @classmethod
    def fresh(cls, scheme: str = "sick") -> type[Patient]:
        patient = super().fresh()
        patient.scheme = scheme
        patient.calls, patient.cured = [], asyncio.Event()
        return patient

    @classmethod
    def falls(cls, sickness: Sickness) -> None:
        """Change how it is; calls that hang are answered when it gets well."""
        cls.sickness = sickness
        cls.cured.set()
        cls.cured = asyncio.Event()
        if sickness is Sickness.HEALTHY:
            cls.cured.set()

    @contextmanager
    def _call(self, name: str, objects: int) -> Iterator[bool]:
        kind = type(self)
        kind.calls += [(name, asyncio.get_running_loop().time())] * objects
        kind.running += objects
        try:
            yield not self.only or name in self.only
        finally:
            kind.running -= objects

    async def answer(self) -> None:
        is_mute = self.sickness is Sickness.FLAPPING and next(self.turns) % 3 == 1
        if self.sickness is Sickness.DEAD or is_mute:
            await self._through(self.cured.wait())
        elif self.sickness is Sickness.SLOW:
            await self._through(asyncio.sleep(2 * self.deadline))

    async def _through(self, waiting: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(waiting)
        cancelled = False
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                cancelled = True
                if not self.is_stubborn:
                    task.cancel()
        if cancelled:
            raise asyncio.CancelledError

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        with self._call("contains", len(keys)) as is_concerned:
            if is_concerned:
                await self.answer()
            return [len(self.objects[key]) if key in self.objects else None for key in keys]

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        with self._call("get", len(reads)) as is_concerned:
            if is_concerned:
                await self.answer()
            nbytes = sum(read.nbytes for read in reads)
            await asyncio.sleep(self.latency + (nbytes / self.bandwidth if self.bandwidth else 0))
            return [self._fill(read) for read in reads]

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        with self._call("delete", len(keys)) as is_concerned:
            if is_concerned:
                await self.answer()
            for key in keys:
                self.objects.pop(key, None)
            return [None] * len(keys)

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        with self._call("put", len(writes)) as is_concerned:
            if is_concerned:
                await self.answer()
            if self.is_full:
                return [BackendError("no space left") for _ in writes]
            self.objects.update((write.key, b"".join(write.regions)) for write in writes)
            return [None] * len(writes)


@asynccontextmanager
async def ward(
    *patients: type[Patient],
    kv: KVLayout | None = None,
    write: Any = "through",
    host: str = "1MiB",
    tier: dict[str, Any] | None = None,
    sinks: Sequence[Any] = (),
    **more: Any,
) -> AsyncIterator[Cache]:
    """A cache whose lower tiers are ``patients``."""
    below: dict[str, Any] = {"deadline_seconds": DEADLINE, "pause_seconds": PAUSE, "retries": 0}
    below |= tier or {}
    settings = CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        tiers=(
            TierConfig(url=f"cpu://?capacity={host}"),
            *(TierConfig(url=f"{each.scheme}://", write=write, **below) for each in patients),
        ),
        tokens_per_chunk=16,
        **more,
    )
    backends = BACKENDS.extended({each.scheme: each for each in patients})
    async with Cache.open(settings, kv or layout(), backends=backends, sinks=sinks) as cache:
        try:
            yield cache
        except BaseException:  # a test that failed shall say why, not wait for the stubborn
            for each in patients:
                each.falls(Sickness.HEALTHY)
            raise


async def send_down(cache: Cache, seeds: Sequence[int], engine: Engine, count: int = 64) -> None:
    """Prompts that are on the lower tiers and nowhere else."""
    slots = engine.slots(count)
    for seed in seeds:
        await cache.store(tokens(count, seed), engine.view(slots))
    await cache.flush()
    for seed in seeds:
        await cache.control.evict(tokens(count, seed), tier="cpu")


async def timed(work: Coroutine[Any, Any, T]) -> tuple[float, T]:
    """Virtual seconds of ``work``, and its result."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    result = await work
    return loop.time() - started, result
