"""What one object on its way to or from a lower tier costs the event loop, in CPU seconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from kvlayer.abc.backend import Read, ReadResult, Write, WriteResult
from kvlayer.api.cache import Cache
from kvlayer.bench.host import BLOCK
from kvlayer.bench.measure import Row
from kvlayer.bench.prompts import prompt
from kvlayer.bench.sick import SickTier
from kvlayer.config.model import CacheConfig, ModelConfig, TierConfig
from kvlayer.config.registry import BACKENDS
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.staging.sample import paged_view

__all__ = ["Still", "object_rows"]

_GROUP = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 1, 8)
_CHUNK = 256  # tokens
_OBJECT_NBYTES = 8 << 10  # of them: so few that moving them costs next to nothing
_MANY = 128  # objects at a time, which travel in whole batches
_TURNS = 4 * _MANY  # at once: writes take a quarter of them


class Still(SickTier):
    """A tier in good health that moves no bytes worth the name, without a thread.

    ``spent`` is what its own calls took of the loop's thread, in CPU seconds.
    """

    scheme: ClassVar[str] = "bench-still"

    def __init__(self) -> None:
        self.spent = 0.0

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        began = time.thread_time()
        results = await super().get(reads)
        self.spent += time.thread_time() - began
        return results

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        began = time.thread_time()
        results = await super().put(writes)
        self.spent += time.thread_time() - began
        return results


async def object_rows(rounds: int, folder: Path) -> list[Row]:
    """``loop.put.*`` and ``loop.get.*``: CPU seconds of the loop's thread for one small object.

    What ``store`` and ``flush`` take beyond a ``store`` in a cache without the tier, and from
    ``promote`` until it is in host memory: on a backend that moves no bytes (``still``; what it
    takes itself is left out) and on ``file://``, 128 at a time and ``alone``. The least of
    ``rounds`` and more samples: others use the processor, too. No ceiling.
    """
    rows: list[Row] = []
    for name, url in (("still", "bench-still://"), ("file", f"file://{folder}")):
        for suffix, count in (("", _MANY), (".alone", 1)):
            put, get = await _measure(url, count, rounds if count > 1 else 8 * rounds)
            rows.append(Row(f"loop.put.{name}{suffix}", put, "s"))
            rows.append(Row(f"loop.get.{name}{suffix}", get, "s"))
    return rows


async def _measure(url: str, count: int, rounds: int) -> tuple[float, float]:
    layout = KVLayout.single(_GROUP, NHD, tokens_per_block=BLOCK)
    tokens = _CHUNK * count
    view = paged_view(layout, tokens // BLOCK, seed=1)
    below = TierConfig(url=url, deadline_seconds=60.0, max_inflight=_TURNS)
    host = TierConfig(url=f"cpu://?capacity={4 * count * _OBJECT_NBYTES}")
    config = CacheConfig(model=ModelConfig(weights="sha256:" + 64 * "0"), tiers=(host, below))
    puts: list[float] = []
    gets: list[float] = []
    backends = BACKENDS.extended({Still.scheme: Still.fresh()})
    alone = replace(config, tiers=(host,))
    async with (
        Cache.open(config, layout, backends=backends) as cache,
        Cache.open(alone, layout) as plain,
    ):
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()  # what is collected is not this object's cost
        try:
            for number in range(rounds + 1):
                put, get = await _one_round(cache, plain, view, prompt(tokens, number))
                puts.append(put / count)
                gets.append(get / count)
        finally:
            if was_enabled:
                gc.enable()
    return min(puts[1:]), min(gets[1:])


async def _one_round(
    cache: Cache, plain: Cache, view: KVView, tokens: Sequence[int]
) -> tuple[float, float]:
    async def store() -> None:  # tiers are written to meanwhile
        await cache.store(chain, view)
        await cache.flush()

    itself = plain.chain(tokens)
    put = -await _loop_seconds(plain, lambda: plain.store(itself, view))
    await plain.control.evict(itself)
    chain = cache.chain(tokens)
    put += await _loop_seconds(cache, store)
    await cache.control.evict(chain, tier="cpu")
    async with cache.lookup(chain) as hit:
        get = await _loop_seconds(cache, lambda: cache.promote(hit))
        if hit.tokens != view.num_tokens or set(hit.by_tier) == {"cpu"}:
            raise RuntimeError(f"found {hit} instead of {view.num_tokens} tokens below")
    await cache.control.evict(chain)
    return put, get


async def _loop_seconds(cache: Cache, work: Callable[[], Awaitable[object]]) -> float:
    """CPU seconds of this thread, those of a backend that works in it left out."""
    spent = _spent(cache)
    began = time.thread_time()
    await work()
    return time.thread_time() - began - (_spent(cache) - spent)


def _spent(cache: Cache) -> float:
    return sum(getattr(tier.backend, "spent", 0.0) for tier in cache.stack.lower)
