"""When objects were used, as file times that keep the order of a path. Pure but for the clock."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvlayer.identity.keys import ObjectKey
from kvlayer_backends.file import disk

__all__ = ["Uses"]

_STEP_NS = 1_000
"""Between two objects of one path: coarse enough for filesystems that keep 100 ns."""
_SAME_USE_NS = 10_000_000_000
_REMEMBERED = 65_536


class Uses:
    """Hands out times of use, each later than all before.

    Who looks a prompt up touches its whole path and then reads its objects one by one, root first.
    Counting each read would leave the root the oldest, so a read that follows a touch of the same
    object within ten seconds is the same use.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._last = 0
        self._touched: OrderedDict[ObjectKey, int] = OrderedDict()

    def stamps(self, count: int) -> Sequence[int]:
        """Times in Unix nanoseconds for a path of ``count`` objects: the root's is the latest."""
        first = max(self._clock(), self._last) + _STEP_NS
        first = min(first, disk.LATEST_NS - (count + 1) * _STEP_NS)
        self._last = first + count * _STEP_NS
        return range(self._last, first, -_STEP_NS)

    def touched(self, keys: Iterable[ObjectKey]) -> None:
        """Remember that a whole path was touched just now."""
        now = self._clock()
        for key in keys:
            self._touched[key] = now
            self._touched.move_to_end(key)
        while self._touched and (
            len(self._touched) > _REMEMBERED
            or now - next(iter(self._touched.values())) > _SAME_USE_NS
        ):
            self._touched.popitem(last=False)

    def is_new(self, key: ObjectKey) -> bool:
        """Whether reading ``key`` now is a use of its own."""
        at = self._touched.get(key)
        return at is None or self._clock() - at > _SAME_USE_NS
