"""How far a hit goes, and what serves it: the answer to a lookup. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias, overload

from kvlayer._steps import SLICE, Steps
from kvlayer.identity.keys import ChunkChain, Span
from kvlayer.identity.quality import EXACT
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.strand import Held, flat

__all__ = ["Cover", "Match", "Needs", "Run"]

Cover: TypeAlias = tuple[ObjectRecord, ...]
"""What serves one span for one group."""


class Run(NamedTuple):
    """Chunks ``[first, stop)`` of a prompt, presumed on ``tiers`` where nothing is known of them.

    Bit t stands for tier t: it has said that it holds chunk ``stop`` in ``namespace``.
    """

    first: int
    stop: int
    tiers: int
    namespace: str

    def within(self, first: int, stop: int) -> Run:
        """That part of it."""
        return self._replace(first=max(first, self.first), stop=min(stop, self.stop))


class Match:
    """The longest usable prefix of a prompt.

    It is exact, or exact followed by one quality: the only one that its ``chain`` accepts, so that
    whoever matches that again is served no other.

    Whoever reads it changes nothing: the directory shares what it remembers. What is said of all
    of it is said of the moment it was found, unless it is pinned.
    """

    __slots__ = ("_first", "_lead", "_others", "_path", "_rest", "chain", "is_resident", "reached",
                 "runs", "spans")  # fmt: skip

    def __init__(
        self,
        chain: ChunkChain,
        spans: list[Span],
        covers: Sequence[Sequence[Cover]],
        *,
        first: Sequence[Held] = (),
        rest: list[ObjectRecord] | None = None,
        is_resident: bool | None = None,
        reached: int = 0,
    ) -> None:
        """``first`` serves the first spans, an object each, in host memory; ``covers`` the others.

        Who has walked along it already knows the objects of ``covers`` (``rest``), and whether all
        of it ``is_resident``.
        """
        self.chain = chain
        self.spans = spans
        self._first = first
        self._lead: list[ObjectRecord] | None = None  # ``first``, made flat when somebody asks
        self._others = covers
        self._rest = [*_objects(covers)] if rest is None else rest
        self._path: list[ObjectRecord] | None = None
        if is_resident is None:
            is_resident = all(found.host is HostState.READY for found in self._rest)
        self.is_resident = is_resident
        """Whether all of it was in host memory when it was found."""
        self.reached = reached
        """How far groups that need every chunk have it, where others may end it before."""
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
    def lead(self) -> list[ObjectRecord]:
        """What serves the first spans, where that is one object each, in host memory."""
        if self._lead is None:
            self._lead = flat(self._first)
        return self._lead

    def covering(self, index: int) -> Sequence[Cover]:
        """What serves a span, by group; empty where a group needs nothing of it."""
        lead = self.lead
        return ((lead[index],),) if index < len(lead) else self._others[index - len(lead)]

    @property
    def covers(self) -> list[Sequence[Cover]]:
        """:meth:`covering` of every span."""
        return [self.covering(index) for index in range(len(self.spans))]

    @property
    def needs(self) -> Needs:
        """Its spans and the objects each needs."""
        return Needs(self, range(len(self.spans)))

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

    def path(self) -> list[ObjectRecord]:
        """Every object of the match, root first."""
        if self._path is None:
            self._path = [*self.lead, *self._rest]
        return self._path

    def held(self) -> tuple[Sequence[Held], list[ObjectRecord]]:
        """The same to be leased: what may be strung together, and what comes after that."""
        return self._first, self._rest

    def first(self, count: int) -> Match:
        """The first ``count`` spans of it, where a hit may end anywhere."""
        known = len(self.lead)
        if count <= known:
            match = Match(self.chain, self.spans[:count], [], first=self.lead[:count])
        else:
            others = self._others[: count - known]
            match = Match(self.chain, self.spans[:count], others, first=self._first)
        match.runs = self.runs
        return match

    def by_tier(self, count: int) -> Steps[list[int]]:
        """Tokens by the farthest of ``count`` tiers that each span needs."""
        tokens = [0] * count
        if self.is_resident:  # nearly always: keep it quick
            tokens[0] = self.tokens
            return tokens
        for index, (span, found) in enumerate(self.needs, 1):
            tokens[max(max((each.tier for each in found), default=0), 0)] += span.tokens
            if not index % SLICE:
                yield
        return tokens


class Needs(Sequence[tuple[Span, Sequence[ObjectRecord]]]):
    """Some spans of a match in prompt order, and the objects each needs. Made as they are read."""

    __slots__ = ("_indices", "_match")

    def __init__(self, match: Match, indices: range) -> None:
        self._match = match
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, at: int) -> tuple[Span, Sequence[ObjectRecord]]: ...
    @overload
    def __getitem__(self, at: slice) -> Needs: ...
    def __getitem__(self, at: int | slice) -> tuple[Span, Sequence[ObjectRecord]] | Needs:
        if isinstance(at, slice):
            return Needs(self._match, self._indices[at])
        index = self._indices[at]
        covers = self._match.covering(index)
        return self._match.spans[index], [found for cover in covers for found in cover]


def _objects(covers: Iterable[Iterable[Cover]]) -> Iterator[ObjectRecord]:
    return (found for groups in covers for cover in groups for found in cover)
