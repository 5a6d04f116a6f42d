"""Finding the longest usable prefix in the directory, and what to ask lower tiers for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, cast

from kvlayer._steps import SLICE, Steps, finish
from kvlayer.identity.keys import ChunkChain, ObjectKey, Part, Span
from kvlayer.layout import HitRule, KVGroup
from kvlayer.payload import Payload
from kvlayer.tier.planner import plan
from kvlayer.tier.planner.directory import Directory
from kvlayer.tier.planner.match import Cover, Match, Run
from kvlayer.tier.planner.records import ChunkRecord, ObjectRecord
from kvlayer.tier.planner.strand import Held
from kvlayer.tier.planner.walk import Walk

__all__ = ["Covers", "Matcher"]

Covers: TypeAlias = list[Cover | None]
"""Per group, what serves a span; None where nothing does."""


_MAX_PARTS = 1024  # bounds what is remembered about parts that others name


class Matcher:
    """Matches prompts for one rank. The caller holds the directory's lock."""

    def __init__(
        self,
        directory: Directory,
        groups: Sequence[KVGroup],
        cuts: Sequence[Sequence[Part]],
        lengths: range,
    ) -> None:
        """``lengths``: how many tokens an object may hold."""
        self._directory = directory
        self._lengths = lengths
        self._groups = groups
        self._cuts = cuts
        self._every = [i for i, g in enumerate(groups) if g.hit_rule is HitRule.EVERY_CHUNK]
        self.is_plain = len(self._every) == len(groups)
        """Whether every group needs every chunk, so that a hit may end anywhere."""
        self._parts: dict[str, bool] = {}
        """Parts named in keys from outside, and whether the model has them."""

    def match(self, chain: ChunkChain, stop: int, runs: Sequence[Run] = ()) -> Match:
        """The longest usable prefix of at most ``stop`` tokens. ``runs``: what is presumed now.

        None at all in an epoch that is over. All of it at once: for a prompt that is one slice. See
        :class:`Walk` for a longer one.
        """
        if chain.is_stale:
            return Match(chain.accepting(), [], [])
        return finish(self.matching(chain, stop, runs, _at_once))

    def matching(
        self,
        chain: ChunkChain,
        stop: int,
        runs: Sequence[Run],
        go: Callable[[Walk], Steps[None]],
    ) -> Steps[Match]:
        """:meth:`match` in steps; ``go`` walks a walk to its end."""
        walk = Walk(self, chain.accepting(), stop)
        yield from go(walk)
        match = yield from walk.found()
        for each in chain.accepts:
            if match.is_whole:
                break
            walk = Walk(self, chain, stop, each)
            yield from go(walk)
            longer = yield from walk.found()
            if longer.tokens > match.tokens:
                match = longer
        match.runs = runs
        return match

    def count(self, spans: list[Span], found: list[Covers]) -> int:
        """How many of ``spans``, which every-chunk groups have, the other groups can use."""
        if self.is_plain:
            return len(spans)
        return plan.ending(
            len(spans),
            lambda i: spans[i].stop,
            self._groups,
            lambda i, g: found[i][g] is not None,
        )

    def first(
        self, chain: ChunkChain, at: int, end: int, most: int = 2 * SLICE
    ) -> tuple[list[Held], int, bool]:
        """What serves full chunks from ``at`` on, as far as each is one object in host memory.

        Also up to which chunk, and whether it is because of ``most`` that it ended there: more may
        be there before ``end``. A strand is found as a whole.
        """
        # Where another zone begins, this ends: zones only follow each other.
        step, zone = chain.chunk_step, chain.zone_before(chain.chunk_step)
        within = range(at, end)
        return self._directory.leading(chain.namespace, chain.hashes, step, zone, within, most=most)

    def chunks(
        self, chain: ChunkChain, end: int, known: int, stop: int
    ) -> tuple[list[Span], list[Covers]]:
        """Spans that every-chunk groups have, up to a chunk's end, and covers.

        Of full chunks ``[known, end)``, within ``stop`` tokens. Mostly full chunks; where one is
        missing, shorter spans may reach its end together.
        """
        covers, step, spans = self._directory.covers, chain.chunk_step, list[Span]()
        namespace = chain.namespace
        found: list[Covers] = []
        listed = known  # full chunks that are in ``spans``, whole or in pieces, or before them
        for index in range(known, end):
            end_hash = chain.hashes[index]
            groups = covers(namespace, end_hash, step, chain.zone_before((index + 1) * step))
            if self._has_every(groups):
                found.append(groups)
                continue
            path = next(self.paths(chain, index * step, stop), ())
            if not path or path[-1][0].stop < (index + 1) * step:
                break
            spans += [*chain.spans(index, listed), *(span for span, _ in path)]
            found += [groups for _, groups in path]
            listed = index + 1
        missing = len(found) - len(spans)
        return [*spans, *chain.spans(listed + missing, listed)], found

    def _has_every(self, groups: Covers) -> bool:
        return None not in groups or all(groups[g] is not None for g in self._every)

    def paths(
        self, chain: ChunkChain, start: int, stop: int
    ) -> Iterator[tuple[tuple[Span, Covers], ...]]:
        """Ways from a chunk's start to each end before or at the chunk's, the farthest first.

        Of the ways to one end that with the fewest objects.
        """
        ways: dict[int, tuple[tuple[Span, Covers], ...]] = {start: ()}
        for end in reversed(chain.ends(start)):
            if end.stop > stop:
                break
            zone = chain.zone(end)
            for record in self._directory.ending(chain.namespace, end.hash):
                before = ways.get(end.stop - record.tokens)
                if before is None or record.zone != zone:
                    continue
                groups = self._directory.covers_of(record)
                known = ways.get(end.stop)
                if self._has_every(groups) and (known is None or len(before) + 1 < len(known)):
                    at = end.stop - record.tokens
                    span = Span(at, end.stop, end.hash, chain.parent(at))
                    ways[end.stop] = (*before, (span, groups))
        del ways[start]
        return (ways[end] for end in sorted(ways, reverse=True))

    def needed(
        self, spans: Sequence[Span], found: Sequence[Covers], stop: int = 0
    ) -> list[Sequence[Cover]]:
        """Covers of these spans of a hit that ends with token ``stop``.

        Empty where a group needs nothing of a span.
        """
        if self.is_plain:  # every group of every span
            return cast("list[Sequence[Cover]]", found[: len(spans)])
        first = [group.first_needed(stop) for group in self._groups]
        return [
            [(c or ()) if span.stop > first[g] else () for g, c in enumerate(groups)]
            for span, groups in zip(spans, found, strict=True)
        ]

    # -- what is not known -----------------------------------------------------------------------

    def lacking(self, chain: ChunkChain, reached: int, *, seen: bool = False) -> Steps[list[int]]:
        """Full chunks that every-chunk groups lack, from the first gap on: token ``reached``.

        ``seen``: what is only presumed counts as lacking.
        """
        found: list[int] = []
        for index in range(reached // chain.chunk_step, len(chain)):
            if self.holders(chain, index, seen=seen) is None:
                found.append(index)
            if not (index + 1) % SLICE:
                yield
        return found

    def holders(self, chain: ChunkChain, index: int, *, seen: bool = False) -> int | None:
        """Lower tiers (bit t: tier t) that hold any of a full chunk.

        None where every-chunk groups lack it. ``seen``: also where it is only presumed.
        """
        covers, tiers = self._covers(chain, index), 0
        for g in self._every:
            cover = covers[g]
            if cover is None or (seen and not _is_seen(cover)):
                return None
            for found in cover:
                tiers |= found.readable
        return tiers

    def lacks(self, chain: ChunkChain, index: int, group: int) -> bool:
        """Whether a group lacks a full chunk."""
        return self._covers(chain, index)[group] is None

    def lacked(self, chain: ChunkChain, index: int, group: int) -> list[ObjectKey]:
        """The objects to ask about where a group lacks a full chunk; none where it does not."""
        if not self.lacks(chain, index, group):
            return []
        return self._keys(chain, chain.span(index), group)

    def _covers(self, chain: ChunkChain, index: int) -> Covers:
        step = chain.chunk_step
        zone = chain.zone_before((index + 1) * step)
        return self._directory.covers(chain.namespace, chain.hashes[index], step, zone)

    def probes(self, chain: ChunkChain, reached: int, start: int) -> Steps[list[ObjectKey]]:
        """Full-chunk objects from ``start`` on that nobody has seen.

        ``reached``: what comes before the first gap.
        """
        keys: list[ObjectKey] = []
        for i in range(start, len(chain)):
            if not (i + 1) % SLICE:
                yield
            gap = (i + 1) * chain.chunk_step > reached
            if not gap and self.holders(chain, i, seen=True) is None:
                continue  # shorter spans stand in its place
            for g, cover in enumerate(self._covers(chain, i)):
                if (cover is None or not _is_seen(cover)) and (gap or g not in self._every):
                    keys += self._keys(chain, chain.span(i), g)
        return keys

    def reaching(self, chain: ChunkChain, start: int, *, seen: bool) -> Steps[int]:
        """Up to which token every-chunk groups have a prompt, from chunk ``start`` on.

        ``seen``: as far as nothing of it is only presumed.
        """
        step = chain.chunk_step
        reached = start * step
        for at in range(start, len(chain), SLICE):
            end = min(at + SLICE, len(chain))
            spans, found = self.chunks(chain, end, at, chain.num_tokens)
            for span, groups in zip(spans, found, strict=True):
                if seen and not all(_is_seen(groups[g] or ()) for g in self._every):
                    return span.start
            reached = spans[-1].stop if spans else reached
            if reached < end * step:
                break
            yield
        return reached

    def tail_probes(self, chain: ChunkChain, index: int) -> list[ObjectKey]:
        """Objects of the tails that may stand in the place of a full chunk, longest first.

        None below a tail that is there: a shorter one adds nothing to it.
        """
        keys: list[ObjectKey] = []
        for tail in chain.tails(index):
            zone = chain.zone(tail)
            groups = self._directory.covers(chain.namespace, tail.hash, tail.tokens, zone)
            missing = [g for g, cover in enumerate(groups) if cover is None]
            if not missing:
                break
            for g in missing:
                keys += self._keys(chain, tail, g)
        return keys

    def has_tail(self, chain: ChunkChain, index: int) -> bool:
        """Whether all groups have a tail that may stand in the place of a full chunk."""
        for tail in chain.tails(index):
            zone = chain.zone(tail)
            if None not in self._directory.covers(chain.namespace, tail.hash, tail.tokens, zone):
                return True
        return False

    def leading(self, chain: ChunkChain) -> Iterator[list[ChunkRecord]]:
        """What is known of a prompt's full chunks, and of what leads there in their place.

        A slice of chunks for each hold of the lock.
        """
        step, is_whole = chain.chunk_step, True
        for at in range(0, len(chain), SLICE):
            found: list[ChunkRecord] = []
            for index in range(at, min(at + SLICE, len(chain))):
                start, stop = index * step, (index + 1) * step
                record = self._directory.chunk(
                    chain.namespace, chain.hashes[index], step, chain.zone_before(stop)
                )
                if record is not None:
                    found.append(record)
                elif is_whole:
                    path = next(self.paths(chain, start, stop), ())
                    is_whole = bool(path) and path[-1][0].stop == stop
                    for span, _ in path:
                        piece = self.record(chain, span)
                        assert piece is not None
                        found.append(piece)
            yield found

    def presume(self, chain: ChunkChain, run: Run) -> list[ObjectRecord]:
        """Take it that the run's tiers hold what every-chunk groups lack of its chunks."""
        presumed: list[ObjectRecord] = []
        if run.namespace != chain.namespace:
            chain = chain.named_in(run.namespace)
        for index in range(run.first, run.stop):
            span = chain.span(index)
            for g in self._every:
                if not self.lacks(chain, index, g):
                    continue
                for part in self._cuts[g]:
                    found = self._directory.presume(
                        chain.namespace, span, chain.zone(span), part, run.tiers
                    )
                    if found is not None:
                        presumed.append(found)
        return presumed

    def _keys(self, chain: ChunkChain, span: Span, group: int) -> list[ObjectKey]:
        zone, space = chain.zone(span), chain.namespace
        return [
            ObjectKey.of(space, zone, span.hash, span.tokens, part) for part in self._cuts[group]
        ]

    def record(self, chain: ChunkChain, span: Span) -> ChunkRecord | None:
        """What is known of a span of a prompt."""
        return self._directory.chunk(chain.namespace, span.hash, span.tokens, chain.zone(span))

    def can_exist(self, key: ObjectKey) -> bool:
        """Whether a key from outside names what the model can have."""
        if key.count("/") != 3:
            return False
        try:
            if key.tokens not in self._lengths:
                return False
        except ValueError:
            return False
        text = key.rsplit("/", 1)[1]
        known = self._parts.get(text)
        if known is None:
            try:
                part = Part.parse(text)
                Payload.of(self._groups[part.group], part, 1)
                known = True
            except (ValueError, IndexError):
                known = False
            if len(self._parts) < _MAX_PARTS:
                self._parts[text] = known
        return known


def _at_once(walk: Walk) -> Steps[None]:
    yield from ()
    while not walk.is_over:
        walk.more()


def _is_seen(cover: tuple[ObjectRecord, ...]) -> bool:
    """Whether nothing of it is only presumed."""
    return all(found.is_ready for found in cover)
