"""What one engine costs, measured in a process of its own: the child of ``__main__``."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from kvlayer import Cache
from kvlayer_vllm.bench.serving import Answer, Serving, prompt_of

__all__ = ["main"]

ROUNDS = 5
TOKENS = 16


def main(model: str, kind: str, lengths: list[int]) -> None:
    """Print a JSON object for each length: what cold and hit cost, and how much was loaded."""
    directory = Path(tempfile.mkdtemp(prefix="kvlayer-bench-"))
    try:
        serving = Serving(model, **_options(kind, directory), dtype="bfloat16")
        serving.ask([prompt_of(200, 999)], 2)  # what is compiled or allocated once
        for length in lengths:
            sys.stdout.write(json.dumps(_measured(serving, kind, length)) + "\n")
            sys.stdout.flush()
        serving.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _options(kind: str, directory: Path) -> dict[str, Any]:
    if kind == "prefix":
        return {"enable_prefix_caching": True}
    if kind == "cold":
        return {}
    tiers: list[dict[str, Any]] = [{"url": "cpu://?capacity=1GiB"}]
    if kind == "file":
        tiers.append({"url": f"file://{directory}", "write": "back", "deadline_seconds": 60.0})
    return {"cache": {"tiers": tiers, "report_prefill": False}}  # loads are what is measured


def _measured(serving: Serving, kind: str, length: int) -> dict[str, Any]:
    prompt = prompt_of(length, length, 8000)
    (cold,) = serving.ask([prompt], TOKENS)
    hits: list[Answer] = []
    for _ in range(ROUNDS):
        serving.rest()
        if kind == "file":
            _leave_memory(serving, prompt)
        hits += serving.ask([prompt], TOKENS)
    same = all(hit.tokens == cold.tokens for hit in hits)
    return {
        "length": length,
        "cold": cold.cpu_seconds,
        "cold_wall": cold.seconds,
        "hit": median(hit.cpu_seconds for hit in hits),
        "hit_wall": median(hit.seconds for hit in hits),
        "loaded_tokens": min(hit.cached for hit in hits),
        "same_output": same,
    }


def _leave_memory(serving: Serving, prompt: list[int]) -> None:
    """From now on the prompt's KV is on disk alone."""
    call: Callable[..., Any] = serving.connector.scheduler.portal.call
    call(Cache.flush)
    call(_evict, prompt)


async def _evict(cache: Cache, prompt: list[int]) -> None:
    await cache.control.evict(prompt, tier="cpu")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(each) for each in sys.argv[3:]])
