"""What one load holds of a match: an object's slot is free again once it has been scattered."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from kvlayer._steps import SLICE, Steps
from kvlayer.identity.keys import Span
from kvlayer.runtime.turns import in_turns, to_the_end
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match, Needs
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.transfer.loads import Wanted

__all__ = ["Reading"]


class Reading:
    """Pins of one load, taken before it is made; it lets go of them as objects are scattered.

    A lease that only reads lets go with it (``Lease.is_holding``): what many requests lease may
    together be larger than host memory, and so may what one of them loads.
    """

    def __init__(self, planner: Planner, match: Match, lease: Lease | None) -> None:
        """``match`` is pinned: :meth:`closing` lets go of what is left of it."""
        self.match = match
        self._planner = planner
        self._lease = lease
        self._left: dict[ObjectRecord, None] = dict.fromkeys(match.path())
        self._batches = 0

    async def scattered(self, batch: Wanted, stop: int) -> None:
        """These spans are in the engine's memory, as far as ``stop``; one cut there is kept."""
        await self._let_go([r for span, found in batch if span.stop <= stop for r in found])

    async def within(self, start: int, stop: int) -> Needs:
        """What of the match tokens ``[start, stop)`` need; of the rest it holds less from now on.

        What lies before them the engine has: it is let go of where a lower tier has it, too. What
        comes after them may be wanted next, and is let go of where there is no room otherwise.
        """
        spans, every = self.match.spans, self.match.needs
        first = bisect_right(spans, start, key=_stop)
        last = max(bisect_left(spans, stop, key=_start), first)
        await self._spare(every[:first])
        wanted = every[first:last]
        if not await in_turns(self._planner.having_room(wanted)):
            await self._spare(every[last:])
        return wanted

    async def _spare(self, spans: Needs) -> None:
        for at in range(0, len(spans), SLICE):
            records = [r for _, found in spans[at : at + SLICE] for r in found]
            await self._let_go([r for r in records if r.tiers and r in self._left])

    async def _let_go(self, records: Sequence[ObjectRecord]) -> None:
        if not records:
            return
        for record in records:
            del self._left[record]
        self._batches += 1
        await to_the_end(self._planner.scattered(records, self._lease))

    def need(self, records: Sequence[ObjectRecord]) -> None:
        """See ``loads.Room``."""
        missing = [record for record in records if record not in self._left]
        if missing:
            self._planner.pin(missing)
            self._left |= dict.fromkeys(missing)

    async def give_up(self, records: Sequence[ObjectRecord]) -> bool:
        """See ``loads.Room``."""
        given = [r for r in records if r in self._left and r.host is HostState.READY and r.tiers]
        await self._let_go(given)
        return bool(given)

    def closing(self) -> Steps[None]:
        """Let go of the rest: finish it in any case."""
        left = [*self._left]
        self._left.clear()
        yield from self._planner.unpinning(left)
        if self._batches > 1:
            yield from self._planner.in_order(self.match.path())


def _start(span: Span) -> int:
    return span.start


def _stop(span: Span) -> int:
    return span.stop
