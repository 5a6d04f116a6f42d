"""When objects were used, as file times that keep the order of a path. Pure but for the clock."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from kvlayer.keys import ObjectKey
from kvlayer_backends.file.epochs import Epochs

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
        self._epochs = Epochs()
        self._epoch_ns = 0
        self._touched: OrderedDict[ObjectKey, int] = OrderedDict()

    def stamps(self, count: int) -> Sequence[int]:
        """Times in Unix nanoseconds for a path of ``count`` objects: the root's is the latest."""
        first = max(self._clock(), self._last) + _STEP_NS
        self._last = first + count * _STEP_NS
        return range(self._last, first, -_STEP_NS)

    def written(self, first_tokens: Sequence[int]) -> Sequence[int]:
        """Times for objects that are written now, each at its depth in a prompt, root first.

        A prompt is written root first, which would leave its root the oldest. So all that is
        written within one epoch gets the time at which that began, less its depth: whoever reads
        the times finds what comes before an object more recent, however long the writing takes.
        """
        is_root = 0 in first_tokens
        if self._epochs.begins(self._clock() / 1e9, is_root=is_root):
            self._epoch_ns = self.stamps(1)[0]
        depths = [max(first, n) for n, first in enumerate(first_tokens)]
        return [self._epoch_ns - _STEP_NS * depth for depth in depths]

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
