"""What no hit can use any more, where hits need a state at their end. Pure.

A state without the attention of its own span is of no use, and so is attention that leads to no
state. Such objects make room before others, in host memory; a lower tier goes by their use. What
is looked at is a span and the one before it: an end that goes makes an end of the one before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from kvlayer.layout import HitRule, KVGroup
from kvlayer.tier.planner.directory import Directory
from kvlayer.tier.planner.records import ChunkRecord, HostState, ObjectRecord

__all__ = ["DeadEnds"]


class DeadEnds:
    """Looks for dead ends among the objects in host memory. ``demote`` is told of them."""

    def __init__(
        self,
        directory: Directory,
        groups: Sequence[KVGroup],
        demote: Callable[[ObjectRecord], object],
    ) -> None:
        self._directory = directory
        self._demote = demote
        rules = [group.hit_rule for group in groups]
        self._attention = [g for g, rule in enumerate(rules) if rule is HitRule.EVERY_CHUNK]
        self._states = [g for g, rule in enumerate(rules) if rule is HitRule.BOUNDARY]
        self._after: Counter[tuple[str, bytes]] = Counter()
        """By namespace and end hash, attention in host memory that follows that end."""

    @property
    def may_exist(self) -> bool:
        """Whether the model has attention and states; without both nothing is ever called."""
        return bool(self._attention and self._states)

    def came(self, found: ObjectRecord) -> None:
        """An object is ready in host memory."""
        if found.part.group in self._attention:
            self._after[found.namespace, found.chunk.parent] += 1

    def gone(self, found: ObjectRecord) -> None:
        """An object that was ready has left host memory."""
        chunk = found.chunk
        if found.part.group in self._attention:
            before = found.namespace, chunk.parent
            self._after[before] -= 1
            if not self._after[before]:
                del self._after[before]
            if not found.tiers:
                self._give_up(chunk, self._states)
                if chunk.start > 0:
                    self._end(before)
        elif found.part.group in self._states and not found.tiers:
            self._give_up(chunk, self._states)  # the others are of no use without it
            self._end((chunk.namespace, chunk.hash))

    def stored(self, path: Sequence[ObjectRecord]) -> None:
        """A prompt was stored, with these objects, root first: it may lead to no state yet."""
        if path:
            chunk = path[-1].chunk
            self._end((chunk.namespace, chunk.hash))

    def _end(self, at: tuple[str, bytes]) -> None:
        """Give up the attention of spans that end here, unless something follows it or a state."""
        if at in self._after:
            return
        for chunk in self._directory.active_ending(*at):
            if not any(o.part.group in self._states and o.is_ready for o in chunk.objects):
                self._give_up(chunk, self._attention)

    def _give_up(self, chunk: ChunkRecord, groups: Sequence[int]) -> None:
        for found in chunk.objects:
            if found.part.group in groups and found.host is HostState.READY:
                self._demote(found)
