"""In which order a tier gives up its objects: one door between the tier and any policy. Pure.

The tier tells this what its objects go through. What holds for every policy is kept here: what was
demoted goes first, then what ranks lowest (``Retention``), and only among equals does the policy
choose. Who wrote the policy is unknown, so nothing it does gets further than this: one that raises,
or names what it must not name, is replaced, and the order goes on from what is known here.

One instance belongs to one tier, which guards it: it has no lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from kvlayer.abc.policy import EvictionPolicy, PolicyMaker
from kvlayer.abc.rows import Rows
from kvlayer.eviction.lists import Lists, range_of
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.retention import ORDINARY, RANKS, Retention

__all__ = ["EvictionOrder"]

_log = logging.getLogger(__name__)

_FREE, _ORDERED, _DEMOTED, _PINNED, _PINNED_DEMOTED = range(5)
"""States of a row. Policies know all but free ones, and have all but ordered ones pinned."""

_USUAL = ORDINARY.rank(0.0)
_KEPT = Retention(keep_until=1.0).rank(0.0) - _USUAL
"""Ranks from here on are of objects whose time has not come; so much lower they stand after it."""

_AT_ONCE = 256  # rows whose time has come that are looked at in one call
_SLACK = 64  # times of rows that have gone that are not worth clearing up


class EvictionOrder:
    """The objects of one tier, by how cheap they are to lose.

    ``policy`` makes a policy for the tier's rows. Paths run from the start of a prompt. Every call
    costs O(1) per row, and O(log n) for one that is to be kept until some time.
    """

    def __init__(self, policy: PolicyMaker) -> None:
        self.rows = Rows()
        self.replaced = 0
        """How often a policy was given up because it broke its word."""
        self.name = PrefixLRU.name
        """The policy's that chooses now."""
        self._make = policy
        self._states = bytearray()
        self._ranks = bytearray()
        self._sizes = [0] * RANKS
        """By rank, how many rows the policy may name."""
        self._first = Lists()
        """What was demoted, in that order."""
        self._demoted = 0
        """Rows that are in ``_first``, or will be once they are unpinned."""
        self._policies: dict[int, EvictionPolicy] = {}
        self._wished = False
        """Whether any row was ever given a wish of its own."""
        self._times: list[int] = []
        """Heap of (ms, row), each packed into one number, of rows to be kept until then."""
        self._kept = 0
        self._tell(lambda: self._add_policy(_USUAL))

    def __len__(self) -> int:
        """Objects known."""
        return len(self.rows)

    # -- what happens to objects -----------------------------------------------------------------

    def add(
        self,
        name: int,
        nbytes: int,
        *,
        first_token: int = 0,
        tokens: int = 0,
        retention: Retention = ORDINARY,
    ) -> int:
        """An object became resident: the row that stands for it from now on.

        ``name``: 64 bits, signed, that are the same whenever this object is.
        """
        row = self.rows.take(name, nbytes, first_token, tokens, retention)
        if row >= len(self._states):
            self._states.append(_FREE)
            self._ranks.append(0)
            self._first.fit(row + 1)
        rank = _USUAL
        if retention is not ORDINARY:
            self._wished, rank = True, retention.rank(0.0)
        self._states[row] = _ORDERED
        self._ranks[row] = rank
        self._sizes[rank] += 1
        if rank >= _KEPT:
            self._kept += 1
            self._await(row)
        self._tell(lambda: self._policy(rank).admit((row,)))
        return row

    def refresh(self, path: Sequence[int], retention: Retention = ORDINARY) -> None:
        """Objects were stored again: recent, not used. Pinned ones get only the retention.

        Of several requests that stored an object the highest priority and the latest time hold.
        """
        if self._wished or retention is not ORDINARY:
            self._wished = True
            for row in path:
                self._wish(row, retention)
        path = self._take_back(path)
        self._by_rank(path, lambda policy, rows: policy.refresh(rows))

    def touch(self, path: Sequence[int]) -> None:
        """A request used consecutive objects of a prompt, once. Pinned ones are passed over."""
        path = self._take_back(path)
        self._by_rank(path, lambda policy, rows: policy.touch(rows))

    def pin(self, path: Sequence[int]) -> None:
        """Name none of these until they are unpinned. Pinning twice is the caller's to count."""
        if self._at_once(path, _ORDERED, _PINNED, -1):
            self._by_rank(path, lambda policy, rows: policy.pin(rows))
            return
        states, sizes, ranks = self._states, self._sizes, self._ranks
        ordered: list[int] = []
        for row in path:
            state = states[row]
            if state == _ORDERED:
                sizes[ranks[row]] -= 1
                ordered.append(row)
            elif state == _DEMOTED:
                self._first.unlink((row,))
                self._demoted -= 1
            elif state == _PINNED_DEMOTED:
                continue
            states[row] = _PINNED
        self._by_rank(ordered, lambda policy, rows: policy.pin(rows))

    def unpin(self, path: Sequence[int], *, used: bool) -> None:
        """Make pinned objects evictable again, as the most recent; ``used``: by one request.

        One that was demoted meanwhile comes first.
        """
        if self._at_once(path, _PINNED, _ORDERED, 1):
            self._by_rank(path, lambda policy, rows: policy.unpin(rows, used=used))
            return
        states, sizes, ranks = self._states, self._sizes, self._ranks
        ordered: list[int] = []
        for row in path:
            if states[row] == _PINNED:
                states[row] = _ORDERED
                sizes[ranks[row]] += 1
                ordered.append(row)
            elif states[row] == _PINNED_DEMOTED:
                states[row] = _DEMOTED
                self._first.append(0, (row,))
        self._by_rank(ordered, lambda policy, rows: policy.unpin(rows, used=used))

    def _at_once(self, path: Sequence[int], old: int, new: int, sign: int) -> bool:
        """Change the state of a whole range of equals, where the path is one."""
        span = None if self._wished else range_of(path)
        if span is None:
            return False
        first, count = min(span[0], span[-1]), len(span)
        rows = slice(first, first + count)
        if self._states[rows] != bytearray((old,)) * count:
            return False
        self._states[rows] = bytes((new,)) * count
        self._sizes[_USUAL] += sign * count
        return True

    def demote(self, row: int) -> None:
        """Prefer this object over all others for eviction, in the order of these calls.

        A later use or store takes that back. A pinned object comes first once it is unpinned.
        """
        state = self._states[row]
        if state == _ORDERED:
            self._sizes[self._ranks[row]] -= 1
            self._states[row] = _DEMOTED
            self._first.append(0, (row,))
            self._demoted += 1
            self._by_rank((row,), lambda policy, rows: policy.pin(rows))
        elif state == _PINNED:
            self._states[row] = _PINNED_DEMOTED
            self._demoted += 1

    def remove(self, row: int, *, evicted: bool) -> None:
        """An object is gone, pinned or not; ``evicted``: to make room for others."""
        state, rank = self._states[row], self._ranks[row]
        self._states[row] = _FREE
        self._sizes[rank] -= state == _ORDERED
        self._demoted -= state in (_DEMOTED, _PINNED_DEMOTED)
        self._kept -= rank >= _KEPT
        if state == _DEMOTED:
            self._first.unlink((row,))

        def tell() -> None:
            policy = self._policy(rank)
            if state == _ORDERED:
                policy.pin((row,))
            policy.remove(row, evicted=evicted)

        self._tell(tell)
        self.rows.give_back(row)

    def rank(self, row: int) -> int:
        """Where an object stands by what was wished of it; of two, the lower goes first."""
        return self._ranks[row]

    def victim(self, now: float) -> int | None:
        """The object to give up next, or None when nothing is evictable. Does not remove it.

        ``now``: Unix seconds. A clock that jumps costs objects the time they were to be kept.
        """
        if self._times:
            self._expire(now)
        demoted = self._first.first()
        if demoted is not None:
            return demoted
        rank = next((rank for rank, size in enumerate(self._sizes) if size), None)
        if rank is None:
            return None
        named: list[object] = []
        self._tell(lambda: named.append(self._policy(rank).victim()))
        row = named[0] if named else None
        if type(row) is int and self._may_go(row, rank):
            return row
        if named:
            what = row if type(row) is int else type(row).__name__
            self._replace(f"named {what} as its victim, which it must not")
        row = self._policy(rank).victim()
        assert row is not None
        return row

    def _may_go(self, row: int, rank: int) -> bool:
        is_row = 0 <= row < len(self._states)
        return is_row and self._states[row] == _ORDERED and self._ranks[row] == rank

    def _take_back(self, path: Sequence[int]) -> Sequence[int]:
        """Those of a path that are not pinned; if they were demoted, they are no more."""
        states = self._states
        if self._demoted:
            for row in path:
                if states[row] == _DEMOTED:
                    self._first.unlink((row,))
                    self._demoted -= 1
                    states[row] = _PINNED
                    self.unpin((row,), used=False)
        return [row for row in path if states[row] == _ORDERED]

    # -- the policies ----------------------------------------------------------------------------

    def _policy(self, rank: int) -> EvictionPolicy:
        return self._policies.get(rank) or self._add_policy(rank)

    def _add_policy(self, rank: int) -> EvictionPolicy:
        policy = self._make(self.rows)
        self.name = str(policy.name)
        self._policies[rank] = policy
        return policy

    def _by_rank(
        self, path: Sequence[int], what: Callable[[EvictionPolicy, Sequence[int]], None]
    ) -> None:
        """Tell each row's policy something that is done here already."""
        if not path:
            return
        if len(self._policies) == 1:
            self._tell(lambda: what(self._policy(self._ranks[path[0]]), path))
            return
        parts: dict[int, list[int]] = {}
        for row in path:
            parts.setdefault(self._ranks[row], []).append(row)

        def tell() -> None:
            for rank, rows in parts.items():
                what(self._policy(rank), rows)

        self._tell(tell)

    def _tell(self, call: Callable[[], object]) -> None:
        """Call a policy. What it is told of is done here before: it may not come to an end."""
        try:
            call()
        except BaseException as exc:  # whatever it raises costs it, not the caller
            self._replace(f"raised {type(exc).__name__}", exc)
            if isinstance(exc, KeyboardInterrupt):  # the user's, whoever was interrupted
                raise

    def _replace(self, why: str, exc: BaseException | None = None) -> None:
        """Give up the policy; the built-in one begins with what is known, in no order of use.

        One pass over the tier. A prompt's start has mostly lower numbers than its end.
        """
        _log.error(
            "eviction policy %s %s: %s takes its place", self.name, why, PrefixLRU.name,
            exc_info=exc,
        )  # fmt: skip
        self.replaced += 1
        self._make, self.name = PrefixLRU, PrefixLRU.name
        self._policies = {}
        for row in reversed(range(len(self._states))):
            if self._states[row] != _FREE:
                policy = self._policy(self._ranks[row])
                policy.admit((row,))
                if self._states[row] != _ORDERED:
                    policy.pin((row,))

    # -- what is to be kept ----------------------------------------------------------------------

    def _wish(self, row: int, retention: Retention) -> None:
        """Join a wish to those that a row has."""
        known = self.rows.retention(row)
        joined = known.joined(retention)
        if joined == known:
            return
        self.rows.wish(row, joined)
        if joined.keep_until > known.keep_until:
            # Should the time be past already, the next victim's call finds out.
            self._move(row, joined.rank(0.0))
            self._await(row)
        else:
            is_kept = self._ranks[row] >= _KEPT
            self._move(row, joined.rank(0.0 if is_kept else joined.keep_until))

    def _move(self, row: int, rank: int) -> None:
        """Another rank's policy has a row from now on, as its most recent."""
        old = self._ranks[row]
        if old == rank:
            return
        is_ordered = self._states[row] == _ORDERED
        self._sizes[old] -= is_ordered
        self._sizes[rank] += is_ordered
        self._ranks[row] = rank
        self._kept += (rank >= _KEPT) - (old >= _KEPT)

        def tell() -> None:
            before, after = self._policy(old), self._policy(rank)
            if is_ordered:
                before.pin((row,))
            before.remove(row, evicted=False)
            after.admit((row,))
            if not is_ordered:
                after.pin((row,))

        self._tell(tell)

    def _await(self, row: int) -> None:
        """Remember when the time of a row comes that is to be kept."""
        heappush(self._times, self._time(row))
        if len(self._times) > 2 * self._kept + _SLACK:
            # Most have gone long before their time: do not remember it until then.
            self._times = sorted({time for time in self._times if self._is_current(time)})

    def _time(self, row: int) -> int:
        """When a row's time has come for certain, in ms, and the row, in one number."""
        return (int(self.rows.retention(row).keep_until * 1000) + 1) << 32 | row

    def _is_current(self, time: int) -> bool:
        row = time & 0xFFFFFFFF
        return self._states[row] != _FREE and self._ranks[row] >= _KEPT and self._time(row) == time

    def _expire(self, now: float) -> None:
        """What was to be kept until now counts by its priority alone, from now on."""
        due: set[int] = set()
        for _ in range(_AT_ONCE):
            if not self._times or self._times[0] >> 32 > now * 1000:
                break
            time = heappop(self._times)
            if self._is_current(time):
                due.add(time & 0xFFFFFFFF)
        first_token = self.rows.first_tokens.__getitem__
        for row in sorted(due, key=first_token, reverse=True):
            # A prompt's end first, so that its start is the more recent.
            self._move(row, self._ranks[row] - _KEPT)
