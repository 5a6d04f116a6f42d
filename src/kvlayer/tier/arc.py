"""Adaptive replacement: recency and frequency, weighed by what evicting has cost lately. Pure.

After N. Megiddo and D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache" (FAST 2003),
section III.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.keys import ObjectKey

__all__ = ["ARC"]

Keys: TypeAlias = OrderedDict[ObjectKey, None]


@dataclass(slots=True)
class _Pin:
    """A pinned key and the list it comes back to."""

    is_known: bool
    is_frequent: bool = False
    is_arriving: bool = False
    """Admitted while pinned: its unpinning is part of that."""
    is_demoted: bool = False


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
    - Pinned and demoted objects are in no list. One that is unpinned was used, so while it is
      pinned it counts as one of those used often.
    - A path is used deepest first, as in ``prefix-lru``: within one list, what goes is never the
      prefix of something that stays.
    """

    name: ClassVar[str] = "arc"
    __slots__ = ("_first", "_is_asked", "_named", "_often", "_often_gone", "_once", "_once_gone",
                 "_pinned", "_resident", "_share", "_size")  # fmt: skip

    def __init__(self) -> None:
        self._once: Keys = OrderedDict()  # T1 of the paper
        self._often: Keys = OrderedDict()  # T2
        self._once_gone: Keys = OrderedDict()  # B1
        self._often_gone: Keys = OrderedDict()  # B2
        self._first: OrderedDict[ObjectKey, bool] = OrderedDict()
        """What was demoted -> whether it had been used often."""
        self._pinned: dict[ObjectKey, _Pin] = {}
        self._resident = 0
        """Admitted and not removed, wherever they are."""
        self._size = 0  # c
        self._share = 0.0  # p: how many of those used once should stay
        self._named: ObjectKey | None = None
        self._is_asked = False
        """Whether room was asked for since the last arrival."""

    # -- what happens to objects -----------------------------------------------------------------

    def admit(self, path: Sequence[ObjectKey], /) -> None:
        for key in reversed(path):
            pin = self._pinned.get(key)
            if pin is not None:
                if not pin.is_known:
                    pin.is_known = pin.is_arriving = True
                    pin.is_frequent = self._arrive(key)
            elif key in self._once:
                self._once.move_to_end(key)
            elif key in self._often:
                self._often.move_to_end(key)
            elif key in self._first:
                self._list(self._first.pop(key))[key] = None
            else:
                self._list(self._arrive(key))[key] = None

    def touch(self, path: Sequence[ObjectKey], /) -> None:
        for key in reversed(path):
            self._use(key)

    def _use(self, key: ObjectKey) -> None:
        if key in self._often:
            self._often.move_to_end(key)
        elif key in self._once:
            del self._once[key]
            self._often[key] = None
        elif key in self._first:
            del self._first[key]
            self._often[key] = None

    def pin(self, key: ObjectKey, /) -> None:
        if key in self._once:
            del self._once[key]
            self._pinned[key] = _Pin(True)
        elif key in self._often:
            del self._often[key]
            self._pinned[key] = _Pin(True, True)
        elif key in self._first:
            self._pinned[key] = _Pin(True, self._first.pop(key))
        elif key not in self._pinned:
            self._pinned[key] = _Pin(False)

    def unpin(self, path: Sequence[ObjectKey], /) -> None:
        for key in reversed(path):
            pin = self._pinned.pop(key, None)
            if pin is None:
                self._use(key)
            elif pin.is_demoted:
                self._first[key] = pin.is_frequent
            elif pin.is_known:
                self._list(pin.is_frequent or not pin.is_arriving)[key] = None

    def demote(self, key: ObjectKey, /) -> None:
        pin = self._pinned.get(key)
        if pin is not None:
            pin.is_demoted = pin.is_known
        elif key in self._once:
            del self._once[key]
            self._first[key] = False
        elif key in self._often:
            del self._often[key]
            self._first[key] = True

    def remove(self, key: ObjectKey, /) -> None:
        was_evicted = key == self._named or key in self._first
        gone: Keys | None = None
        if key in self._once:
            del self._once[key]
            gone = self._once_gone
        elif key in self._often:
            del self._often[key]
            gone = self._often_gone
        elif key in self._first:
            gone = self._often_gone if self._first.pop(key) else self._once_gone
        else:
            pin = self._pinned.pop(key, None)
            if pin is None or not pin.is_known:
                return
        self._named = None
        self._resident -= 1
        if gone is not None and was_evicted:
            gone[key] = None
        else:  # nothing will take its place
            self._size = max(self._size - 1, self._resident)
        self._forget_names()

    def victim(self) -> ObjectKey | None:
        if not self._is_asked:
            self._is_asked = True
            self._size = self._resident  # somebody needs room: this is what fits
            self._share = min(self._share, self._size)
        waiting = self._size - self._resident
        if self._first:
            self._named = next(iter(self._first))
        elif self._once and (len(self._once) + waiting > self._share or not self._often):
            self._named = next(iter(self._once))
        else:
            self._named = next(iter(self._often), None)
        return self._named

    # -- what is learnt from it ------------------------------------------------------------------

    def _list(self, is_frequent: bool) -> Keys:
        return self._often if is_frequent else self._once

    def _arrive(self, key: ObjectKey) -> bool:
        """Count a new resident; whether it was resident before, not long ago."""
        self._resident += 1
        self._size = max(self._size, self._resident)
        self._is_asked = False
        once, often = len(self._once_gone), len(self._often_gone)
        if key in self._once_gone:
            del self._once_gone[key]
            self._share = min(self._share + max(1.0, often / once), self._size)
            return True
        if key in self._often_gone:
            del self._often_gone[key]
            self._share = max(self._share - max(1.0, once / often), 0.0)
            return True
        self._forget_names()
        return False

    def _forget_names(self) -> None:
        """Hold objects used once with their names to the size, and everything to twice that.

        Each change makes either one too many at most, so forgetting one keeps up.
        """
        if self._once_gone and len(self._once) + len(self._once_gone) > self._size:
            self._once_gone.popitem(last=False)
            return
        known = self._resident + len(self._once_gone) + len(self._often_gone)
        if known > 2 * self._size and (names := self._often_gone or self._once_gone):
            names.popitem(last=False)
