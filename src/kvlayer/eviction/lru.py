"""Eviction by recency, with and without favour for the start of a prompt. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.rows import Rows
from kvlayer.eviction.lists import Lists

__all__ = ["LRU", "PrefixLRU"]


class LRU(EvictionPolicy):
    """Least recently used first; a path is used in its own order, so its end stays longest.

    Pinned objects are in no list, so any number of them costs ``victim`` nothing.
    """

    name: ClassVar[str] = "lru"

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self._order = Lists()

    @staticmethod
    def _uses(path: Sequence[int]) -> Sequence[int]:
        """The path in the order its rows are used, the one to keep longest last."""
        return path

    def admit(self, path: Sequence[int], /) -> None:
        self._order.fit(self.rows.count)
        self._order.append(0, self._uses(path))

    def refresh(self, path: Sequence[int], /) -> None:
        self._order.move(0, self._uses(path))

    def touch(self, path: Sequence[int], /) -> None:
        self._order.move(0, self._uses(path))

    def pin(self, path: Sequence[int], /) -> None:
        self._order.unlink(path)

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        self._order.append(0, self._uses(path))

    def remove(self, row: int, /, *, evicted: bool) -> None:
        """A pinned object is in no list: there is nothing to forget."""

    def victim(self) -> int | None:
        return self._order.first()


class PrefixLRU(LRU):
    """Recency in which a prompt's start outlives its end.

    Every path (root first) is used deepest first, so an ancestor is always more recent than its
    descendants: what is evicted is never the prefix of something kept, which would be dead weight.
    """

    name: ClassVar[str] = "prefix-lru"

    @staticmethod
    def _uses(path: Sequence[int]) -> Sequence[int]:
        return path[::-1]
