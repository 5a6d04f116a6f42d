"""A prompt many times larger than host memory is stored whole, and loaded back in pieces.

A campaign takes 1,048,576 tokens through 512 MiB of host memory; every other run a 64th of both.
"""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from caches import WEIGHTS, group, stored_files
from engine import random_bits

from kvlayer import Cache, CacheConfig, KVLayout, KVView, ModelConfig, TierConfig
from kvlayer.layout import NHD
from kvlayer.testing import invariants

SEED = int(os.environ.get("KVLAYER_SEED", "1"))  # read here: tests see no such variable
NBYTES = 2048  # of a token
CHUNK = 256
BLOCK = 16
PIECES = 16


def held() -> KVLayout:
    return KVLayout.single(group(layers=8, heads=1, head_size=64), NHD, tokens_per_block=BLOCK)


def memory(count: int, seed: int) -> list[torch.Tensor]:
    """Tensors of eight layers for ``count`` tokens, of random bits."""
    shape = (2, count // BLOCK, BLOCK, 1, 64)
    return [random_bits(shape, 2, seed + layer).view(torch.bfloat16) for layer in range(8)]


@pytest.mark.asyncio
async def test_a_prompt_many_times_larger_than_host_memory_is_stored_and_loaded(
    tmp_path: Path, dose: Any, figures: Any
) -> None:
    count = dose(1 << 14, 1 << 20)
    host = count * NBYTES // 4
    chance = Random(SEED)
    tokens = array("i", (chance.randrange(50_000) for _ in range(count)))
    engine = memory(count, SEED)
    assert sum(each.nbytes for each in engine) == count * NBYTES == 4 * host
    config = CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        tiers=(
            TierConfig(url=f"cpu://?capacity={host}"),
            TierConfig(url=f"file://{tmp_path}", write="through", deadline_seconds=300.0),
        ),
        tokens_per_chunk=CHUNK,
    )
    async with Cache.open(config, held()) as cache:
        began = time.monotonic()
        stored = await cache.store(tokens, KVView.single(engine, range(count)))
        seconds = time.monotonic() - began
        assert (stored.stored, stored.dropped, stored.failed) == (count // CHUNK, 0, ())
        invariants.accounts(cache.stack.planner)
        assert len(stored_files(tmp_path)) == count // CHUNK

    size = count // PIECES
    other = memory(size, SEED + 100)  # one piece's
    async with Cache.open(config, held()) as cache:  # host memory is empty
        await cache.recovered()
        began = time.monotonic()
        async with cache.lookup(tokens) as hit:
            assert hit.tokens == count
            for start in range(0, count, size):
                view = KVView.single(other, range(size))
                report = await cache.retrieve(hit, view, first_token=start)
                assert (report.tokens, report.failed) == (start + size, ())
                blocks = slice(start // BLOCK, (start + size) // BLOCK)
                for mine, theirs in zip(other, engine, strict=True):
                    assert torch.equal(
                        mine.view(torch.int16), theirs[:, blocks].view(torch.int16)
                    ), f"wrong bytes from token {start} on"
                    mine.zero_()
        loaded = time.monotonic() - began
        while cache.stack.inflight:  # noqa: ASYNC110
            await asyncio.sleep(0)
        invariants.nothing_left(cache)
    figures(
        "faults.long_prompt",
        seed=SEED,
        tokens=count,
        host_nbytes=host,
        disk_nbytes=count * NBYTES,
        store_seconds=round(seconds, 1),
        load_seconds=round(loaded, 1),
    )
