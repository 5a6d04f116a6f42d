"""Adaptive replacement: recency and frequency, weighed by what evicting has cost lately. Pure.

After N. Megiddo and D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (FAST 2003),
section III.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.rows import Rows
from kvlayer.eviction.lists import Lists
from kvlayer.eviction.names import GoneNames

__all__ = ["ARC"]

_ONCE, _OFTEN = 0, 1  # T1 and T2 of the paper


class ARC(EvictionPolicy):
    """Two lists, of objects used once and more often, and the names of what left each of them.

    When a name that left a list is admitted again, that list was too short: its share grows. What
    one scan stored and nobody asks for again then cannot push out what many ask for.

    Where this differs from the paper, and why:

    - The cache is as large as it was, in *objects*, when room was last asked for: a tier is counted
      in bytes and its objects differ in size (tails are shorter than chunks), so their number moves
      with what is stored. The names kept are at most as many as the objects.
    - Room is made before what needs it is known, and for a whole prompt at once. Each object that
      left without a successor yet counts as one more in the list of those used once, where new
      objects arrive; so a batch leaves what its objects, one by one, would have left.
    - Pinned objects are in no list. One that is unpinned was used, so while it is pinned it counts
      as one of those used often.
    - A path is used deepest first, as in ``prefix-lru``: within one list, what goes is never the
      prefix of something that stays.
    """

    name: ClassVar[str] = "arc"

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self._lists = Lists(2)
        self._is_often = bytearray()
        """In which list a row is, or comes back to when nobody has used it meanwhile."""
        self._once = 0
        self._often = 0
        """How many rows the lists hold."""
        self._once_gone = GoneNames()  # B1
        self._often_gone = GoneNames()  # B2
        self._resident = 0
        """Admitted and not removed, pinned or not."""
        self._size = 0  # c
        self._share = 0.0  # p: how many of those used once should stay
        self._is_asked = False
        """Whether room was made since the last arrival."""

    # -- what happens to objects -----------------------------------------------------------------

    def admit(self, path: Sequence[int], /) -> None:
        more = self.rows.count - len(self._is_often)
        if more > 0:
            self._is_often.extend(bytes(more))
            self._lists.fit(self.rows.count)
        for row in reversed(path):
            self._is_often[row] = self._arrive(self.rows.names[row])
            self._enter(row)

    def refresh(self, path: Sequence[int], /) -> None:
        for row in reversed(path):
            self._lists.move(self._is_often[row], (row,))

    def touch(self, path: Sequence[int], /) -> None:
        self.pin(path)
        self.unpin(path, used=True)

    def pin(self, path: Sequence[int], /) -> None:
        often = sum([self._is_often[row] for row in path])
        self._often -= often
        self._once -= len(path) - often
        self._lists.unlink(path)

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        if used:
            for row in path:
                self._is_often[row] = _OFTEN
            self._often += len(path)
            self._lists.append(_OFTEN, path[::-1])
        else:
            for row in reversed(path):
                self._enter(row)

    def remove(self, row: int, /, *, evicted: bool) -> None:
        if evicted:
            self._make_room()
        self._resident -= 1
        if evicted:
            gone = self._often_gone if self._is_often[row] else self._once_gone
            gone.add(self.rows.names[row])
        else:  # nothing will take its place
            self._size = max(self._size - 1, self._resident)
        self._forget_names()

    def victim(self) -> int | None:
        # The first of several that make room: the size is what is resident now.
        waiting = self._size - self._resident if self._is_asked else 0
        share = self._share if self._is_asked else min(self._share, self._resident)
        if self._once and (self._once + waiting > share or not self._often):
            return self._lists.first(_ONCE)
        return self._lists.first(_OFTEN)

    # -- what is learnt from it ------------------------------------------------------------------

    def _make_room(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            self._size = self._resident  # somebody needs room: this is what fits
            self._share = min(self._share, self._size)

    def _enter(self, row: int) -> None:
        """Put a row that is in no list at the end of its own."""
        is_often = self._is_often[row]
        self._often += is_often
        self._once += not is_often
        self._lists.append(is_often, (row,))

    def _arrive(self, name: int) -> bool:
        """Count a new resident; whether it was resident before, not long ago."""
        self._resident += 1
        self._size = max(self._size, self._resident)
        self._is_asked = False
        once, often = len(self._once_gone), len(self._often_gone)
        if self._once_gone.discard(name):
            self._share = min(self._share + max(1.0, often / once), self._size)
            return True
        if self._often_gone.discard(name):
            self._share = max(self._share - max(1.0, once / often), 0.0)
            return True
        self._forget_names()
        return False

    def _forget_names(self) -> None:
        """Hold objects used once with their names to the size, and everything to twice that.

        What is forgotten was remembered by an earlier call, so all of them together cost O(1) each.
        """
        while self._once_gone and self._once + len(self._once_gone) > self._size:
            self._once_gone.forget_oldest()
        while (names := self._often_gone or self._once_gone) and (
            self._resident + len(self._once_gone) + len(self._often_gone) > 2 * self._size
        ):
            names.forget_oldest()
