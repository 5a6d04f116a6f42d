"""Finding the longest usable prefix in the directory, and what to ask lower tiers for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

from kvlayer.keys import ChunkChain, ObjectKey, Part, Span
from kvlayer.layout import HitRule, KVGroup
from kvlayer.payload import Payload
from kvlayer.tier import plan
from kvlayer.tier.directory import Directory, ObjectRecord

__all__ = ["Match", "Matcher"]

Covers: TypeAlias = list[tuple[ObjectRecord, ...] | None]
"""Per group, what serves a span; None where nothing does."""

_MAX_PARTS = 1024  # bounds what is remembered about parts that others name


@dataclass(slots=True)
class Match:
    """The longest usable prefix of a prompt. ``covers[i][g]``: what serves span i for group g.

    Whoever reads it changes nothing: the directory shares what it remembers.
    """

    chain: ChunkChain
    spans: list[Span]
    covers: list[list[tuple[ObjectRecord, ...]]]

    @property
    def tokens(self) -> int:
        return self.spans[-1].stop if self.spans else 0

    def path(self) -> list[ObjectRecord]:
        """Every object of the match, root first."""
        return [found for groups in self.covers for cover in groups for found in cover]


class Matcher:
    """Matches prompts for one rank. The caller holds the directory's lock."""

    def __init__(
        self, directory: Directory, groups: Sequence[KVGroup], cuts: Sequence[Sequence[Part]]
    ) -> None:
        self._directory = directory
        self._groups = groups
        self._cuts = cuts
        self._every = [i for i, g in enumerate(groups) if g.hit_rule is HitRule.EVERY_CHUNK]
        self.is_plain = len(self._every) == len(groups)
        """Whether every group needs every chunk, so that a hit may end anywhere."""
        self._parts: dict[str, bool] = {}
        """Parts named in keys from outside, and whether the model has them."""

    def match(self, chain: ChunkChain, stop: int) -> Match:
        """The longest usable prefix of at most ``stop`` tokens."""
        found = self._chunks(chain)[: stop // chain.chunk_step]
        spans = chain.spans(len(found))
        for tail in chain.tails(len(found)):
            groups = self._directory.covers(tail.hash)
            if tail.stop > stop or any(groups[g] is None for g in self._every):
                continue
            longer, covers = [*spans, tail], [*found, groups]
            if self._count(longer, covers) == len(longer):
                spans, found = longer, covers
                break
        count = self._count(spans, found)
        return Match(chain, spans[:count], self._needed(spans[:count], found))

    def _count(self, spans: list[Span], found: list[Covers]) -> int:
        """How many of ``spans``, which every-chunk groups have, trailing groups can use."""
        if self.is_plain:
            return len(spans)
        stops = [span.stop for span in spans]
        return plan.prefix(stops, self._groups, lambda i, g: found[i][g] is not None)

    def _chunks(self, chain: ChunkChain) -> list[Covers]:
        """Covers of the full chunks at the start that all every-chunk groups have."""
        covers, every, is_plain = self._directory.covers, self._every, self.is_plain
        found: list[Covers] = []
        for chunk_hash in chain.hashes:
            groups = covers(chunk_hash)
            if None in groups and (is_plain or any(groups[g] is None for g in every)):
                break
            found.append(groups)
        return found

    def _needed(
        self, spans: list[Span], found: list[Covers]
    ) -> list[list[tuple[ObjectRecord, ...]]]:
        """Covers of the hit, empty where a trailing group needs nothing of a span."""
        if self.is_plain:  # every group of every span
            return cast("list[list[tuple[ObjectRecord, ...]]]", found[: len(spans)])
        if not spans:
            return []
        first = [
            plan.trailing_start(g, spans[-1].stop) if g.hit_rule is HitRule.TRAILING else 0
            for g in self._groups
        ]
        return [
            [(c or ()) if span.stop > first[g] else () for g, c in enumerate(groups)]
            for span, groups in zip(spans, found, strict=False)
        ]

    def probes(self, chain: ChunkChain) -> list[ObjectKey]:
        """Full-chunk objects the directory does not know, from the first gap on."""
        keys: list[ObjectKey] = []
        gap = False
        for i, chunk_hash in enumerate(chain.hashes):
            groups = self._directory.covers(chunk_hash)
            gap = gap or any(groups[g] is None for g in self._every)
            for g, cover in enumerate(groups):
                if cover is None and (gap or g not in self._every):
                    keys += self._keys(chain, chain.span(i), g)
        return keys

    def tail_probes(self, chain: ChunkChain) -> list[ObjectKey]:
        """Objects of the tails that may stand at the first missing chunk, longest first.

        None below a tail that is there: a shorter one adds nothing to it.
        """
        keys: list[ObjectKey] = []
        for tail in chain.tails(len(self._chunks(chain))):
            missing = [g for g, c in enumerate(self._directory.covers(tail.hash)) if c is None]
            if not missing:
                break
            for g in missing:
                keys += self._keys(chain, tail, g)
        return keys

    def _keys(self, chain: ChunkChain, span: Span, group: int) -> list[ObjectKey]:
        zone, space = chain.zone(span), self._directory.namespace
        return [ObjectKey.of(space, zone, span.hash, part) for part in self._cuts[group]]

    def can_exist(self, key: ObjectKey) -> bool:
        """Whether a key from outside names this namespace and a part that the model has."""
        if key.count("/") != 3 or not key.startswith(f"{self._directory.namespace}/"):
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
