"""Demotion: making room in host memory before a store needs it, in the background."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvlayer._steps import SLICE
from kvlayer.runtime.turns import in_turns
from kvlayer.tier.guard.guard import Refused
from kvlayer.tier.planner.demotion_step import DemotionTargets, PendingWrite
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.tier import LowerTier, Tier
from kvlayer.tier.transfer.spills import Spills, Write

__all__ = ["Demotion"]

_log = logging.getLogger(__name__)
_AT_ONCE = 8  # objects written together: loads wait their turn behind them
_SHARE = 8  # of host memory that a store which waits for room has emptied at a time


class Demotion:
    """Keeps the use of host memory between two watermarks, as fractions of its capacity.

    A round begins when use has grown past ``high`` and drops what lower tiers hold, in the policy's
    order, until ``low`` is reached. What a tier with ``write = "demote"`` lacks is written to it
    first. A write that is refused or fails ends the round; the next growth begins another. What no
    tier takes is left to the stores that need its room.

    What it writes is held meanwhile: at most what lies above ``low``, however long a tier hangs.
    """

    def __init__(
        self,
        planner: Planner,
        spills: Spills,
        host: Tier,
        lower: Sequence[LowerTier],
        *,
        high: float,
        low: float,
    ) -> None:
        capacity = planner.host.extents.capacity
        self._planner = planner
        self._spills = spills
        self._host = host
        self._lower = {tier.index: tier for tier in lower}
        self._high, self._low = int(capacity * high), int(capacity * low)
        self.outlets = DemotionTargets(
            demote=_bits(tier for tier in lower if tier.write == "demote"),
            others=_bits(tier for tier in lower if tier.write in ("through", "back")),
            whole_only=_bits(tier for tier in lower if not tier.tails),
            tokens_per_chunk=planner.tokens_per_chunk,
        )
        """Which tiers have to get an object before it may go."""
        self._round: asyncio.Task[None] | None = None
        self._is_closed = False

    def lacks(self, record: ObjectRecord) -> bool:
        """Whether a tier is still to get an object."""
        return bool(self.outlets.wanted(record))

    def grown(self) -> None:
        """Host memory may be fuller than before: begin a round if it is too full."""
        if self._round is not None or self._is_closed or not self._lower:
            return
        if self._planner.host.extents.used > self._high:
            self._begin(self._low)

    def _begin(self, keep_nbytes: int) -> None:
        with self._host.emit.within(0):  # nobody's request: it goes on when that has ended
            self._round = asyncio.get_running_loop().create_task(self._run(keep_nbytes))
        self._round.add_done_callback(self._ended)

    async def make_room(self) -> bool:
        """Where tiers are written only when objects leave: write some now; whether room came.

        For a store that waits for room. A round that runs already is waited for.
        """
        extents = self._planner.host.extents
        if not self.outlets.demote or self._is_closed:
            return False
        used = extents.used
        if self._round is None:
            self._begin(used - extents.capacity // _SHARE)
        await self.settled()
        return extents.used < used

    async def settled(self) -> None:
        """Wait until the round that runs now, if any, has ended."""
        if self._round is not None:
            await asyncio.wait({self._round})

    async def drain(self) -> None:
        """Write all of host memory to the tiers that are written only when an object leaves it.

        For the end of the process, root before leaf; nothing is dropped. A tier that refuses or
        fails gets no more.
        """
        await self.settled()  # or a tier could seem full because of it
        outlets, given_up = replace(self.outlets, others=0), 0
        resident, waiting = await in_turns(self._planner.resident()), deque[PendingWrite]()
        for at, record in enumerate(resident):
            if at and not at % SLICE:
                await asyncio.sleep(0)
            if record.host is HostState.READY and (wanted := outlets.wanted(record)):
                waiting.append((record, wanted))
        while waiting:
            batch = [waiting.popleft() for _ in range(min(_AT_ONCE, len(waiting)))]
            failed, untried = await self._send([(r, wanted & ~given_up) for r, wanted in batch])
            given_up |= failed
            waiting.extendleft(reversed(untried))

    async def aclose(self) -> None:
        """Stop the round. What it was writing stays held until each write has really ended."""
        self._is_closed = True
        if self._round is not None:
            self._round.cancel()
            await self.settled()

    async def _run(self, keep_nbytes: int) -> None:
        is_going = True
        while is_going:  # every step but the last drops something, so a round ends
            step = self._planner.plan_leaving(keep_nbytes, self.outlets, _AT_ONCE)
            self._host.demotes(step.dropped)
            try:
                failed, _ = await self._send(step.writes)
            finally:
                gone = self._planner.end_leaving(step.writes)
                self._host.demotes(gone)
            is_going = not failed and bool(step.dropped or gone)
            await asyncio.sleep(0)

    def _ended(self, ended: asyncio.Task[None]) -> None:
        self._round = None
        if not ended.cancelled() and (error := ended.exception()) is not None:
            # A policy of somebody else's may raise: room is then made by the stores that need it.
            _log.error("demotion from host memory failed", exc_info=error)

    async def _send(self, ways: Sequence[PendingWrite]) -> tuple[int, list[PendingWrite]]:
        """Write objects to the tiers they lack, as many as these admit at once.

        The tiers that failed, or admit none, as bits; and what was not tried for want of room.
        """
        failed = 0
        started: list[Write] = []
        untried: dict[ObjectRecord, int] = {}
        for tier in self._lower.values():
            bit = 1 << tier.index
            mine = [record for record, wanted in ways if wanted & bit]
            for at, record in enumerate(mine):
                try:
                    write = self._spills.demote(tier, record)
                except Refused as no:
                    if not at:
                        tier.refused(no.cause)
                        failed |= bit
                    else:
                        untried |= {rest: untried.get(rest, 0) | bit for rest in mine[at:]}
                    break
                if write is not None:
                    started.append(write)
        late = {failure.tier for failure in await self._spills.committed(started)}
        failed |= _bits(tier for tier in self._lower.values() if tier.name in late)
        return failed, list(untried.items())


def _bits(tiers: Iterable[LowerTier]) -> int:
    return sum(1 << tier.index for tier in tiers)
