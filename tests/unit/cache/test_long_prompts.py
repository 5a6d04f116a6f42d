"""A long prompt holds nobody up: no step of any call grows with how long it is.

What a step does is counted in lines of Python, the same on every machine: between two turns of the
loop, and while the planner's lock is held, which lookups in other threads wait for.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from array import array
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from caches import WEIGHTS
from engine import Engine
from hang import HANG

from kvlayer import (
    AttentionKind,
    Cache,
    CacheConfig,
    GroupLayout,
    KVGroup,
    KVLayout,
    ModelConfig,
    Scope,
    TierConfig,
    _steps,
)
from kvlayer.layout import NHD, HitRule
from kvlayer.testing import invariants

CHUNK = 16
FEW, MANY, LONGEST = (n * _steps.FEW + 5 for n in (2, 4, 8))  # chunks; the rest ends in a tail

PLAIN = KVGroup(AttentionKind.MHA, (0,), "int8", 1, 8)
WINDOW = KVGroup(
    AttentionKind.MHA, (1,), "int8", 1, 8, hit_rule=HitRule.TRAILING, window_tokens=3 * CHUNK
)
LAYOUTS = {
    "every chunk": KVLayout.single(PLAIN, NHD, tokens_per_block=CHUNK),
    "window": KVLayout((GroupLayout(PLAIN, NHD, CHUNK), GroupLayout(WINDOW, NHD, CHUNK))),
}
BELOW = TierConfig(url="cpu://?capacity=256MiB", write="back", deadline_seconds=HANG)


class Lines:
    """Counts lines that run, in turns of the loop and in holds of the planner's lock."""

    def __init__(self) -> None:
        self.most: dict[str, dict[str, int]] = {}
        """By call, the most of one turn and of one hold."""
        self._count = 0
        self._turn = self._hold = 0
        self._turns = self._holds = 0
        self._depth = 0

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self._count += 1
        elif event == "call" and "kvlayer" not in frame.f_code.co_filename:
            return None
        return self.trace

    def turn(self, run: Callable[[Any], None], handle: Any) -> None:
        before, self._count = self._count, 0
        run(handle)
        self._turns = max(self._turns, self._count)
        self._count += before

    @contextmanager
    def call(self, name: str) -> Generator[None]:
        """What runs inside is ``name``'s."""
        self._turns = self._holds = 0
        yield
        self.most[name] = {"turn": self._turns, "hold": self._holds}

    # -- the lock ----------------------------------------------------------------------------

    def watch(self, cache: Cache) -> None:
        """Count what runs under the lock of a cache's planner, in this thread."""
        planner = cache.stack.planner
        self._lock = planner.lock
        planner.lock = self  # type: ignore[assignment]

    def __enter__(self) -> None:
        self._lock.acquire()
        if not self._depth:
            self._hold = self._count
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holds = max(self._holds, self._count - self._hold)
        self._lock.release()


async def lived(lines: Lines, layout: KVLayout, chunks: int, *lower: TierConfig) -> None:
    """Every public call, with a prompt of so many chunks."""
    count = chunks * CHUNK + 7
    tokens, other = array("i", range(count)), array("i", range(7, count + 7))
    engine = Engine(layout, chunks + 1, 1)
    view = engine.view(range(count))
    config = CacheConfig(
        model=ModelConfig(weights=WEIGHTS, compute_dtype="float16"),
        tiers=(TierConfig(url="cpu://?capacity=256MiB"), *lower),
        tokens_per_chunk=CHUNK,
        lease_seconds=HANG,  # tracing makes everything slow
    )
    found = count - count % 2
    async with Cache.open(config, layout) as cache:
        lines.watch(cache)
        chain = cache.chain(tokens)

        async def do(name: str, work: Callable[[], Awaitable[Any]]) -> Any:
            await asyncio.sleep(0)
            gc.collect()  # what nobody holds any more is looked for anew
            with lines.call(name):
                result = await work()
                await asyncio.sleep(0)
            return result

        async def look() -> int:
            async with cache.lookup(chain) as hit:
                return hit.tokens

        async def poll() -> int:
            with cache.begin_lookup(chain) as lookup:
                return (await lookup).tokens

        async def load() -> int:
            async with cache.lookup(chain) as hit:
                return (await cache.retrieve(hit, view)).tokens

        async def promote() -> int:
            async with cache.lookup(chain) as hit:
                return (await cache.promote(hit)).tokens

        async def pin() -> None:
            assert cache.control.unpin(await cache.control.pin(chain, seconds=60.0))

        assert (await do("store", lambda: cache.store(chain, view))).stored == chunks + 1
        await do("flush", cache.flush)
        assert (await do("store again", lambda: cache.store(chain, view))).skipped == chunks + 1
        for name, call in (("look", look), ("poll", poll), ("load", load), ("promote", promote)):
            assert await do(name, call) == found, name
        if lower:
            await cache.control.clear("cpu")
            assert await do("look below", look) == found
            assert await do("load from below", load) == found
        await do("pin", pin)
        prefetched = await do("prefetch", lambda: _of(cache.prefetch(chain, deadline=0.0001)))
        assert prefetched.tokens == found
        assert (await do("explain", lambda: cache.control.explain(chain))).hit_tokens == found
        missed = await do("explain a miss", lambda: cache.control.explain(other))
        assert missed.hit_tokens == 0 and missed.misses
        await asyncio.sleep(0.01)  # until the prefetch's lease is over
        await do("expire", look)
        private = Scope.private("tenant")
        await do("store in a scope", lambda: cache.store(tokens, view, scope=private))
        assert await do("evict", lambda: cache.control.evict(chain)) >= chunks
        assert await do("clear", cache.control.clear) >= chunks
        invariants.accounts(cache.stack.planner, idle=True)


async def _of(work: Awaitable[Any]) -> Any:
    return await work


def most(layout: KVLayout, chunks: int, *lower: TierConfig) -> dict[str, dict[str, int]]:
    lines = Lines()
    run = asyncio.events.Handle._run
    before = sys.gettrace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.events.Handle, "_run", lambda handle: lines.turn(run, handle))
        sys.settrace(lines.trace)
        try:
            asyncio.run(lived(lines, layout, chunks, *lower))
        finally:
            sys.settrace(before)
    return lines.most


VARIANTS: list[tuple[str, tuple[TierConfig, ...]]] = [
    ("every chunk", ()),
    ("window", ()),
    ("every chunk", (BELOW,)),
    ("window", (BELOW,)),
]
"""The first two in every run. With a tier below, threads decide what falls into one turn of the
loop, which may be half as much again: those are counted in the campaign, with prompts four times as
long, of which a turn may have twice as much."""


def test_no_turn_and_no_hold_grows_with_the_prompt(dose: Any) -> None:
    for name, lower in VARIANTS[: dose(2, len(VARIANTS))]:
        longer, times = (LONGEST, 2.0) if lower else (MANY, 1.4)
        few, many = (most(LAYOUTS[name], chunks, *lower) for chunks in (FEW, longer))
        if lower:  # threads decide which call ends the leases of as many chunks as one hold may
            longest = max(counts["hold"] for counts in few.values())
            few = {call: {**counts, "hold": longest} for call, counts in few.items()}
        grown = {
            (call, kind): (few[call][kind], lines)
            for call, counts in many.items()
            for kind, lines in counts.items()
            if lines > times * few[call][kind] + 300
        }
        assert grown == {}, "\n".join(map(str, grown.items()))


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["retrieve", "promote"])
async def test_a_load_of_more_chunks_than_a_tier_takes_at_a_time_is_whole(verb: str) -> None:
    layout, chunks = LAYOUTS["every chunk"], 2_000
    engine = Engine(layout, chunks, 1)
    view = engine.view(range(chunks * CHUNK))
    config = CacheConfig(
        model=ModelConfig(weights=WEIGHTS, compute_dtype="float16"),
        tiers=(TierConfig(url="cpu://?capacity=256MiB"), BELOW),
        tokens_per_chunk=CHUNK,
    )
    async with Cache.open(config, layout) as cache:
        chain = cache.chain(array("i", range(chunks * CHUNK)))
        await cache.store(chain, view)
        await cache.flush()
        await cache.control.clear("cpu")
        async with cache.lookup(chain) as hit:
            done = await (cache.promote(hit) if verb == "promote" else cache.retrieve(hit, view))
        assert done.tokens == chunks * CHUNK and not done.failed
        assert not cache.control.stats().tiers[1].misses, "nothing was refused in the end"
