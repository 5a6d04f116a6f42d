"""Work in steps: what goes over a whole prompt does so a slice at a time. Pure.

A function that returns :data:`Steps` does its work as it is drawn, and yields where others may get
their turn: nothing is locked there. Few enough chunks are one step, in which nothing is yielded.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import TypeAlias, TypeVar, cast

__all__ = ["FEW", "SLICE", "Steps", "finish", "in_slices", "used_up"]

T = TypeVar("T")

SLICE = 32
"""Chunks, objects or spans of one step: up to half a millisecond."""

FEW = 256
"""So many chunks are found and leased in one step: that takes a fraction of what others do."""

Steps: TypeAlias = Generator[None, None, T]
"""Work that ends with a ``T``. Whoever draws it finishes or closes it."""


def in_slices(entries: Iterable[T]) -> Iterator[list[T]]:
    """These entries, at most a slice at a time."""
    left = iter(entries)
    while some := [*islice(left, SLICE)]:
        yield some


def used_up(entries: list[T], size: int = SLICE) -> Iterator[list[T]]:
    """These entries in their order, ``size`` at a time; what is freed with them goes so, too.

    The list is empty afterwards.
    """
    entries.reverse()
    while entries:
        some = entries[: -size - 1 : -1]
        del entries[-size:]
        yield some


def finish(steps: Steps[T]) -> T:
    """Do all of it now, for whoever keeps nobody waiting."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast("T", end.value)
