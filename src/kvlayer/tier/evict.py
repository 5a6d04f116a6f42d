"""Eviction by recency, with and without favour for the start of a prompt. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import ClassVar

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.keys import ObjectKey

__all__ = ["LRU", "PrefixLRU"]


class LRU(EvictionPolicy):
    """Least recently used first; a path is used in its own order, so its end stays longest.

    Pinned keys live outside the evictable order, so any number of them costs ``victim`` nothing.
    """

    name: ClassVar[str] = "lru"
    __slots__ = ("_first", "_order", "_pinned")

    def __init__(self) -> None:
        # A dict's first entry is found by walking over those deleted before it; these are lists.
        self._order: OrderedDict[ObjectKey, None] = OrderedDict()
        self._first: OrderedDict[ObjectKey, None] = OrderedDict()
        """What was demoted: goes before anything in ``_order``."""
        self._pinned: dict[ObjectKey, bool | None] = {}
        """Pinned key -> whether it was demoted meanwhile; None: not admitted yet."""

    @staticmethod
    def _uses(path: Sequence[ObjectKey]) -> Iterable[ObjectKey]:
        """The path in the order its keys are used, the one to keep longest last."""
        return path

    def admit(self, path: Sequence[ObjectKey], /) -> None:
        for key in self._uses(path):
            if key in self._pinned:
                if self._pinned[key] is None:
                    self._pinned[key] = False
            else:
                self._first.pop(key, None)
                self._order[key] = None
                self._order.move_to_end(key)

    def touch(self, path: Sequence[ObjectKey], /) -> None:
        for key in self._uses(path):
            self._use(key)

    def _use(self, key: ObjectKey) -> None:
        if key in self._order:
            self._order.move_to_end(key)
        elif key in self._first:
            del self._first[key]
            self._order[key] = None

    def pin(self, key: ObjectKey, /) -> None:
        if key in self._order:
            del self._order[key]
            self._pinned[key] = False
        elif key in self._first:
            del self._first[key]
            self._pinned[key] = False
        else:
            self._pinned.setdefault(key, None)

    def unpin(self, path: Sequence[ObjectKey], /) -> None:
        for key in self._uses(path):
            if key not in self._pinned:
                self._use(key)
                continue
            demoted = self._pinned.pop(key)
            if demoted is not None:
                (self._first if demoted else self._order)[key] = None

    def demote(self, key: ObjectKey, /) -> None:
        if key in self._order:
            del self._order[key]
            self._first[key] = None
        elif self._pinned.get(key) is not None:
            self._pinned[key] = True

    def remove(self, key: ObjectKey, /) -> None:
        self._order.pop(key, None)
        self._first.pop(key, None)
        self._pinned.pop(key, None)

    def victim(self) -> ObjectKey | None:
        return next(iter(self._first or self._order), None)


class PrefixLRU(LRU):
    """Recency in which a prompt's start outlives its end.

    Every path (root first) is used deepest first, so an ancestor is always more recent than its
    descendants: what is evicted is never the prefix of something kept, which would be dead weight.
    """

    name: ClassVar[str] = "prefix-lru"
    __slots__ = ()

    @staticmethod
    def _uses(path: Sequence[ObjectKey]) -> Iterable[ObjectKey]:
        return reversed(path)
