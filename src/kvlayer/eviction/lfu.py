"""Eviction by frequency, with ageing. Pure.

LFU with dynamic ageing after M. Arlitt, L. Cherkasova, J. Dilley, R. Friedrich and T. Jin,
"Evaluating Content Management Techniques for Web Proxy Caches" (HP Laboratories, HPL-98-173, 1999),
section 4: an object's value is how often it was used plus the cache's age when it last was, and the
cache's age is the value of what was evicted last. What was popular once is overtaken, use by use.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import ClassVar

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.rows import Rows
from kvlayer.eviction.lists import Lists

__all__ = ["LFU"]

_MOST = 15
"""Uses that count at most. No value is further above the age: finding the least takes O(1)."""


class LFU(EvictionPolicy):
    """The least valuable first, of equals the least recent, and a prompt's end before its start.

    Where this differs from the paper: uses count up to 15. Values then lie in a window above the
    age, and each has a list of its own; the paper's heap would cost more with every object.
    """

    name: ClassVar[str] = "lfu"

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self._lists = Lists(_MOST + 1)
        """One per value, in a ring: value v is in list v modulo their number."""
        self._counts = bytearray()
        self._values = array("Q")
        self._sizes = [0] * (_MOST + 1)
        self._age = 0

    def admit(self, path: Sequence[int], /) -> None:
        more = self.rows.count - len(self._counts)
        if more > 0:
            self._counts.extend(bytes(more))
            self._values.frombytes(bytes(more * self._values.itemsize))
            self._lists.fit(self.rows.count)
        for row in path:
            self._counts[row] = 1
        self._enter(reversed(path))

    def refresh(self, path: Sequence[int], /) -> None:
        self.pin(path)
        self._enter(reversed(path))

    def touch(self, path: Sequence[int], /) -> None:
        self.pin(path)
        self.unpin(path, used=True)

    def pin(self, path: Sequence[int], /) -> None:
        for row in path:
            self._sizes[self._values[row] % (_MOST + 1)] -= 1
        self._lists.unlink(path)

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        counts = self._counts
        if used:
            for row in path:
                if counts[row] < _MOST:
                    counts[row] += 1
        self._enter(reversed(path))

    def _enter(self, rows: Iterable[int]) -> None:
        """Put rows that are in no list where their uses, counted from now, belong."""
        counts, values, sizes, age = self._counts, self._values, self._sizes, self._age
        for row in rows:
            values[row] = value = age + counts[row]
            sizes[value % (_MOST + 1)] += 1
            self._lists.append(value % (_MOST + 1), (row,))

    def remove(self, row: int, /, *, evicted: bool) -> None:
        if evicted:  # what was pinned or demoted may have gone before something cheaper
            value, least = self._values[row], self._least()
            self._age = max(self._age, value if least is None else min(value, least))

    def _least(self) -> int | None:
        """The least value of what may go; None when there is nothing."""
        for value in range(self._age, self._age + _MOST + 1):
            if self._sizes[value % (_MOST + 1)]:
                return value
        return None

    def victim(self) -> int | None:
        value = self._least()
        return None if value is None else self._lists.first(value % (_MOST + 1))
