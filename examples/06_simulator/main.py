"""A cache over a tier that dies and comes back, in twenty schedules that follow from seeds."""

from __future__ import annotations

import asyncio
import random
from array import array

import torch

from kvlayer import AttentionKind, Cache, CacheConfig, KVGroup, KVLayout, ModelConfig, TierConfig
from kvlayer.config.registry import BACKENDS
from kvlayer.layout import NHD, KVView
from kvlayer.testing import invariants
from kvlayer.testing.faults import Dying, Injected, Slow, given, tally
from kvlayer.testing.memory import MemoryBackend
from kvlayer.testing.sim import run

DEADLINE = 0.5  # seconds of virtual time, as everything here
TOKENS = array("i", range(64))
LAYOUT = KVLayout.single(
    KVGroup(AttentionKind.MHA, (0,), "float32", 1, 4), NHD, tokens_per_block=16
)
CONFIG = CacheConfig(
    model=ModelConfig(weights="sha256:" + "ab" * 32),
    tiers=(
        TierConfig(url="cpu://?capacity=64KiB"),
        TierConfig(url="mine://", write="through", deadline_seconds=DEADLINE),
    ),
    tokens_per_chunk=16,
)


async def scenario(seed: int, log: list[Injected]) -> int:
    """Requests while the tier lives and dies; how many tokens they loaded."""
    chance = random.Random(seed)  # a schedule, not a secret
    tier = Dying(Slow(MemoryBackend(), chance, log), chance, log, deaths=2)
    kv = torch.arange(2 * 64 * 4, dtype=torch.float32).reshape(2, 4, 16, 1, 4)
    loaded = 0
    backends = BACKENDS.extended({"mine": given(tier)})
    async with Cache.open(CONFIG, LAYOUT, backends=backends) as cache:
        await cache.store(TOKENS, KVView([[kv]], [torch.arange(64)]))
        for _ in range(5):
            await asyncio.sleep(chance.uniform(0.0, 2.0))
            await cache.control.evict(TOKENS, tier="cpu")
            mine = torch.zeros_like(kv)
            started = asyncio.get_running_loop().time()
            async with cache.lookup(TOKENS) as hit:
                report = await cache.retrieve(hit, KVView([[mine]], [torch.arange(64)]))
            took = asyncio.get_running_loop().time() - started
            invariants.answered("a request", took, within=3 * DEADLINE)
            blocks = report.tokens // 16
            assert torch.equal(mine[:, :blocks], kv[:, :blocks]), "wrong bytes"
            invariants.accounts(cache.stack.planner)
            loaded += report.tokens
        tier.is_ill = False
        await asyncio.sleep(60.0)
        invariants.nothing_left(cache)
    return loaded


def main() -> None:
    log: list[Injected] = []
    loaded = [run(scenario(seed, log), seed=seed) for seed in range(20)]
    assert run(scenario(3, []), seed=3) == loaded[3], "a seed repeats itself"
    print(f"{sum(loaded)} of {20 * 5 * len(TOKENS)} tokens were loaded, the rest were misses")
    for fault, count in tally(log).items():
        print(f"  {count:4d} x {fault}")
    print("20 schedules: every answer right, and in time")


if __name__ == "__main__":
    main()
