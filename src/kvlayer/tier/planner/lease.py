"""Leases: pins with an owner and a deadline. Pure; the caller brings the time.

An expired lease is dropped by the next lookup, store or load, so a holder that died cannot stop the
cache. What a lease protected may then be evicted; a later load finds it on a lower tier or counts a
miss. Granting and releasing cost O(1) per object, whatever the number of objects that are held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import isfinite
from typing import cast

from kvlayer._steps import FEW, Steps
from kvlayer._values import number
from kvlayer.errors import ConfigError
from kvlayer.results import OwnerStats
from kvlayer.tier.planner.host import HostTier
from kvlayer.tier.planner.records import ObjectRecord
from kvlayer.tier.planner.strand import Held, Strand

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
    held: list[Held]
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
        self._ending: deque[Lease] = deque()
        """Leases that have ended, and still hold something: the end of what a long one held."""

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

    def grow(self, lease: Lease, first: Sequence[Held], path: Sequence[ObjectRecord]) -> None:
        """A lease holds this, too, which follows what it holds. Not once it has ended."""
        if not self.holds(lease.number):
            return
        held, nbytes = self._host.lease(first, path)
        lease.held += held
        lease.nbytes += nbytes
        leases, leased = self._owners[lease.owner]
        self._owners[lease.owner] = (leases, leased + nbytes)

    def taking_apart(self, lease: Lease) -> Steps[None]:
        """Ready a lease that only reads for giving back objects one by one."""
        at = count = 0
        while lease.left is None and not lease.is_holding and self.holds(lease.number):
            while at < len(lease.held) and count < FEW:
                records = self._host.taken_apart(lease.held[at : at + 1])
                lease.held[at : at + 1] = records
                at += len(records)
                count += len(records)
            if at == len(lease.held):
                lease.left = dict.fromkeys(cast("list[ObjectRecord]", lease.held))
                return
            count = 0
            yield

    def give_back(self, number: int, records: Sequence[ObjectRecord]) -> None:
        """A load has scattered these: a lease that only reads holds them no longer.

        Once it was :meth:`taking_apart`.
        """
        lease = self._leases.get(number)
        if lease is None or lease.is_holding or lease.left is None:
            return
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
        """Give a lease back. False when it had expired or was released before.

        What it holds beyond a slice is let go of with the next calls of :meth:`expire`.
        """
        lease = self._leases.get(number)
        if lease is None:
            return False
        self._end(lease)
        self._let_go(lease, FEW)
        if lease.held:
            self._ending.append(lease)
        return True

    def _end(self, lease: Lease) -> None:
        """It is none of the table's leases any more; what it holds is still held."""
        del self._leases[lease.number]
        leases, held = self._owners.pop(lease.owner)
        if leases > 1:
            self._owners[lease.owner] = (leases - 1, held - lease.nbytes)
        if len(self._deadlines) > 2 * len(self._leases) + _SLACK:
            # Most were released long before their deadline: do not keep those until then.
            self._deadlines = [(each.deadline, each.number) for each in self._leases.values()]
            heapify(self._deadlines)
        if lease.left is not None:
            lease.held = [*lease.left]

    def _let_go(self, lease: Lease, most: int) -> int:
        """Let go of the end of what a lease holds; how many objects that was.

        The end goes first: its root is the most recent then. A strand goes as a whole.
        """
        held, count, at = lease.held, 0, len(lease.held)
        while at and (not count or count + _size(held[at - 1]) <= most):
            at -= 1
            count += _size(held[at])
        some = held[at:]
        del held[at:]
        self._host.unlease(some)
        return count

    @property
    def is_ending(self) -> bool:
        """Whether any that has ended still holds something."""
        return bool(self._ending)

    def is_due(self, now: float) -> bool:
        """Whether :meth:`expire` has something to do. Needs no lock."""
        return bool(self._ending) or (bool(self._deadlines) and self._deadlines[0][0] <= now)

    def expire(self, now: float) -> list[Lease]:
        """Drop leases whose deadline has passed; returns them.

        A slice of objects at most: what is left of them goes with the next calls.
        """
        gone: list[Lease] = []
        room = FEW
        while room > 0:
            if not self._ending:
                if not self._deadlines or self._deadlines[0][0] > now:
                    break
                _, number = heappop(self._deadlines)
                lease = self._leases.get(number)
                if lease is None:
                    continue
                self._end(lease)
                self._ending.append(lease)
                gone.append(lease)
            count = self._let_go(self._ending[0], room)
            room -= max(count, 1)
            if not self._ending[0].held:
                self._ending.popleft()
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
        while self._ending:
            self.expire(0.0)


def _size(held: Held) -> int:
    return len(held) if isinstance(held, Strand) else 1
