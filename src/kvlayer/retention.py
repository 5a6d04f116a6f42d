"""How long KV is worth keeping, as the request that stores it says. A pure value.

It travels with what is stored: ``Scope`` -> planner -> eviction policy -> ``Write`` of lower tiers.
It is a wish, not a promise: where everything that is left is wanted, the least wanted goes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvlayer._values import number, whole
from kvlayer.errors import ConfigError

__all__ = ["ORDINARY", "RANKS", "Retention"]

_HIGHEST = 3
_LATEST = 1e11 - 1  # seconds; a time in milliseconds lies beyond it
_PRIORITIES = 2 * _HIGHEST + 1

RANKS = 2 * _PRIORITIES
"""How many different answers :meth:`Retention.rank` has: 0 to ``RANKS - 1``."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which objects of a tier go first: the lower ``priority``, and never those still to be kept.

    ``priority``: -3 (goes first) to 3 (goes last); 0 is what every request has that says nothing.
    ``keep_until``: Unix seconds. Before that time the object outlives every object that is not to
    be kept, whatever their priorities; after it, its priority alone counts. 0: no such time.

    Raises ``ConfigError`` for another priority, or a time that is negative or beyond the
    year 5000: not finite, or counted in milliseconds.
    """

    priority: int = 0
    keep_until: float = 0.0

    def __post_init__(self) -> None:
        limits = {"least": -_HIGHEST, "most": _HIGHEST}
        priority = whole("a priority", self.priority, **limits, error=ConfigError)
        until = number("keep_until", self.keep_until, most=_LATEST, error=ConfigError)
        object.__setattr__(self, "priority", priority)
        object.__setattr__(self, "keep_until", until)

    def joined(self, other: Retention) -> Retention:
        """What is wished of an object that two requests stored: the higher of each."""
        if self == other:
            return self
        until = max(self.keep_until, other.keep_until)
        return Retention(max(self.priority, other.priority), until)

    def rank(self, now: float) -> int:
        """Where the object stands at ``now`` (Unix seconds): of two, the lower rank goes first."""
        return self.priority + _HIGHEST + (_PRIORITIES if now < self.keep_until else 0)


# Callers pass what a request said, types unchecked; hence ``object``.


ORDINARY = Retention()
"""What every request has that says nothing."""
