"""A figure, its ceiling, and how both are taken: alternating, so that noise meets both alike."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

__all__ = ["Row", "Taken", "alternate", "seconds_of", "stopwatch"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``value`` and ``ceiling`` share ``unit``; of seconds and bytes less is better."""

    name: str
    value: float
    unit: str
    ceiling: float | None = None
    cpu_seconds_per_gb: float | None = None
    """CPU seconds of the whole process for each 10^9 bytes moved, where bytes move."""

    @property
    def ratio(self) -> float | None:
        """How close the figure comes to its ceiling: 1.0 is as good as it can be."""
        if not self.ceiling:
            return None
        is_cost = self.unit in ("s", "B")
        return self.ceiling / self.value if is_cost else self.value / self.ceiling

    def as_dict(self) -> dict[str, str | float | None]:
        """What the JSON report holds; the CPU's field only where there is one."""
        found: dict[str, str | float | None] = {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "ceiling": self.ceiling,
            "ratio": self.ratio,
        }
        if self.cpu_seconds_per_gb is not None:
            found["cpu_seconds_per_gb"] = self.cpu_seconds_per_gb
        return found

    @classmethod
    def moved(cls, name: str, nbytes: int, own: Sequence[Taken], top: Sequence[float]) -> Row:
        """Bytes per second from several samples of moving ``nbytes``, and of a bare move's."""
        return cls(
            name,
            nbytes / median(taken.seconds for taken in own),
            "B/s",
            nbytes / median(top),
            median(taken.cpu_seconds for taken in own) / (nbytes / 1e9),
        )


@dataclass(slots=True)
class Taken:
    """What a block of code took: wall seconds, and CPU seconds of all of the process's threads."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def stopwatch() -> Generator[Taken]:
    """Measure a block; the value is complete when the block has ended."""
    taken = Taken()
    cpu, started = time.process_time(), time.perf_counter()
    yield taken
    taken.seconds = time.perf_counter() - started
    taken.cpu_seconds = time.process_time() - cpu


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

    Both return the seconds they took. The first ``warm`` rounds do not count. Who goes first
    changes every round: the second finds the processor's caches as the first left them.
    """
    own: list[float] = []
    top: list[float] = []
    for number in range(warm + rounds):
        if number % 2:
            own.append(await subject(number))
            top.append(ceiling())
        else:
            top.append(ceiling())
            own.append(await subject(number))
    return median(own[warm:]), median(top[warm:])
