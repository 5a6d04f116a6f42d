"""Strands: objects that follow each other in a prompt and are leased as one. Pure.

Whoever looks up a long prompt would otherwise read and write hundreds of records that lie all over
memory. What a lookup has found and leased together is remembered as a strand: the next lookup
compares one hash, and pins one number, however long it is.

A strand says nothing of its own: the pins of an object are its own and those of its strand. So it
may be parted in two where another prompt leaves it, and dissolved whenever one of its objects goes:
its leases are its objects' then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from kvlayer.eviction.lists import range_of

if TYPE_CHECKING:
    from kvlayer.tier.planner.records import ObjectRecord

__all__ = ["Held", "Strand", "flat"]


class Strand:
    """Consecutive objects, each the only one of its full chunk and ready in host memory.

    Members have ``strand`` set to it, until it is parted or dissolved. Which they are never
    changes, so whoever has found a strand may read it later.
    """

    __slots__ = ("is_dissolved", "leases", "nbytes", "own", "parts", "records", "rows")

    def __init__(self, records: Sequence[ObjectRecord], leases: int = 0) -> None:
        self.records = tuple(records)
        rows = [found.row for found in records]
        self.rows: Sequence[int] = range_of(rows) or tuple(rows)
        """In the order of eviction, one per record."""
        self.nbytes = sum([found.nbytes for found in records])
        self.leases = leases
        """Pins of each of its objects, beside those of the object's own."""
        self.own = sum([found.own for found in records])
        """Pins that its objects have beside its leases; while there are none, no object is held."""
        self.parts: tuple[Strand, ...] = ()
        """What it was parted into."""
        self.is_dissolved = False
        for found in records:
            found.strand = self

    def __len__(self) -> int:
        return len(self.records)

    def extended(self, records: Sequence[ObjectRecord]) -> Strand:
        """One strand in its place, with what comes next. Only while nobody leases it."""
        self.dissolve()
        return Strand((*self.records, *records))

    def part(self, count: int) -> tuple[Strand, Strand]:
        """Two strands in its place: the first ``count`` objects, and the others."""
        first, rest = self.records[:count], self.records[count:]
        self.parts = Strand(first, self.leases), Strand(rest, self.leases)
        return self.parts[0], self.parts[1]

    def dissolve(self) -> None:
        """Its objects stand for themselves, and have its leases as their own."""
        self.is_dissolved = True
        for found in self.records:
            found.strand = None
            found.own += self.leases

    def lend_pin(self) -> None:
        """One of its leases becomes a pin of each object's own."""
        self.leases -= 1
        self.own += len(self)
        for found in self.records:
            found.own += 1


Held: TypeAlias = "Strand | ObjectRecord"
"""What a lease holds."""


def flat(path: Sequence[Held]) -> list[ObjectRecord]:
    """The objects of a path, root first."""
    found: list[ObjectRecord] = []
    for each in path:
        if isinstance(each, Strand):
            found += each.records
        else:
            found.append(each)
    return found
