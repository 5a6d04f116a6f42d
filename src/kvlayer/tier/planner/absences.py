"""What tiers have just said that they do not hold, so that nobody asks again at once. Pure.

The caller brings the time, and holds the planner's lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvlayer.identity.keys import ObjectKey

__all__ = ["Absences"]

_BELIEVED_SECONDS = 1.0
_MOST = 65536  # some 20 MB of them


class Absences:
    """Keys by tier, each believed to be absent for a second after it was said.

    At most ``most``: those that were said first are forgotten first, and asked about again.
    """

    def __init__(self, *, seconds: float = _BELIEVED_SECONDS, most: int = _MOST) -> None:
        self._seconds = seconds
        self._most = most
        self._until: OrderedDict[tuple[int, ObjectKey], float] = OrderedDict()
        """In the order in which they end."""

    def __len__(self) -> int:
        return len(self._until)

    def believe(self, tier: int, keys: Iterable[ObjectKey], now: float) -> None:
        """``tier`` has said that it holds none of ``keys``."""
        for key in keys:
            self._until.pop((tier, key), None)
            self._until[tier, key] = now + self._seconds
        while self._until:
            first = next(iter(self._until))
            if len(self._until) <= self._most and self._until[first] > now:
                break
            self._until.popitem(last=False)

    def withdraw(self, tier: int, key: ObjectKey) -> None:
        """Something was heard of an object: it may be there."""
        self._until.pop((tier, key), None)

    def open(self, tier: int, keys: Iterable[ObjectKey], now: float) -> list[ObjectKey]:
        """Those of ``keys`` that ``tier`` may hold for all that is known."""
        if not self._until:
            return [*keys]
        return [key for key in keys if self._until.get((tier, key), now) <= now]
