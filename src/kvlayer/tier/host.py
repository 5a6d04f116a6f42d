"""Tier 0, decided: which bytes of the slab hold what, and what to give up for more. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.keys import ObjectKey
from kvlayer.memory.extents import Extents
from kvlayer.tier.directory import Directory, ObjectRecord

__all__ = ["HostTier"]


class HostTier:
    """Slab offsets and eviction of one directory's objects. Pins are counted on the records."""

    def __init__(self, capacity: int, policy: EvictionPolicy, directory: Directory) -> None:
        self.extents = Extents(capacity)
        self.policy = policy
        self.directory = directory
        self.pinned_nbytes = 0
        self._records: dict[str, ObjectRecord] = {}

    def __len__(self) -> int:
        """Objects in host memory, those being filled included."""
        return len(self._records)

    def reserve(self, found: ObjectRecord, nbytes: int, evicted: list[ObjectRecord]) -> bool:
        """Make room and start filling ``found``, with one more pin. False when nothing can go.

        What had to be given up is appended to ``evicted``; it is not enough only where pinned
        objects leave no gap of that size.
        """
        if nbytes > self.extents.capacity - self.pinned_nbytes:
            return False
        offset = self.extents.allocate(nbytes)
        while offset is None:
            key = self.policy.victim()
            if key is None:
                return False
            victim = self._records[key]
            self.drop(victim)
            evicted.append(victim)
            offset = self.extents.allocate(nbytes)
        self.directory.fill(found, offset, nbytes)
        self._records[found.key] = found
        found.pins += 1
        self.pinned_nbytes += nbytes
        return True

    def commit(self, path: Sequence[ObjectRecord]) -> None:
        """The bytes of these reserved objects are there: serve them. Keeps their pins."""
        for found in path:
            self.directory.ready(found)
            self.policy.admit((found.key,))
            self.policy.pin(found.key)

    def drop(self, found: ObjectRecord) -> None:
        """Give up an object's bytes, whatever its state; pins stay and hold only the record.

        The caller makes sure that no one uses the bytes any more.
        """
        if found.pins:
            self.pinned_nbytes -= found.nbytes
        self.policy.remove(found.key)
        del self._records[found.key]
        self.extents.release(self.directory.drop_host(found))

    def pin(self, path: Sequence[ObjectRecord]) -> None:
        """Hold these objects, host-resident or not; a pin on an absent one holds its record."""
        for found in path:
            found.pins += 1
            if found.pins == 1 and found.offset >= 0:
                self.pinned_nbytes += found.nbytes
                self.policy.pin(found.key)

    def unpin(self, path: Sequence[ObjectRecord]) -> None:
        """Let go of one pin on each, root first; counts as one use of the path."""
        freed: list[ObjectKey] = []
        for found in path:
            found.pins -= 1
            if found.pins == 0:
                if found.offset >= 0:
                    self.pinned_nbytes -= found.nbytes
                    freed.append(found.key)
                else:
                    self.directory.forget(found)
        self.policy.unpin(freed)
