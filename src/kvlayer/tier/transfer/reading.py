"""What one load holds of a match: an object's slot is free again once it has been scattered."""

from __future__ import annotations

from collections.abc import Sequence

from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.transfer.loads import Wanted, wanted_of

__all__ = ["Reading"]


class Reading:
    """Pins of one load, taken before it is made; it lets go of them as objects are scattered.

    A lease that only reads lets go with it (``Lease.is_holding``): what many requests lease may
    together be larger than host memory, and so may what one of them loads.
    """

    def __init__(self, planner: Planner, match: Match, lease: Lease | None) -> None:
        self.match = match
        self._planner = planner
        self._lease = lease
        self._left: dict[ObjectRecord, None] = dict.fromkeys(match.path())
        self._batches = 0

    def scattered(self, batch: Wanted, stop: int) -> None:
        """These spans are in the engine's memory, as far as ``stop``; one cut there is kept."""
        records = [r for span, found in batch if span.stop <= stop for r in found]
        for record in records:
            del self._left[record]
        self._batches += 1
        self._planner.scattered(records, self._lease)

    def within(self, start: int, stop: int) -> Wanted:
        """What of the match tokens ``[start, stop)`` need; of the rest it holds less from now on.

        What lies before them the engine has: it is let go of where a lower tier has it, too. What
        comes after them may be wanted next, and is let go of where there is no room otherwise.
        """
        every = wanted_of(self.match)
        self._spare([each for each in every if each[0].stop <= start])
        wanted = [each for each in every if each[0].start < stop and each[0].stop > start]
        if not self._planner.has_room(wanted):
            self._spare([each for each in every if each[0].start >= stop])
        return wanted

    def _spare(self, spans: Wanted) -> None:
        records = [r for _, found in spans for r in found if r.tiers and r in self._left]
        for record in records:
            del self._left[record]
        self._batches += bool(records)
        self._planner.scattered(records, self._lease)

    def need(self, records: Sequence[ObjectRecord]) -> None:
        """See ``loads.Room``."""
        missing = [record for record in records if record not in self._left]
        if missing:
            self._planner.pin(missing)
            self._left |= dict.fromkeys(missing)

    def give_up(self, records: Sequence[ObjectRecord]) -> bool:
        """See ``loads.Room``."""
        given = [r for r in records if r in self._left and r.host is HostState.READY and r.tiers]
        for record in given:
            del self._left[record]
        self._planner.scattered(given, self._lease)
        self._batches += bool(given)
        return bool(given)

    def close(self) -> None:
        """Let go of the rest."""
        self._planner.unpin([*self._left])
        self._left.clear()
        if self._batches > 1:
            self._planner.in_order(self.match.path())
