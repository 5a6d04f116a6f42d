"""Store the KV of a prompt, find it again by its tokens, load it into other blocks."""

import asyncio

import torch

from kvlayer import AttentionKind, Cache, CacheConfig, KVGroup, KVLayout, KVView, TierConfig
from kvlayer.layout import NHD

LAYERS, HEADS, HEAD_SIZE, TOKENS_PER_BLOCK, BLOCKS = 4, 2, 64, 16, 64


def paged_memory() -> list[torch.Tensor]:
    """What an engine holds: per layer, (K|V, block, token, head, dim)."""
    shape = (2, BLOCKS, TOKENS_PER_BLOCK, HEADS, HEAD_SIZE)
    return [torch.randn(shape, dtype=torch.bfloat16) for _ in range(LAYERS)]


def slots(blocks: list[int]) -> torch.Tensor:
    """Token -> slot for a prompt that lies in these blocks."""
    first = torch.tensor(blocks)[:, None] * TOKENS_PER_BLOCK
    return (first + torch.arange(TOKENS_PER_BLOCK)).reshape(-1)


async def main() -> None:
    group = KVGroup(AttentionKind.MHA, tuple(range(LAYERS)), "bfloat16", HEADS, HEAD_SIZE)
    layout = KVLayout.single(group, NHD, tokens_per_block=TOKENS_PER_BLOCK)
    config = CacheConfig(tiers=(TierConfig(url="cpu://?capacity=64MiB"),), tokens_per_chunk=64)

    engine = paged_memory()
    prompt = list(range(1000, 1320))  # 320 token ids
    here, there = slots(list(range(20))), slots(list(range(40, 60)))

    async with Cache.open(config, layout) as cache:
        stored = await cache.store(prompt, KVView.single(engine, here))
        print(f"stored {stored.stored} chunks")

        question = [*prompt, 7, 8, 9]  # a new request that begins with the same text
        async with cache.lookup(question) as hit:
            print(f"{hit.tokens} of {len(question)} tokens need no prefill")
            loaded = await cache.retrieve(hit, KVView.single(engine, there))
        print(f"loaded {loaded.tokens} tokens")

        print(await cache.control.explain(question))

    for layer in engine:
        assert torch.equal(layer[:, :20], layer[:, 40:60])


if __name__ == "__main__":
    asyncio.run(main())
