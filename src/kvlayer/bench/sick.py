"""What a tier that is dead, slow or flapping costs a request, beside what it may cost.

The tier answers from a dictionary, so that every figure is what waiting for it adds. Nothing here
measures a disk.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import ClassVar, Self, cast

from kvlayer.abc.backend import (
    Backend,
    Capability,
    DeleteResult,
    Hit,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.api.cache import Cache
from kvlayer.bench.measure import Row
from kvlayer.config.model import CacheConfig, ModelConfig, TierConfig
from kvlayer.config.registry import BACKENDS
from kvlayer.identity.keys import ObjectKey, Scope
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.results import Cause
from kvlayer.staging.sample import paged_view
from kvlayer.urls import BackendURL

__all__ = ["SickTier", "Sickness", "sick_rows"]

_DEADLINE = 0.25
_PAUSE = 0.5
_BLOCK = 16
_TOKENS = 1024
_GROUP = KVGroup(AttentionKind.MHA, (0, 1), "bfloat16", 2, 32)


class Sickness(StrEnum):
    """How a tier may fail to answer."""

    HEALTHY = "healthy"
    DEAD = "dead"
    """Not at all."""
    SLOW = "slow"
    """Always after twice its deadline."""
    FLAPPING = "flapping"
    """Every third time not at all: a probe may pass, and the request after it fail."""


class SickTier(Backend):
    """Objects in a dictionary. Subclass it for each cache: its state is the class's."""

    scheme: ClassVar[str] = "sick"
    capabilities = frozenset({Capability.SHARED})
    objects: ClassVar[dict[ObjectKey, bytes]] = {}
    sickness: ClassVar[Sickness] = Sickness.HEALTHY
    deadline: ClassVar[float] = _DEADLINE
    turns: ClassVar[itertools.count[int]] = itertools.count()

    @classmethod
    def fresh(cls) -> type[Self]:
        """A tier with nothing in it, in good health."""

        state: dict[str, object] = {
            "objects": {},
            "sickness": Sickness.HEALTHY,
            "turns": itertools.count(),
        }
        return cast("type[Self]", type(cls.__name__, (cls,), state))

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        return cls()

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def answer(self) -> None:
        """What every call waits for."""
        is_mute = self.sickness is Sickness.FLAPPING and next(self.turns) % 3 == 1
        if self.sickness is Sickness.DEAD or is_mute:
            await asyncio.Event().wait()
        if self.sickness is Sickness.SLOW:
            await asyncio.sleep(2 * self.deadline)

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        await self.answer()
        return [len(self.objects[key]) if key in self.objects else None for key in keys]

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        await self.answer()
        return [self._fill(read) for read in reads]

    def _fill(self, read: Read) -> ReadResult:
        stored = self.objects.get(read.key)
        if stored is None:
            return Miss()
        at = read.offset
        for region in read.regions:
            part = stored[at : at + region.nbytes]
            region[: len(part)] = part
            at += len(part)
        return Hit(at - read.offset)

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        await self.answer()
        self.objects.update((write.key, b"".join(write.regions)) for write in writes)
        return [None] * len(writes)

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        await self.answer()
        for key in keys:
            self.objects.pop(key, None)
        return [None] * len(keys)


async def sick_rows(rounds: int = 3, requests: int = 20) -> list[Row]:
    """``tier.healthy`` and ``tier.{dead,slow,flapping}.*`` in seconds that a request takes.

    A request is a lookup and a retrieve of 1,024 tokens, of which only the tier has a copy.
    ``first`` is the one that meets the sickness (median of ``rounds``) and ``worst`` the longest
    of all: their ceiling is the tier's deadline. ``later`` are ``requests`` that follow before the
    tier is tried again, beside a request to a healthy tier; ``recovery`` is how long a tier that is
    well again stays unused, beside the configured pause. The ceiling of ``tier.healthy`` is a
    request to host memory alone.
    """
    async with _ward() as (cache, _, view):
        healthy = median([await _request(cache, view) for _ in range(requests)])
        kept = median([await _request(cache, view, evict=False) for _ in range(requests)])
    rows = [Row("tier.healthy", healthy, "s", kept)]
    for sickness in (Sickness.DEAD, Sickness.SLOW, Sickness.FLAPPING):
        stays = [await _stay(sickness, requests) for _ in range(rounds)]
        first = median(stay.first for stay in stays)
        later = median(seconds for stay in stays for seconds in stay.later)
        rows.append(Row(f"tier.{sickness}.first", first, "s", _DEADLINE))
        rows.append(Row(f"tier.{sickness}.later", later, "s", healthy))
        if sickness is Sickness.FLAPPING:
            worst = max(stay.worst for stay in stays)
            rows.append(Row("tier.flapping.worst", worst, "s", _DEADLINE))
        else:
            recovery = median(stay.recovery for stay in stays)
            rows.append(Row(f"tier.{sickness}.recovery", recovery, "s", _PAUSE))
    return rows


@dataclass(frozen=True, slots=True)
class _Stay:
    """What requests took, in seconds, from a tier's falling ill to its being used again."""

    first: float
    later: list[float]
    worst: float
    recovery: float


async def _stay(sickness: Sickness, requests: int) -> _Stay:
    async with _ward() as (cache, tier, view):
        tier.sickness = sickness
        first = await _first(cache, view)
        later = [await _request(cache, view) for _ in range(requests)]
        worst = max(first, *later)
        if sickness is Sickness.FLAPPING:
            worst = max(worst, *await _through_pauses(cache, view, requests))
        return _Stay(first, later, worst, await _cured(cache, tier))


@asynccontextmanager
async def _ward() -> AsyncGenerator[tuple[Cache, type[SickTier], KVView]]:
    """A cache over a tier that is still well and holds the prompt."""
    tier = SickTier.fresh()
    layout = KVLayout.single(_GROUP, NHD, tokens_per_block=_BLOCK)
    view = paged_view(layout, _TOKENS // _BLOCK, seed=1)
    config = CacheConfig(
        model=ModelConfig(weights="sha256:" + "00" * 32),
        tiers=(
            TierConfig(url="cpu://?capacity=16MiB"),
            TierConfig(
                url="sick://", write="through", deadline_seconds=_DEADLINE, pause_seconds=_PAUSE
            ),
        ),
    )
    backends = BACKENDS.extended({"sick": tier})
    async with Cache.open(config, layout, backends=backends) as cache:
        for number in range(3):  # the threads are there, and every page has been touched
            await cache.store(_PROMPT, view)
            await _request(cache, view, evict=number < 2)
        yield cache, tier, view


def _prompt(seed: int) -> array[int]:
    rng = random.Random(seed)  # noqa: S311  # tokens, not keys
    return array("i", (rng.randrange(128_000) for _ in range(_TOKENS)))


_PROMPT = _prompt(0)


async def _request(cache: Cache, view: KVView, *, evict: bool = True) -> float:
    """Seconds of a lookup and a retrieve."""
    if evict:
        records = cache.stack.planner.match(cache.chain(_PROMPT, Scope())).path()
        cache.stack.planner.evict(records, Cause.CLEARED, "to measure the tier")
    started = time.perf_counter()
    async with cache.lookup(_PROMPT) as hit:
        await cache.retrieve(hit, view)
    return time.perf_counter() - started


async def _first(cache: Cache, view: KVView) -> float:
    """The request that finds the tier sick; a flapping one may answer a few before."""
    while True:
        seconds = await _request(cache, view)
        if not cache.stack.lower[0].guard.serves:
            return seconds


async def _cured(cache: Cache, tier: type[SickTier]) -> float:
    """Seconds until a tier that is well again is used again."""
    tier.sickness = Sickness.HEALTHY
    started = time.perf_counter()
    while not cache.stack.lower[0].guard.serves:  # noqa: ASYNC110  # a request sees no event either
        await asyncio.sleep(0.001)
    return time.perf_counter() - started


async def _through_pauses(cache: Cache, view: KVView, requests: int) -> list[float]:
    """Requests with time between them, so that some come when the tier is tried again."""
    taken: list[float] = []
    for _ in range(requests):
        await asyncio.sleep(_PAUSE / 5)
        taken.append(await _request(cache, view))
    return taken
