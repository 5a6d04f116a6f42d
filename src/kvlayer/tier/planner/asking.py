"""What to ask the tiers about one prompt, round by round. Pure.

A stored prompt rarely has holes, so a tier is not asked about every chunk. A search divides the
chunks that the directory does not know into windows that double. One round asks about the last
chunk of each window. If that chunk is there, the search *presumes* the rest of its window. It
divides the first window whose last chunk is missing again, until it has found the boundary. It asks
about tails at the boundary, and about groups that need only some chunks backwards from it: windows
and states. A state is at few of the ends, so a round asks about several of them. Presence is a
hint: the read finds holes.

The caller holds the directory's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvlayer._steps import SLICE, Steps
from kvlayer.identity.keys import ChunkChain, ObjectKey
from kvlayer.layout import HitRule, KVGroup
from kvlayer.tier.planner.match import Match, Run
from kvlayer.tier.planner.matcher import Matcher

__all__ = ["Search"]

_FIRST = 9  # chunks of the first round: with seven tails that makes sixteen keys
_NEXT = 15  # chunks of a later one: a window of 256 is searched in two
_BACK = 16  # chunks of windows and states asked about beyond the first window, doubling


class Search:
    """The questions about one prompt in one namespace.

    ``every``: about every chunk, so that nothing is presumed. ``start``: from this chunk on; others
    serve what comes before it.
    """

    def __init__(
        self,
        matcher: Matcher,
        groups: Sequence[KVGroup],
        match: Match,
        *,
        every: bool,
        start: int = 0,
    ) -> None:
        """``match``: what is known of the prompt."""
        self._matcher = matcher
        self._groups = groups
        rules = [group.hit_rule for group in groups]
        self._every_chunk = [g for g, rule in enumerate(rules) if rule is HitRule.EVERY_CHUNK]
        self._at_end = [g for g, rule in enumerate(rules) if rule is not HitRule.EVERY_CHUNK]
        self._windows = [g for g in self._at_end if rules[g] is not HitRule.BOUNDARY]
        """What a hit with a tail needs before the tail: its state is the tail's."""
        self._at_once = _BACK if HitRule.BOUNDARY in rules else 0
        """So many chunks back a first question reaches, at least."""
        self.chain: ChunkChain = match.chain
        self._match = match
        self._every = every
        self._start = start
        self.runs: list[Run] = []
        """What may be presumed by what was heard so far."""
        self._has_begun = False
        self._lacking: list[int] = []
        """Chunks that were not known when the search began, from the first gap on."""
        self._low = 0
        """So many of them are there, or presumed."""
        self._high = 0
        """This one of them is not there, or is beyond the last."""
        self._asked: list[int] = []
        """Those of them that the last round was about."""
        self._tails_at = -1
        """The chunk in whose place tails were asked about last."""
        self._back: int | None = None
        """Groups of ``_at_end`` were asked about from this chunk on, up to the boundary."""

    def next(self, tiers: int) -> Steps[list[ObjectKey]]:
        """The keys of the next round, once the last one's answers are noted; none: it is over.

        ``tiers``: bit t where tier t is one of those asked. Only they are presumed to hold more.
        """
        if not self._has_begun:
            self._has_begun = True
            if self._match.is_whole:
                self._back, self._tails_at = 0, len(self.chain)  # there is no more of it
                return []
            keys = yield from self._begin()
        else:
            yield from self._hear(tiers)
            keys = self._chunks()
        while not keys and self._low < self._high:  # all of them have become known meanwhile
            yield
            yield from self._hear(tiers)
            keys = self._chunks()
        return keys or self._at_boundary()

    # -- chunks ----------------------------------------------------------------------------------

    def _begin(self) -> Steps[list[ObjectKey]]:
        chain, reached = self.chain, self._match.reached
        if self._every or self._start:
            reached = yield from self._matcher.reaching(chain, self._start, seen=self._every)
        lacking = yield from self._matcher.lacking(chain, reached, seen=self._every)
        self._lacking, self._high = lacking, len(lacking)
        first = lacking[0] if lacking else len(chain)
        if self._every:
            self._asked = [*range(self._high)]
            keys = yield from self._matcher.probes(chain, reached, self._start)
        else:
            self._asked = _ends(self._high)
            keys = self._keys()
        self._tails_at = first
        return keys + self._matcher.tail_probes(chain, first)

    def _hear(self, tiers: int) -> Steps[None]:
        """Find out what the last round has said, by what is known now."""
        for count, at in enumerate(self._asked, 1):
            if not count % SLICE:
                yield
            index = self._lacking[at]
            holders = self._matcher.holders(self.chain, index, seen=self._every)
            is_alone = at == self._low
            if holders is None or not (is_alone or holders & tiers):
                self._high = at
                break
            if not is_alone:
                self.runs.append(
                    Run(self._lacking[self._low], index, holders & tiers, self.chain.namespace)
                )
            self._low = at + 1
        self._asked = []

    def _chunks(self) -> list[ObjectKey]:
        self._asked = [self._low + at for at in _spread(self._high - self._low)]
        return self._keys()

    def _keys(self) -> list[ObjectKey]:
        return self._lacked([self._lacking[at] for at in self._asked], self._every_chunk)

    def _lacked(self, chunks: Iterable[int], groups: Iterable[int]) -> list[ObjectKey]:
        wanted = (self._matcher.lacked(self.chain, i, g) for i in chunks for g in groups)
        return [key for keys in wanted for key in keys]

    # -- what ends there -------------------------------------------------------------------------

    def _at_boundary(self) -> list[ObjectKey]:
        """Tails and windows of a hit that ends where chunks do."""
        boundary = len(self.chain)
        if self._high < len(self._lacking):
            boundary = self._lacking[self._high]
        keys: list[ObjectKey] = []
        if boundary != self._tails_at:
            self._tails_at = boundary
            keys += self._matcher.tail_probes(self.chain, boundary)
        if not self._every:  # else they were asked about with the chunks
            keys += self._backwards(boundary)
        return keys

    def _backwards(self, boundary: int) -> list[ObjectKey]:
        """What is lacking for the longest hit that is not yet known to be impossible."""
        while self._at_end:
            asked_from = boundary if self._back is None else self._back
            end, groups = self._possible(boundary, asked_from, self._windows), self._windows
            if end < boundary or not self._matcher.has_tail(self.chain, boundary):
                end, groups = self._possible(boundary, asked_from, self._at_end), self._at_end
            first = min((self._window(g, end) for g in groups), default=asked_from)
            if not end or first >= asked_from:
                break
            back = self._at_once if self._back is None else max(boundary - asked_from, _BACK)
            first = max(min(first, asked_from - back), 0)
            self._back = first
            if keys := self._lacked(range(first, asked_from), self._at_end):
                return keys
        return []

    def _possible(self, boundary: int, asked_from: int, groups: Sequence[int]) -> int:
        """The longest hit of these groups, in chunks, if all that was not asked about is there."""
        end = boundary
        while end:
            gap = max((self._gap(g, end, asked_from) for g in groups), default=-1)
            if gap < 0:
                break
            end = gap
        return end

    def _gap(self, group: int, end: int, asked_from: int) -> int:
        """The last chunk that is not there in the window of a hit of ``end`` chunks; -1: none."""
        for index in range(end - 1, max(self._window(group, end), asked_from) - 1, -1):
            if self._matcher.lacks(self.chain, index, group):
                return index
        return -1

    def _window(self, group: int, end: int) -> int:
        """The first chunk in the window of a hit of ``end`` chunks."""
        step = self.chain.chunk_step
        return max(self._groups[group].first_needed(end * step) // step, self._start)


def _ends(count: int) -> list[int]:
    """The last of each of the windows that ``count`` chunks are parted into: 1, 3, 4, 8, 16..."""
    if count <= _FIRST:
        return [*range(count)]
    ends, stop = [0], 4
    while stop < count:
        ends.append(stop - 1)
        stop *= 2
    return [*ends, count - 1]


def _spread(count: int) -> list[int]:
    """All of ``count``, or as many as a round is about, evenly."""
    if count <= _NEXT:
        return [*range(count)]
    return [(at + 1) * count // (_NEXT + 1) for at in range(_NEXT)]
