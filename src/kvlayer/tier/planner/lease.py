"""Leases: pins with an owner and a deadline. Pure; the caller brings the time.

An expired lease is dropped by the next lookup, store or load, so a holder that died cannot stop the
cache. What a lease protected may then be evicted; a later load finds it on a lower tier or counts a
miss. Granting and releasing cost O(1) per object, whatever the number of objects that are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import isfinite

from kvlayer._values import number
from kvlayer.errors import ConfigError
from kvlayer.results import OwnerStats
from kvlayer.tier.planner.host import HostTier
from kvlayer.tier.planner.records import ObjectRecord
from kvlayer.tier.planner.strand import Held

__all__ = ["Lease", "LeaseTable", "lease_seconds"]

_LONGEST = 1e9  # some thirty years

_SLACK = 64  # deadlines of released leases that are not worth clearing up


def lease_seconds(seconds: object) -> float:
    """For how long objects may be held. Raises ``ArgumentError``: what is held for ever, or for
    an unknown time, stops the cache."""
    return number("the seconds of a lease", seconds, most=_LONGEST)


@dataclass(slots=True, eq=False)
class Lease:
    """Objects held for ``owner`` until ``deadline`` (the cache's clock, seconds)."""

    number: int
    owner: str
    deadline: float
    held: Sequence[Held]
    """Its path, root first: strands as one, and objects that are in none."""
    nbytes: int
    """What of it was in host memory when it was granted."""
    table: LeaseTable
    """Who granted it: another table's numbers, records and offsets mean nothing here."""
    is_holding: bool = False
    """Whether it keeps what it holds until it ends (prefetch, pin, promote). A lookup's only reads:
    what was scattered is free for others, so that a load may be larger than host memory."""
    left: dict[ObjectRecord, None] | None = None
    """What it still holds, once something of it was scattered; None: all of its path."""


class LeaseTable:
    """All leases of one host tier."""

    def __init__(self, host: HostTier) -> None:
        self._host = host
        self._leases: dict[int, Lease] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._owners: dict[str, tuple[int, int]] = {}
        """Leases and bytes, of owners that have any."""
        self._next = 1

    def __len__(self) -> int:
        return len(self._leases)

    def grant(
        self,
        path: Sequence[ObjectRecord],
        *,
        owner: str,
        deadline: float,
        is_holding: bool = False,
        first: Sequence[Held] = (),
    ) -> Lease:
        """Pin ``first`` and ``path`` (root first) until ``deadline`` or :meth:`release`.

        ``first`` are consecutive full chunks, as :meth:`Directory.leading` gives them.
        Raises ``ConfigError`` for a deadline that never comes.
        """
        if not isfinite(deadline):
            raise ConfigError(
                f"a lease needs a deadline, found {deadline} s",
                hint="hold objects for a finite number of seconds, and again when those are over",
            )
        held, nbytes = self._host.lease(first, path)
        lease = Lease(self._next, owner, deadline, held, nbytes, self, is_holding)
        self._next += 1
        leases, leased = self._owners.get(owner, (0, 0))
        self._owners[owner] = (leases + 1, leased + nbytes)
        self._leases[lease.number] = lease
        heappush(self._deadlines, (deadline, lease.number))
        return lease

    def give_back(self, number: int, records: Sequence[ObjectRecord]) -> None:
        """A load has scattered these: a lease that only reads holds them no longer."""
        lease = self._leases.get(number)
        if lease is None or lease.is_holding:
            return
        if lease.left is None:
            lease.left = dict.fromkeys(self._host.taken_apart(lease.held))
        free = [found for found in records if found in lease.left]
        for found in free:
            del lease.left[found]
        self._host.unpin(free)

    def keep(self, lease: Lease, path: Sequence[ObjectRecord]) -> None:
        """From now on a lease holds all of ``path`` until it ends; also what it had given back."""
        if not self.holds(lease.number):
            return
        lease.is_holding = True
        if lease.left is not None:
            again = [found for found in path if found not in lease.left]
            self._host.pin(again)
            lease.left.update(dict.fromkeys(again))

    def holds(self, number: int) -> bool:
        """Whether a lease is neither released nor expired."""
        return number in self._leases

    def release(self, number: int) -> bool:
        """Give a lease back. False when it had expired or was released before."""
        lease = self._leases.pop(number, None)
        if lease is None:
            return False
        self._host.unlease(lease.held if lease.left is None else [*lease.left])
        leases, held = self._owners.pop(lease.owner)
        if leases > 1:
            self._owners[lease.owner] = (leases - 1, held - lease.nbytes)
        if len(self._deadlines) > 2 * len(self._leases) + _SLACK:
            # Most were released long before their deadline: do not keep those until then.
            self._deadlines = [(each.deadline, each.number) for each in self._leases.values()]
            heapify(self._deadlines)
        return True

    def expire(self, now: float) -> list[Lease]:
        """Drop every lease whose deadline has passed; returns them."""
        gone: list[Lease] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heappop(self._deadlines)
            lease = self._leases.get(number)
            if lease is not None:
                self.release(number)
                gone.append(lease)
        return gone

    def owners(self) -> dict[str, OwnerStats]:
        """Leases, and the bytes they found in host memory, by owner.

        What is leased twice counts twice.
        """
        return {owner: OwnerStats(*held) for owner, held in self._owners.items()}

    def clear(self) -> None:
        """Release every lease."""
        for held in list(self._leases):
            self.release(held)
        self._deadlines.clear()
