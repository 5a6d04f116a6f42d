"""A process that stores a prompt, or loads one, with the codec it is told of, and says how it went.

``python coded_process.py DIRECTORY CODEC DEEDS``: each deed is a letter, ``s`` to store, ``l`` to
load, ``w`` to wait for a line. After each it prints a line of JSON. CODEC may be empty.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from caches import config, layout, tokens
from engine import Engine

from kvlayer import Cache

CHUNK = 64
TOKENS = 3 * CHUNK + 24


def engine(seed: int = 1) -> Engine:
    """KV of which every second byte is zero."""
    import torch

    made = Engine(layout(), 80, seed)
    for pair in made.caches[0]:
        for tensor in pair:
            tensor.view(torch.int16).bitwise_and_(0xFF)
    return made


def digest(made: Engine) -> str:
    """Of what a whole prompt has in the engine's memory."""
    import torch

    planes = made.read(made.slots(TOKENS))
    content = b"".join(plane.view(torch.uint8).numpy().tobytes() for plane in planes)
    return hashlib.sha256(content).hexdigest()


async def _do(cache: Cache, deed: str) -> dict[str, Any]:
    prompt = tokens(TOKENS)
    if deed == "s":
        ours = engine()
        report = await cache.store(prompt, ours.view(ours.slots(TOKENS)))
        return {"stored": report.stored, "failed": len(report.failed), "digest": digest(ours)}
    if deed == "l":
        await cache.stack.recovered()
        other = engine(2)
        async with cache.lookup(prompt) as hit:
            found = await cache.retrieve(hit, other.view(other.slots(TOKENS)[: hit.tokens]))
        below = cache.control.stats().tiers[1]
        return {
            "tokens": found.tokens,
            "digest": digest(other),
            "foreign": dict(below.foreign_encodings),
            "misses": {cause.value: count for cause, count in below.misses.items()},
        }
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    return {}


async def _main(directory: str, codec: str, deeds: str) -> None:
    settings = config(Path(directory), tokens_per_chunk=CHUNK, codec=codec)
    async with Cache.open(settings, layout()) as cache:
        for deed in deeds:
            sys.stdout.write(json.dumps(await _do(cache, deed)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
