"""KV cache events: what vLLM tells its routers of the blocks that kvlayer's tiers hold.

A router knows blocks by vLLM's hashes, a tier knows chunks and tails by kvlayer's. The request that
stores or finds a chunk says which blocks it is; from then on the cache's own events say where the
chunk is and where it is not any more.

Chunks that are stored come to a tier in any order, and are told of in the order in which they came.
A router knows their parents by then: vLLM told of the same blocks, in the prompt's order, when it
computed them. Chunks that are found in a tier are told of in the prompt's order.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from kvlayer import Cache
from kvlayer.events import (
    Event,
    ObjectQuarantined,
    ObjectsEvicted,
    ObjectsRemoved,
    ObjectsStored,
    TransferDone,
)
from kvlayer.identity.chain import ChunkChain
from kvlayer.identity.keys import ObjectKey, Span
from kvlayer.layout import AttentionKind, HitRule
from kvlayer.results import Cause
from kvlayer.tier.planner.records import HostState
from kvlayer_vllm.engine import (
    Request,
    event_extra_keys,
    external_hash,
    kv_events,
    resolved_hashes,
)
from kvlayer_vllm.groups import EngineGroup

__all__ = ["BlockEvents"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it

_SLICE = 16  # spans named per turn of the loop: some 20 us each
_MOST_ELSEWHERE = 4096  # chunks that are remembered while no tier holds them

_KINDS: Mapping[AttentionKind, str] = {
    AttentionKind.MHA: "full_attention",
    AttentionKind.MLA: "mla_attention",
    AttentionKind.STATE: "mamba",
}
_KINDS_OF_RULES: Mapping[HitRule, str] = {
    HitRule.TRAILING: "sliding_window",
    HitRule.CHUNKED: "chunked_local_attention",
}


Name: TypeAlias = tuple[bytes, int]
"""A span: the hash at its end, and how many tokens it holds."""


class Place(NamedTuple):
    """One KV group on one tier."""

    tier: str
    group: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of vLLM's that end in one chunk or tail."""

    hashes: tuple[bytes, ...]
    parent: bytes | None
    """The block before them; None at the prompt's start."""
    tokens: array[int]
    size: int
    lora_id: int | None
    lora_name: str | None
    extra_keys: Sequence[tuple[Any, ...] | None] | None
    """What the engine mixed into each block's hash; None where into none."""


@dataclass(slots=True, eq=False)
class Named:
    """A chunk or tail whose blocks are known, by their size, and where it lies."""

    blocks: dict[int, Blocks]
    places: set[Place] = field(default_factory=set[Place])


class BlockEvents:
    """A sink of the cache's. Its loop learns and hears, the scheduler's thread takes.

    Chunks and tails of different prompts share blocks: a block is stored when the first of them
    comes to a place, and removed when the last has left it. Of KV groups that share a group of the
    engine's the first speaks for all. A chunk that a tier holds costs some
    3 KiB; of those that none holds the last few thousand are remembered.
    """

    def __init__(self, groups: Sequence[EngineGroup]) -> None:
        self._groups = tuple(groups)
        self._sizes = sorted({each.tokens_per_block for each in groups})
        tables = [each.table for each in groups]
        self._told = {tables.index(table) for table in tables}
        """Groups that are told of."""
        self._named: dict[Name, list[Named]] = {}
        """By a span's name. Two names of one adapter are two sets of blocks for the same bytes."""
        self._elsewhere: OrderedDict[Name, None] = OrderedDict()
        """Those that no tier holds, oldest first."""
        self._counts: dict[Place, dict[bytes, int]] = {}
        self._queue: deque[Any] = deque()
        self._is_broken = False
        self._host = ""
        self.tokens_per_hash = 0
        """How many tokens each hash of a request adds; 0 until the engine has said so."""

    def take(self) -> list[Any]:
        """The events since the last call, in order. In the scheduler's thread."""
        return [self._queue.popleft() for _ in range(len(self._queue))]

    # -- which blocks a chunk is; on the cache's loop ----------------------------------------------

    async def stores(
        self, cache: Cache, chain: ChunkChain, *, request: Request, first: int
    ) -> None:
        """Tokens ``first ..`` of a request, named by ``chain``, are going to be stored."""
        spans = map(chain.span, range(first // chain.chunk_step, len(chain)))
        await self.learn(cache, request, [*spans, *chain.tails(len(chain))[:1]])

    async def learn(self, cache: Cache, request: Request, spans: Iterable[Span]) -> None:
        """These are chunks of a request's prompt; those that lie somewhere are told at once.

        Never raises: an event is not worth what is being stored or loaded.
        """
        try:
            self._host = cache.stack.host.name
            for count, span in enumerate(spans, 1):
                self._learn(cache, request, span)
                if count % _SLICE == 0:
                    await asyncio.sleep(0)
        except Exception:  # noqa: BLE001  # whatever an untold block is, it is not a reason to fail
            if not self._is_broken:
                self._is_broken = True
                _log.exception("some KV cache events are missing from here on (told once)")

    def _learn(self, cache: Cache, request: Request, span: Span) -> None:
        found = {size: self._blocks(request, span, size) for size in self._sizes}
        blocks = {size: each for size, each in found.items() if each is not None}
        name = (span.hash, span.tokens)
        known = self._named.get(name, [])
        if not blocks or blocks in [named.blocks for named in known]:
            return
        named = Named(blocks)
        self._named[name] = [*known, named]
        for place in _places(cache, name):
            self._appeared(named, place)
        self._settle(name)

    def _blocks(self, request: Request, span: Span, size: int) -> Blocks | None:
        """The blocks of a request that end in a span; None without any, or without hashes."""
        first, stop = span.start // size, span.stop // size
        hashes = resolved_hashes(request, self.tokens_per_hash, size)
        if first >= stop or stop > len(hashes):
            return None
        lora = request.lora_request
        return Blocks(
            hashes=tuple(hashes[n] for n in range(first, stop)),
            parent=hashes[first - 1] if first else None,
            tokens=array("i", request.all_token_ids[first * size : stop * size]),
            size=size,
            lora_id=None if lora is None else lora.adapter_id,
            lora_name=None if lora is None else lora.name,
            extra_keys=event_extra_keys(request, size, first, stop),
        )

    # -- where a chunk is; on the cache's loop -----------------------------------------------------

    def __call__(self, event: Event) -> None:
        match event:
            case ObjectsStored(tier=tier, keys=keys):
                self._came(tier, keys)
            case TransferDone(cause=None, key=key) as moved:
                self._came(self._host if moved.direction == "load" else moved.tier, (key,))
            case TransferDone(cause=Cause.VANISHED, key=key, tier=tier, direction="load"):
                self._left(tier, (key,))
            case ObjectsEvicted(tier=tier, keys=keys) | ObjectsRemoved(tier=tier, keys=keys):
                self._left(tier, keys)
            case ObjectQuarantined(tier=tier, key=key):
                self._left(tier, (key,))
            case _:
                pass

    def _came(self, tier: str, keys: Iterable[ObjectKey]) -> None:
        for key in keys:
            for named in self._named.get(_name(key), ()):
                self._appeared(named, Place(tier, key.part.group))
            self._settle(_name(key))

    def _left(self, tier: str, keys: Iterable[ObjectKey]) -> None:
        for key in keys:
            for named in self._named.get(_name(key), ()):
                self._disappeared(named, Place(tier, key.part.group))
            self._settle(_name(key))

    def _settle(self, chunk: Name) -> None:
        """Forget the oldest of the chunks that are nowhere."""
        known = self._named.get(chunk, ())
        if any(named.places for named in known):
            self._elsewhere.pop(chunk, None)
        elif known:
            self._elsewhere[chunk] = None
        while len(self._elsewhere) > _MOST_ELSEWHERE:
            oldest, _ = self._elsewhere.popitem(last=False)
            del self._named[oldest]

    # -- what a router is told ---------------------------------------------------------------------

    def _appeared(self, named: Named, place: Place) -> None:
        blocks = named.blocks.get(self._groups[place.group].tokens_per_block)
        if place in named.places or blocks is None or place.group not in self._told:
            return
        named.places.add(place)
        counts = self._counts.setdefault(place, {})
        for each in blocks.hashes:
            counts[each] = counts.get(each, 0) + 1
        # What another chunk or tail has told already are the first ones: hashes chain.
        known = sum(counts[each] > 1 for each in blocks.hashes)
        if known < len(blocks.hashes):
            self._queue.append(self._stored(blocks, known, place))

    def _disappeared(self, named: Named, place: Place) -> None:
        blocks = named.blocks.get(self._groups[place.group].tokens_per_block)
        if place not in named.places or blocks is None:
            return
        named.places.remove(place)
        counts = self._counts[place]
        gone: list[bytes] = []
        for each in blocks.hashes:
            counts[each] -= 1
            if not counts[each]:
                del counts[each]
                gone.append(each)
        if gone:
            self._queue.append(
                kv_events().BlockRemoved(
                    block_hashes=[external_hash(each) for each in gone],
                    group_idx=self._groups[place.group].table,
                    **self._where(place),
                )
            )

    def _stored(self, blocks: Blocks, first: int, place: Place) -> Any:
        """The event that says so of all but the first blocks."""
        held = self._groups[place.group].group
        parent = blocks.hashes[first - 1] if first else blocks.parent
        rule = held.hit_rule
        return kv_events().BlockStored(
            block_hashes=[external_hash(each) for each in blocks.hashes[first:]],
            parent_block_hash=None if parent is None else external_hash(parent),
            token_ids=list(blocks.tokens[first * blocks.size :]),
            block_size=blocks.size,
            lora_id=blocks.lora_id,
            lora_name=blocks.lora_name,
            # ``lookahead_token_ids`` (0.33) stays out: beside a connector hashes cover no more.
            extra_keys=blocks.extra_keys and list(blocks.extra_keys[first:]),
            group_idx=self._groups[place.group].table,
            kv_cache_spec_kind=_KINDS_OF_RULES.get(rule) or _KINDS[held.kind],
            kv_cache_spec_sliding_window=held.window_tokens if rule is HitRule.TRAILING else None,
            **self._where(place),
        )

    def _where(self, place: Place) -> dict[str, Any]:
        """Host memory is this process's own; who else reads a lower tier is its own affair."""
        is_memory = place.tier.partition("-")[0] == "cpu"
        return {
            "medium": kv_events().MEDIUM_CPU if is_memory else kv_events().MEDIUM_STORAGE,
            "locality": "LOCAL" if is_memory else None,
            "ownership": None if place.tier == self._host else place.tier,
        }


def _name(key: ObjectKey) -> Name:
    return key.end_hash, key.tokens


def _places(cache: Cache, name: Name) -> list[Place]:
    """Where a span is already. On the loop, which alone changes that."""
    end_hash, tokens = name
    tiers = cache.stack.lower
    host = cache.stack.host.name
    records = cache.stack.planner.directory.ending(cache.namespace.digest, end_hash)
    objects = [o for record in records if record.tokens == tokens for o in record.objects]
    return [
        *(Place(host, found.part.group) for found in objects if found.host is HostState.READY),
        *(
            Place(tier.name, found.part.group)
            for found in objects
            for tier in tiers
            if found.tiers >> tier.index & 1
        ),
    ]
