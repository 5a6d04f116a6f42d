"""Which objects come right after which in a prompt. Pure.

An object without what comes before it serves nobody, so what is *followed* has to stay. Objects
name each other by the hashes they end with: all of the same namespace that end with an object's
parent come right before it, whatever parts they are and however many tokens they hold.
"""

from __future__ import annotations

from array import array
from typing import TypeAlias

from kvlayer.abc.backend import Write
from kvlayer.memory.key_table import KeyTable

__all__ = ["Lineage", "Place"]

Place: TypeAlias = tuple[int, int]
"""Where in which prompts an object stands: its family and the first 64 bits of its hash."""


class Lineage:
    """Counts, for each row of ``keys``, the rows that come right after it: 12 bytes a row.

    A write that is under way counts as if its object was there already. One whose parent nobody
    named follows nothing.
    """

    def __init__(self, keys: KeyTable) -> None:
        self._keys = keys
        self._parents = array("Q")
        """By row, the first 64 bits of its parent's hash; 0 where it has none."""
        self._followers = array("I")
        self._awaited: dict[Place, int] = {}
        """Followers of what is not there."""
        self._left: set[int] = set()
        """Rows that count as gone."""
        self.learnt = 0
        """How often it was told what a row follows."""

    def add(self, row: int, parent: bytes, *, has_twins: bool = True) -> None:
        """A row has got its key; ``has_twins``: another may end with the same hash."""
        more = row + 1 - len(self._parents)
        if more > 0:
            self._parents.frombytes(bytes(more * self._parents.itemsize))
            self._followers.frombytes(bytes(more * self._followers.itemsize))
        self._parents[row] = 0
        self._followers[row] = self._already(row, has_twins=has_twins)
        if parent:
            self.learn(row, parent)

    def _already(self, row: int, *, has_twins: bool) -> int:
        """How many rows follow a new one."""
        if not has_twins and not self._awaited:
            return 0
        place = self._place(row)
        if has_twins:
            for twin in self._keys.ending(*place):
                if twin != row:
                    return self._followers[twin]
        return self._awaited.pop(place, 0)

    def learn(self, row: int, parent: bytes) -> None:
        """The parent of a row is known now, if it was not before."""
        prefix = _prefix(parent)
        if prefix and not self._parents[row] and prefix != self._keys.prefix(row):
            self._parents[row] = prefix
            self.learnt += 1
            if row not in self._left:
                self._count(self._place_before(row), 1)

    def unlearn(self, row: int) -> list[int]:
        """What a row is said to follow is not so. Answers as :meth:`leave` does."""
        exposed = [] if row in self._left else self._count(self._place_before(row), -1)
        self._parents[row] = 0
        return exposed

    def discard(self, row: int) -> list[int]:
        """A row is about to lose its key. Answers as :meth:`leave` does."""
        exposed = self.leave(row)
        self._left.discard(row)
        self._parents[row] = 0
        if self._followers[row]:
            place = self._place(row)
            if len(self._keys.ending(*place)) == 1:  # else its twin has the count, too
                self._awaited[place] = self._followers[row]
        return exposed

    def leave(self, row: int) -> list[int]:
        """A row counts as gone; which rows nothing follows any more, now that it is."""
        if row in self._left:
            return []
        self._left.add(row)
        return self._count(self._place_before(row), -1)

    def come_back(self, row: int) -> None:
        """A row that counts as gone has stayed after all."""
        if row in self._left:
            self._left.discard(row)
            self._count(self._place_before(row), 1)

    def expect(self, write: Write) -> None:
        """An object is being written: what comes before it is followed until ``expect_no_more``."""
        if write.parent:
            self._count(self.place_before(write), 1)

    def expect_no_more(self, write: Write) -> list[int]:
        """The write has ended. Answers as :meth:`leave` does."""
        return self._count(self.place_before(write), -1) if write.parent else []

    def is_followed(self, row: int) -> bool:
        """Whether anything that is there, or is being written, comes right after a row."""
        return self._followers[row] > 0

    def before(self, row: int) -> list[int]:
        """The rows that come right before one."""
        return self._rows(self._place_before(row))

    def is_there(self, place: Place) -> bool:
        """Whether any object stands in a place."""
        return bool(self._rows(place))

    def place(self, write: Write) -> Place:
        """Where an object stands that is to be written."""
        return self._keys.place(write.key)

    def place_before(self, write: Write) -> Place:
        """The place right before it; one in which nothing stands where it has none."""
        return self._keys.family(write.key), _prefix(write.parent)

    def _place(self, row: int) -> Place:
        return self._keys.family_of(row), self._keys.prefix(row)

    def _place_before(self, row: int) -> Place:
        return self._keys.family_of(row), self._parents[row]

    def _rows(self, place: Place) -> list[int]:
        return self._keys.ending(*place) if place[1] else []

    def _count(self, place: Place, by: int) -> list[int]:
        """Add to what follows a place; the rows in it if nothing follows them any more."""
        if not place[1]:
            return []
        rows = self._rows(place)
        for row in rows:
            self._followers[row] += by
        if not rows:
            awaited = self._awaited.pop(place, 0) + by
            if awaited:
                self._awaited[place] = awaited
        return [row for row in rows if not self._followers[row]]


def _prefix(parent: bytes) -> int:
    return int.from_bytes(parent[:8], "little")
