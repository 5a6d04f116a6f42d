"""How fast KV moves between an engine's blocks and host memory, beside a memcpy of its bytes."""

from __future__ import annotations

import random
import time
from array import array

from kvlayer.api.cache import Cache
from kvlayer.bench.measure import Row, alternate
from kvlayer.config.model import CacheConfig, TierConfig
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.staging.sample import Memcpy, paged_view

__all__ = ["BLOCK", "LLAMA", "NBYTES_PER_TOKEN", "host_rows", "prompt_of"]

# Llama-3-8B: 128 KiB of KV a token in bf16.
LLAMA = KVGroup(AttentionKind.MHA, tuple(range(32)), "bfloat16", 8, 128)
BLOCK = 16
NBYTES_PER_TOKEN = 32 * 2 * 8 * 128 * 2


def prompt_of(count: int, seed: int) -> array[int]:
    """Random tokens, the same for a seed every time."""
    rng = random.Random(seed)  # noqa: S311  # tokens, not keys
    return array("i", (rng.randrange(128_000) for _ in range(count)))


async def host_rows(nbytes: int, rounds: int) -> list[Row]:
    """``host.store.*`` and ``host.retrieve.*`` in bytes/s; ``nbytes`` are moved at a time."""
    tokens = max(nbytes // NBYTES_PER_TOKEN // 256, 1) * 256
    moved = tokens * NBYTES_PER_TOKEN
    rows: list[Row] = []
    copy = Memcpy(moved)
    for form in ("native", "canonical"):
        layout = KVLayout.single(
            LLAMA,
            NHD,
            tokens_per_block=BLOCK,
            form="native:nhd-b16" if form == "native" else "canonical",
        )
        view = paged_view(layout, tokens // BLOCK, seed=1)
        # Room for two prompts, so that every page of the slab is touched before anything counts.
        config = CacheConfig(tiers=(TierConfig(url=f"cpu://?capacity={2 * moved}"),))
        async with Cache.open(config, layout) as cache:
            for verb, own, top in await _one_form(cache, view, tokens, copy, rounds):
                rows.append(Row(f"host.{verb}.{form}", moved / own, "B/s", moved / top))
    return rows


async def _one_form(
    cache: Cache, view: KVView, tokens: int, copy: Memcpy, rounds: int
) -> list[tuple[str, float, float]]:
    """Verb, its seconds and the copy's seconds, for the cache's own form."""

    async def store(number: int) -> float:
        prompt = prompt_of(tokens, number)
        started = time.perf_counter()
        await cache.store(prompt, view)
        return time.perf_counter() - started

    async def retrieve(_: int) -> float:
        async with cache.lookup(prompt_of(tokens, rounds + 1)) as hit:
            started = time.perf_counter()
            await cache.retrieve(hit, view)
            return time.perf_counter() - started

    return [
        ("store", *await alternate(store, copy, rounds=rounds, warm=2)),
        ("retrieve", *await alternate(retrieve, copy, rounds=rounds, warm=2)),
    ]
