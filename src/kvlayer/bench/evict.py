"""What a put pays to make room while the oldest objects are pinned: decisions only, no I/O."""

from __future__ import annotations

import time
from array import array
from statistics import median

from kvlayer.bench.measure import Row
from kvlayer.bench.prompts import prompt
from kvlayer.config.registry import POLICIES
from kvlayer.errors import CapacityError
from kvlayer.identity.keys import PUBLIC_ZONE, ChunkChain, Scope
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout
from kvlayer.payload import ALIGNMENT
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import ObjectRecord

__all__ = ["evict_rows"]

_NAMESPACE = "ab" * 32
_CHUNK = 256
_PROMPT_CHUNKS = 128
_PUBLIC = Scope()
_GROUP = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 1, 1)  # one page a chunk


async def evict_rows(rounds: int, *, pinned: int = 20_000, free: int = 4_096) -> list[Row]:
    """``evict.pinned20k``: seconds to decide the put of one object that must evict another.

    Host memory is full: the ``pinned`` oldest objects are leased and ``free`` newer ones are not.
    The ceiling is the same put where nothing is pinned. The two take turns.
    """
    held, loose = _Full(pinned, free, lease=True), _Full(pinned, free, lease=False)
    samples = [(loose.put(number), held.put(number)) for number in range(100 * rounds)]
    top, own = (median(column) for column in zip(*samples[10:], strict=True))
    return [Row("evict.pinned20k", own, "s", top)]


class _Full:
    """A planner whose host memory is full of one-page objects."""

    def __init__(self, pinned: int, free: int, *, lease: bool) -> None:
        oldest, newest = -(-pinned // _PROMPT_CHUNKS), -(-free // _PROMPT_CHUNKS)
        self._planner = Planner(
            _NAMESPACE,
            KVLayout.single(_GROUP, NHD, tokens_per_block=_CHUNK),
            tiers=["cpu"],
            capacity=(oldest + newest) * _PROMPT_CHUNKS * ALIGNMENT,
            policy=POLICIES.load("prefix-lru"),
            tokens_per_chunk=_CHUNK,
            tokens_per_tail=_CHUNK // 8,
            clock=time.monotonic,
            wall_clock=time.time,
        )
        (self._part,) = self._planner.directory.needs
        for number in range(oldest + newest):
            chain = self._chain(prompt(_CHUNK * _PROMPT_CHUNKS, number))
            self._store(chain)
            if lease and number < oldest:
                self._planner.lease(self._planner.match(chain), owner="", seconds=3600.0)

    def put(self, number: int) -> float:
        """Seconds to find a place for a new object, to evict for it and to account for both."""
        chain = self._chain(prompt(_CHUNK, 1_000_000 + number))
        span, evicted = chain.span(0), list[ObjectRecord]()
        record = self._planner.directory.ensure(_NAMESPACE, span, PUBLIC_ZONE, self._part)
        started = time.perf_counter()
        slot = self._planner.plan_fetch(span, record, evicted)
        if slot is not None:
            self._planner.fetched(slot, 1, ok=True)
        seconds = time.perf_counter() - started
        if len(evicted) != 1:
            raise CapacityError(f"{len(evicted)} objects were evicted to make room for one")
        return seconds

    def _store(self, chain: ChunkChain) -> None:
        todo = self._planner.plan_store(chain, 0, tail=False, holds=lambda group, span: True)
        self._planner.stored(todo.gathers, ok=not todo.dropped)
        self._planner.settle(chain, todo.gathers)
        if todo.dropped or todo.evicted:
            raise CapacityError("host memory was full before it should have been")

    @staticmethod
    def _chain(tokens: array[int]) -> ChunkChain:
        return ChunkChain(
            tokens, _PUBLIC, tokens_per_chunk=_CHUNK, tokens_per_tail=_CHUNK // 8
        ).named_in(_NAMESPACE)
