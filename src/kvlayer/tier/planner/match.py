"""What a lookup has found of a prompt: its spans, what serves them, and of which quality. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvlayer.identity.keys import ChunkChain, Span
from kvlayer.identity.quality import EXACT
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.strand import Held, flat

__all__ = ["Match", "Run"]


class Run(NamedTuple):
    """Chunks ``[first, stop)`` of a prompt, presumed on ``tiers`` where nothing is known of them.

    Bit t stands for tier t: it has said that it holds chunk ``stop`` in ``namespace``.
    """

    first: int
    stop: int
    tiers: int
    namespace: str


class Match:
    """The longest usable prefix of a prompt. ``covers[i][g]``: what serves span i for group g.

    It is exact, or exact followed by one quality: the only one that its ``chain`` accepts, so that
    whoever matches that again is served no other.

    Whoever reads it changes nothing: the directory shares what it remembers.
    """

    __slots__ = ("_covers", "_first", "_path", "_rest", "chain", "runs", "spans")

    def __init__(
        self,
        chain: ChunkChain,
        spans: list[Span],
        covers: list[list[tuple[ObjectRecord, ...]]],
        *,
        first: Sequence[Held] = (),
    ) -> None:
        """``first`` serves the first spans, an object each, in host memory; ``covers`` the rest."""
        self.chain = chain
        self.spans = spans
        self._first = first
        self._rest = covers
        self._covers = None if first else covers  # made when somebody asks
        self._path: list[ObjectRecord] | None = None
        self.runs: Sequence[Run] = ()
        """What of it was presumed, for whoever matches it again."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Match):
            return NotImplemented
        mine, its = (self.chain, self.spans), (other.chain, other.spans)
        return mine == its and self.covers == other.covers

    def __hash__(self) -> int:
        return hash((self.chain, len(self.spans)))

    @property
    def covers(self) -> list[list[tuple[ObjectRecord, ...]]]:
        if self._covers is None:
            covers: list[list[tuple[ObjectRecord, ...]]]
            covers = [[(found,)] for found in flat(self._first)]
            self._covers = covers + self._rest
        return self._covers

    @property
    def tokens(self) -> int:
        return self.spans[-1].stop if self.spans else 0

    @property
    def quality(self) -> str:
        """What the end of it is, and what is computed after it."""
        its = self.chain.accepts
        return its[0].quality if its and self.tokens > its[0].first_token else EXACT

    @property
    def exact_tokens(self) -> int:
        """How much of it is exact."""
        return min([self.tokens, *(each.first_token for each in self.chain.accepts)])

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the prompt that has a name."""
        return self.tokens == self.chain.named_tokens

    @property
    def is_resident(self) -> bool:
        """Whether all of it was in host memory when it was found."""
        return all(found.host is HostState.READY for found in _objects(self._rest))

    def path(self) -> list[ObjectRecord]:
        """Every object of the match, root first."""
        if self._path is None:
            self._path = [*flat(self._first), *_objects(self._rest)]
        return self._path

    def held(self) -> tuple[Sequence[Held], list[ObjectRecord]]:
        """The same to be leased: what may be strung together, and what comes after that."""
        return self._first, [*_objects(self._rest)]

    def first(self, count: int) -> Match:
        """The first ``count`` spans of it, where a hit may end anywhere."""
        match = Match(self.chain, self.spans[:count], self.covers[:count])
        match.runs = self.runs
        return match

    def by_tier(self, count: int) -> list[int]:
        """Tokens by the farthest of ``count`` tiers that each span needs."""
        if self.is_resident:  # nearly always: keep it quick
            return [self.tokens] + [0] * (count - 1)
        tokens = [0] * count
        for span, covers in zip(self.spans, self.covers, strict=True):
            farthest = max((found.tier for cover in covers for found in cover), default=0)
            tokens[max(farthest, 0)] += span.tokens
        return tokens


def _objects(covers: Iterable[Iterable[Iterable[ObjectRecord]]]) -> Iterator[ObjectRecord]:
    return (found for groups in covers for cover in groups for found in cover)
