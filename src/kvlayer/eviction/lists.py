"""Doubly linked lists of row numbers in two flat arrays. Pure memory.

A list costs nothing per row beyond its place in the arrays: 8 bytes a row, however many lists there
are, and nothing that the garbage collector looks at.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

__all__ = ["Lists", "range_of"]

_MANY = 16


def range_of(rows: Sequence[int]) -> range | None:
    """Rows as a range, where they are many and follow each other, up or down; else None.

    A tier numbers the objects of a prompt so, mostly. Work on a whole range is done by slices, many
    times as fast as row by row.
    """
    if isinstance(rows, range):
        return rows if len(rows) >= _MANY and abs(rows.step) == 1 else None
    if len(rows) < _MANY or abs(rows[-1] - rows[0]) != len(rows) - 1:
        return None
    step = 1 if rows[-1] > rows[0] else -1
    found = range(rows[0], rows[-1] + step, step)
    return found if [*rows] == [*found] else None


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

    def append(self, index: int, rows: Sequence[int]) -> None:
        """Add rows that are in no list to the end of one, in this order."""
        following, previous, count = self._next, self._previous, self._count
        last = previous[index]
        if (span := range_of(rows)) is not None:
            low, high = min(span[0], span[-1]) + count, max(span[0], span[-1]) + count
            up, down = array("i", range(low + 1, high + 1)), array("i", range(low, high))
            if span.step == 1:
                following[low:high], previous[low + 1 : high + 1] = up, down
                head, tail = low, high
            else:
                following[low + 1 : high + 1], previous[low:high] = down, up
                head, tail = high, low
            following[last], previous[head] = head, last
            last = tail
        else:
            for row in rows:
                node = row + count
                following[last] = node
                previous[node] = last
                last = node
        following[last] = index
        previous[index] = last

    def unlink(self, rows: Sequence[int]) -> None:
        """Take rows out of the list each of them is in."""
        following, previous, count = self._next, self._previous, self._count
        if (span := range_of(rows)) is not None:
            low, high = min(span[0], span[-1]) + count, max(span[0], span[-1]) + count
            if following[low] == low + 1:
                is_linked = following[low:high] == array("i", range(low + 1, high + 1))
                head, tail = low, high
            else:
                is_linked = following[low + 1 : high + 1] == array("i", range(low, high))
                head, tail = high, low
            if is_linked:
                before, after = previous[head], following[tail]
                following[before], previous[after] = after, before
                return
        for row in rows:
            node = row + count
            before, after = previous[node], following[node]
            following[before] = after
            previous[after] = before

    def move(self, index: int, rows: Sequence[int]) -> None:
        """Take rows out of wherever they are and add them to the end of a list, in this order."""
        self.unlink(rows)
        self.append(index, rows)

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
