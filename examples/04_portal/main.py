"""An engine without an event loop: look up in every step, load in batches, wait with a deadline."""

import tempfile
from functools import partial

import torch

from kvlayer import (
    AttentionKind,
    Cache,
    CacheConfig,
    KVGroup,
    KVLayout,
    KVView,
    Lookup,
    LookupState,
    ModelConfig,
    Portal,
    TierConfig,
)
from kvlayer.errors import PendingError
from kvlayer.layout import NHD

PENDING = LookupState.PENDING
LAYERS, HEADS, HEAD_SIZE, TOKENS_PER_BLOCK, BLOCKS = 4, 2, 64, 16, 128
group = KVGroup(AttentionKind.MHA, tuple(range(LAYERS)), "bfloat16", HEADS, HEAD_SIZE)
layout = KVLayout.single(group, NHD, tokens_per_block=TOKENS_PER_BLOCK)
engine = [
    torch.randn((2, BLOCKS, 16, HEADS, HEAD_SIZE), dtype=torch.bfloat16) for _ in range(LAYERS)
]

PROMPTS = {name: list(range(at, at + 256)) for name, at in (("a", 0), ("b", 5000), ("new", 9000))}
SLOTS = {name: range(256 * at, 256 * (at + 1)) for at, name in enumerate(PROMPTS)}


async def store(cache: Cache, name: str) -> int:
    return (await cache.store(PROMPTS[name], KVView.single(engine, SLOTS[name]))).stored


async def forget(cache: Cache, name: str) -> int:
    return await cache.control.evict(PROMPTS[name], tier="cpu")


def load_of(name: str, lookup: Lookup) -> partial:
    return partial(Cache.retrieve, hit=lookup.hit, kv=KVView.single(engine, SLOTS[name]))


def steps(portal: Portal) -> None:
    """A scheduler: it never waits for a lookup, and looks again in its next step."""
    waiting = {name: portal.lookup(prompt) for name, prompt in PROMPTS.items()}
    loads = {}
    while waiting:
        ready = {name: each for name, each in waiting.items() if each.state is not PENDING}
        for name in ready:
            del waiting[name]
        works = {name: load_of(name, each) for name, each in ready.items() if each.hit.tokens}
        jobs = portal.submit_all(works.values())  # one hop for the whole step
        loads |= {name: (ready[name], job) for name, job in zip(works, jobs, strict=True)}
        for name in ready.keys() - works.keys():
            ready[name].release()
            print(f"{name}: nothing stored, so it is computed")
        # ... here the engine computes a step for whatever is loaded ...
    for name, (lookup, job) in sorted(loads.items()):
        try:
            report = job.wait(10.0)
        except PendingError:  # the load goes on: wait again later, or job.cancel() and recompute
            raise SystemExit("this disk is too slow for an example") from None
        print(f"{name}: {report.tokens} tokens loaded, {lookup.hit.by_tier}")
        lookup.release()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = CacheConfig(
            model=ModelConfig(weights="sha256:" + "0" * 64),
            tiers=(
                TierConfig(url="cpu://?capacity=64MiB"),
                TierConfig(url=f"file://{directory}?capacity=1GiB", write="through"),
            ),
            tokens_per_chunk=64,
        )
        with Portal.open(config, layout) as portal:
            for name in ("a", "b"):
                print(f"{name}: {portal.call(store, name)} chunks stored")
            portal.call(forget, "b")  # from now on it is on disk alone
            steps(portal)


if __name__ == "__main__":
    main()
