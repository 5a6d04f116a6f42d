"""What a request pays before anything moves: name a prompt, find it, lease it, let it go."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

from kvlayer.api.cache import Cache
from kvlayer.bench.measure import Row, seconds_of
from kvlayer.bench.prompts import bare_chain, prompt
from kvlayer.config.model import CacheConfig, TierConfig
from kvlayer.errors import CapacityError
from kvlayer.identity.keys import Scope
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout
from kvlayer.payload import ALIGNMENT

__all__ = ["lookup_rows"]

_TOKENS = 32_768
_CHUNK = 256
_CHUNKS = _TOKENS // _CHUNK
_PUBLIC = Scope()
# The least KV there is, one page a chunk: lookups never touch it, so it is not even committed.
_GROUP = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 1, 1)
_LAYOUT = KVLayout.single(_GROUP, NHD, tokens_per_block=_CHUNK)


@dataclass(slots=True)
class _Filled:
    """A cache and the prompts that are resident in it."""

    cache: Cache
    prompts: list[array[int]]

    async def lookup(self, number: int) -> float:
        """Seconds of one lookup; a prompt's turn comes again when all others have had theirs."""
        # A copy, because a request's tokens have just been made: they are in the processor's cache.
        tokens = self.prompts[number % len(self.prompts)][:]
        started = time.perf_counter()
        async with self.cache.lookup(tokens) as hit:
            pass
        seconds = time.perf_counter() - started
        if hit.tokens != _TOKENS:
            raise CapacityError(f"{hit.tokens} of {_TOKENS} tokens were found")
        return seconds

    def named(self, number: int) -> float:
        """Seconds to find, lease and release a prompt whose chunks are named already."""
        planner = self.cache.stack.planner
        chain = self.cache.chain(self.prompts[number % len(self.prompts)], _PUBLIC)
        started = time.perf_counter()
        match = planner.match(chain)
        planner.release(planner.lease(match, owner="", seconds=60.0).number)
        seconds = time.perf_counter() - started
        if match.tokens != _TOKENS:
            raise CapacityError(f"{match.tokens} of {_TOKENS} tokens were found")
        return seconds


async def lookup_rows(rounds: int, *, few: int = 8, many: int = 782) -> list[Row]:
    """``lookup.32k.1k`` and ``lookup.32k.100k``: seconds for one lookup of 32,768 tokens.

    ``few`` and ``many`` are the prompts resident in two caches that take turns. The ceiling of the
    first is naming the prompt with a bare sha256 chain; that of the second is the first.
    ``lookup.named.1k`` and ``lookup.named.100k``: the same without naming it. The ceiling of the
    first is finding as many hashes in a dict.
    """
    async with _filled(few) as small, _filled(many) as large:
        samples: list[tuple[float, ...]] = []
        for number in range(20 * rounds):
            packed = small.prompts[number % few].tobytes()
            bare = seconds_of(lambda: bare_chain(packed, 4 * _CHUNK))  # noqa: B023  # called here
            hashes = small.cache.chain(small.prompts[number % few], _PUBLIC).hashes
            numbers = dict(zip(hashes, range(_CHUNKS), strict=True))
            found = seconds_of(lambda: [numbers[end] for end in hashes])  # noqa: B023
            lookups = (await small.lookup(number), await large.lookup(number))
            named = (small.named(number + 1), large.named(number + 1))
            samples.append((bare, found, *lookups, *named))
    bare, found, in_small, in_large, named_small, named_large = (
        median(column) for column in zip(*samples[few:], strict=True)
    )
    return [
        Row("lookup.32k.1k", in_small, "s", bare),
        Row("lookup.32k.100k", in_large, "s", in_small),
        Row("lookup.named.1k", named_small, "s", found),
        Row("lookup.named.100k", named_large, "s", named_small),
    ]


@asynccontextmanager
async def _filled(prompts: int) -> AsyncGenerator[_Filled]:
    """A cache in which ``prompts`` prompts of 128 chunks are resident, looked up in any order."""
    capacity = (prompts * _CHUNKS + _CHUNKS) * ALIGNMENT
    config = CacheConfig(tiers=(TierConfig(url=f"cpu://?capacity={capacity}"),))
    async with Cache.open(config, _LAYOUT) as cache:
        resident = [prompt(_TOKENS, seed) for seed in range(prompts)]
        for tokens in resident:
            _put(cache, tokens)
            await asyncio.sleep(0)  # seconds in all: let an interrupt in
        random.Random(prompts).shuffle(resident)  # noqa: S311  # an order, not a secret
        yield _Filled(cache, resident)


def _put(cache: Cache, tokens: array[int]) -> None:
    """Store a prompt as far as lookups can tell: everything but the copy of its KV."""
    planner = cache.stack.planner
    chain = cache.chain(tokens, _PUBLIC)
    todo = planner.plan_store(chain, 0, tail=False, holds=lambda group, span: True)
    planner.stored(todo.gathers, ok=not todo.dropped)
    if todo.dropped:
        raise CapacityError(f"{len(todo.dropped)} chunks found no room")
    planner.settle(chain, todo.gathers)
