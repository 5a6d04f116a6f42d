"""Doubly linked lists of row numbers in two flat arrays. Pure memory.

A list costs nothing per row beyond its place in the arrays: 8 bytes a row, however many lists there
are, and nothing that the garbage collector looks at.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

__all__ = ["Lists"]


class Lists:
    """``count`` lists that share their rows: a row is in one of them at most.

    Who uses them knows which rows are in which list; nothing is checked.
    """

    __slots__ = ("_count", "_next", "_previous")

    def __init__(self, count: int = 1) -> None:
        # The first nodes are the lists' ends, closed to rings; row r is node r + count.
        self._count = count
        self._next = array("i", range(count))
        self._previous = array("i", range(count))

    def fit(self, rows: int) -> None:
        """Make room for row numbers below ``rows``."""
        more = rows + self._count - len(self._next)
        if more > 0:
            # Half as much again: a list that grows row by row is copied a few times, not always.
            room = bytes((more + len(self._next) // 2) * self._next.itemsize)
            self._next.frombytes(room)
            self._previous.frombytes(room)

    def append(self, index: int, rows: Iterable[int]) -> None:
        """Add rows that are in no list to the end of one, in this order."""
        following, previous, count = self._next, self._previous, self._count
        last = previous[index]
        for row in rows:
            node = row + count
            following[last] = node
            previous[node] = last
            last = node
        following[last] = index
        previous[index] = last

    def unlink(self, rows: Iterable[int]) -> None:
        """Take rows out of the list each of them is in."""
        following, previous, count = self._next, self._previous, self._count
        for row in rows:
            node = row + count
            before, after = previous[node], following[node]
            following[before] = after
            previous[after] = before

    def move(self, index: int, rows: Iterable[int]) -> None:
        """Take rows out of wherever they are and add them to the end of a list, in this order."""
        following, previous, count = self._next, self._previous, self._count
        for row in rows:
            node = row + count
            before, after = previous[node], following[node]
            following[before] = after
            previous[after] = before
            last = previous[index]
            following[last] = node
            previous[node] = last
            following[node] = index
            previous[index] = node

    def first(self, index: int = 0) -> int | None:
        """The row that a list begins with, if it has any."""
        node = self._next[index]
        return node - self._count if node != index else None

    def rows(self, index: int = 0) -> Iterator[int]:
        """The rows of one list in their order. Change none of the lists meanwhile."""
        node = self._next[index]
        while node != index:
            yield node - self._count
            node = self._next[node]
