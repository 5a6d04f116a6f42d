"""A batch's work on threads: what is small together, what is large side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvlayer.runtime.offload import Offload

__all__ = ["spread"]

_HOP_NBYTES = 1 << 20  # moved in about the time a thread takes to begin


async def spread(
    pool: Offload,
    work: Callable[[Iterable[int]], object],
    items: Sequence[tuple[int, int]],
    nbytes: int = _HOP_NBYTES,
) -> None:
    """Do ``work`` on items (number, bytes), in order, each thread on some of ``nbytes`` together.

    Cancelled, it begins none and returns once no thread is at work on any.
    """
    groups: list[list[int]] = []
    taken = nbytes
    for number, size in items:
        if taken >= nbytes:
            groups.append([])
            taken = 0
        groups[-1].append(number)
        taken += size
    if len(groups) == 1:
        await pool.run_over(work, groups[0])
    elif groups:
        await pool.run_all([partial(work, group) for group in groups])
