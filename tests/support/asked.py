"""A planner's questions about prompts, answered from sets of keys and counted."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from stacks import NAMESPACE, plain_layout, whole

from kvlayer._steps import finish
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ChunkChain, ObjectKey, Part, Scope, Span
from kvlayer.layout import KVLayout
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import Planner

FULL, WINDOW, STATE = Part(0, (0, 2), (0, 2)), Part(1, (0, 1), (0, 2)), Part(2, (0, 1), None)


def key(chain: ChunkChain, span: Span, part: Part = FULL) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, chain.zone(span), span.hash, span.tokens, part)


class Tiers:
    """Answers a planner's questions from sets of keys, and counts them."""

    def __init__(self, planner: Planner, *held: Iterable[ObjectKey]) -> None:
        self.planner = planner
        self.held = [set(keys) for keys in held]
        self.asked: list[list[ObjectKey]] = []
        """By round, what the first tier was asked."""

    def look(self, chain: ChunkChain, now: float = 0.0, *, every: bool = False) -> Match:
        search = self.planner.search(self.planner.match(chain), every=every)
        while questions := finish(self.planner.questions(search, 0b11 << 1, now)):
            self.asked += [keys for tier, keys in questions if tier == 1]
            for tier, keys in questions:
                assert len(set(keys)) == len(keys)
                there = [k for k in keys if k in self.held[tier - 1]]
                self.planner.note(there, tier)
                self.planner.absent(set(keys) - set(there), tier, now)
        leased = self.planner.lease_match(chain, search.runs, whole, owner="", seconds=1e9)
        assert leased is not None
        return leased[0]

    @property
    def keys(self) -> int:
        return sum(map(len, self.asked))


def long_chain(count: int) -> ChunkChain:
    return ChunkChain(
        array("i", range(count)), Scope(), tokens_per_chunk=256, tokens_per_tail=32
    ).named_in(NAMESPACE)


def long_planner(layout: KVLayout | None = None) -> Planner:
    return Planner(
        NAMESPACE,
        layout or plain_layout(),
        tiers=["host", "one", "two"],
        capacity=1 << 20,
        policy=PrefixLRU,
        tokens_per_chunk=256,
        tokens_per_tail=32,
        clock=lambda: 0.0,
        wall_clock=lambda: 0.0,
    )
