"""Two tiers and a restart: KV is written to disk and found by a cache opened later."""

import asyncio
import sys
import tempfile
from pathlib import Path

import torch

from kvlayer import (
    AttentionKind,
    Cache,
    CacheConfig,
    KVGroup,
    KVLayout,
    KVView,
    ModelConfig,
    TierConfig,
)
from kvlayer.layout import HND

GROUP = KVGroup(AttentionKind.MHA, (0, 1, 2, 3), "float16", num_kv_heads=2, head_size=64)
LAYOUT = KVLayout.single(GROUP, HND, tokens_per_block=32)


def config(directory: Path) -> CacheConfig:
    """Host memory above a directory. KV that outlives the process needs to know its model."""
    return CacheConfig(
        model=ModelConfig(weights="sha256:" + "0" * 64),  # or the path of the model's folder
        tiers=(
            TierConfig(url="cpu://?capacity=64MiB"),
            TierConfig(url=f"file://{directory}?capacity=1GiB", write="back"),
        ),
    )


async def first_run(directory: Path, engine: list[torch.Tensor], prompt: list[int]) -> None:
    async with Cache.open(config(directory), LAYOUT) as cache:
        report = await cache.store(prompt, KVView.single(engine, range(len(prompt))))
        await cache.flush()  # write="back" follows on its own; here we want to see it done
        print(f"stored {report.stored} chunks, health: {cache.control.health()}")


async def after_restart(directory: Path, engine: list[torch.Tensor], prompt: list[int]) -> None:
    async with Cache.open(config(directory), LAYOUT) as cache:
        async with cache.lookup(prompt) as hit:
            print(f"found {hit.tokens} tokens: {dict(hit.by_tier)}")
            await cache.retrieve(hit, KVView.single(engine, range(len(prompt))))
        async with cache.lookup(prompt) as hit:
            print(f"and now: {dict(hit.by_tier)}")
        for tier in cache.control.stats().tiers:
            print(f"{tier.name}: {tier.objects} objects, {tier.loaded_nbytes} bytes loaded")


def main(directory: Path) -> None:
    shape = (2, 32, 2, 32, 64)  # K|V, block, head, token, dim
    engine = [torch.randn(shape, dtype=torch.float16) for _ in range(4)]
    restarted = [torch.zeros_like(layer) for layer in engine]
    prompt = list(range(900))
    asyncio.run(first_run(directory, engine, prompt))
    asyncio.run(after_restart(directory, restarted, prompt))
    for before, after in zip(engine, restarted, strict=True):
        assert torch.equal(before[:, :28], after[:, :28])  # 896 tokens: 3 chunks and a tail


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
