"""A match under way: a slice of a prompt's chunks at a time. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kvlayer._steps import SLICE, Steps
from kvlayer.identity.keys import ChunkChain, Span
from kvlayer.identity.quality import Accepted
from kvlayer.tier.planner.match import Cover, Match
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.strand import Held

if TYPE_CHECKING:
    from kvlayer.tier.planner.matcher import Covers, Matcher

__all__ = ["Walk"]


class Walk:
    """Looks for the longest usable prefix of at most ``stop`` tokens.

    Under the planner's lock call :meth:`more` until it ``is_over``, and keep what it returns;
    where there was but one slice, nothing has to be kept before :meth:`found`.
    """

    def __init__(
        self,
        matcher: Matcher,
        chain: ChunkChain,
        stop: int,
        follow: Accepted | None = None,
    ) -> None:
        """``follow``: the quality that may follow the exact chunks; without one all is exact."""
        self._matcher = matcher
        self._chain = chain
        self._follow = follow
        self._start = -1
        """The token from which on that quality serves it; once it is known."""
        self._named = chain
        """The prompt in the namespace that is looked in now."""
        self._stop = stop
        self._end = len(chain) if stop >= chain.num_tokens else stop // chain.chunk_step
        """So many full chunks may be in it."""
        self.at = 0
        """So many it has gone over."""
        self._leads = matcher.is_plain
        self._first: list[Held] = []
        self._spans: list[Span] = []
        self._covers: list[Covers] = []
        """Of the spans that are not served by ``_first``."""
        self._rest: list[ObjectRecord] = []
        """Objects of ``_covers``, in order."""
        self._is_resident = True
        self._tails: list[tuple[tuple[Span, Covers], ...]] = []
        """What may follow them, the longest first."""
        self.is_over = False

    def more(self) -> tuple[Sequence[Held], list[ObjectRecord]]:
        """Go over the next slice; what may be part of the match, as ``Match.held`` says it."""
        matcher, chain = self._matcher, self._named
        first: list[Held] = []
        before = self.at
        if self._leads:
            first, self.at, self._leads = matcher.first(chain, before, self._end)
            self._first += first
            self._spans += chain.spans(self.at, before)
        if self._leads:
            return first, []
        step = chain.chunk_step
        if min(self._stop, chain.named_tokens) - self.at * step < chain.tail_step:
            self.is_over = True  # there is no more of it
            return first, []
        last = min(max(before + SLICE, self.at), self._end)
        spans, covers = matcher.chunks(chain, last, self.at, self._stop)
        reached = spans[-1].stop if spans else self.at * step
        if self._end > last and reached == last * step:
            self.at = last
        elif self._follow is not None and self._start < 0 and reached >= self._follow.first_token:
            self._start, self.at = reached, reached // step
            self._named = chain.named_in(self._follow.namespace)
        else:
            self.is_over = True
            self._tails = [*matcher.paths(chain, reached, self._stop)]
        self._spans += spans
        self._covers += covers
        found = [*_objects(covers)]
        self._rest += found
        self._is_resident = self._is_resident and _is_resident(found)
        return first, [*found, *(each for path in self._tails for each in _objects_of(path))]

    def found(self) -> Steps[Match]:
        """The match: nothing in an epoch that is over. No lock is needed."""
        chain, follow = self._chain.accepting(), self._follow
        if chain.is_stale or (follow is not None and self._start < 0):
            return Match(chain, [], [])  # or something of what was exact has gone since
        if follow is not None:
            chain = chain.accepting(follow._replace(first_token=self._start))
        matcher = self._matcher
        spans, covers, rest = self._spans, self._covers, self._rest
        for path in self._tails:
            longer = [*spans, *(span for span, _ in path)]
            found = [*covers, *(groups for _, groups in path)]
            if matcher.count(longer, found) == len(longer):
                spans, covers, rest = longer, found, [*rest, *_objects_of(path)]
                break
        if matcher.is_plain:
            is_resident = self._is_resident and _is_resident(rest[len(self._rest) :])
            return Match(
                chain,
                spans,
                matcher.needed(spans, covers),
                first=self._first,
                rest=rest,
                is_resident=is_resident,
                reached=spans[-1].stop if spans else 0,
            )
        reached = spans[-1].stop if spans else 0
        spans = spans[: matcher.count(spans, covers)]
        covers = covers[: len(spans)]
        stop = spans[-1].stop if spans else 0
        needed: list[Sequence[Cover]] = []
        rest, is_resident = list[ObjectRecord](), True
        for at in range(0, len(spans), SLICE):
            needed += matcher.needed(spans[at : at + SLICE], covers[at : at + SLICE], stop)
            some = [*_objects(needed[at:])]
            is_resident = is_resident and _is_resident(some)
            rest += some
            if at + SLICE < len(spans):
                yield
        return Match(chain, spans, needed, rest=rest, is_resident=is_resident, reached=reached)


def _objects(covers: Sequence[Sequence[Cover | None]]) -> Iterator[ObjectRecord]:
    return (found for groups in covers for cover in groups for found in cover or ())


def _objects_of(path: Sequence[tuple[Span, Covers]]) -> Iterator[ObjectRecord]:
    return (found for _, groups in path for cover in groups for found in cover or ())


def _is_resident(found: Sequence[ObjectRecord]) -> bool:
    return all(each.host is HostState.READY for each in found)
