"""A figure, its ceiling, and how both are taken: alternating, so that noise meets both alike."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from statistics import median

__all__ = ["Row", "alternate", "seconds_of"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``value`` and ``ceiling`` share ``unit``; higher is better unless it is ``s``."""

    name: str
    value: float
    unit: str
    ceiling: float | None = None

    @property
    def ratio(self) -> float | None:
        """How close the figure comes to its ceiling: 1.0 is as good as it can be."""
        if not self.ceiling:
            return None
        return self.ceiling / self.value if self.unit == "s" else self.value / self.ceiling

    def as_dict(self) -> dict[str, str | float | None]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "ceiling": self.ceiling,
            "ratio": self.ratio,
        }


def seconds_of(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


async def alternate(
    subject: Callable[[int], Awaitable[float]],
    ceiling: Callable[[], float],
    *,
    rounds: int,
    warm: int,
) -> tuple[float, float]:
    """Median seconds of ``subject(round)`` and of ``ceiling()``, one after the other each round.

    Both return the seconds they took. The first ``warm`` rounds do not count.
    """
    taken: list[tuple[float, float]] = []
    for number in range(warm + rounds):
        pair = (ceiling(), await subject(number))
        if number >= warm:
            taken.append(pair)
    return median(own for _, own in taken), median(top for top, _ in taken)
