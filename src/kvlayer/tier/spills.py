"""Sending objects down from host memory to the tiers that are written to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

from kvlayer.keys import ObjectKey, Span
from kvlayer.results import Cause, Failure
from kvlayer.tier.directory import ObjectRecord
from kvlayer.tier.flight import outcome_of
from kvlayer.tier.guard import Call, Lane, Refused
from kvlayer.tier.messages import Outcome
from kvlayer.tier.objects import Objects
from kvlayer.tier.planner import Planner
from kvlayer.tier.tier import LowerTier

__all__ = ["Spills", "Write"]

_AT_ONCE = 2  # writes begun per turn of the loop: with its first steps each takes some 0.5 ms


class Write(NamedTuple):
    """One object on its way down to one tier."""

    span: Span
    key: ObjectKey
    tier: LowerTier
    call: Call[Outcome]


class Spills:
    """Runs writes to the lower tiers; each holds its object in host memory until it ends."""

    def __init__(self, planner: Planner, objects: Objects, lower: Sequence[LowerTier]) -> None:
        self._planner = planner
        self._objects = objects
        self._lower = [tier for tier in lower if tier.write != "never"]
        self._running: dict[tuple[int, ObjectKey], Call[Outcome]] = {}
        """By tier and object: an object is on its way to a tier at most once."""

    async def start(
        self, moves: Sequence[tuple[Span, ObjectRecord]], refused: list[Failure]
    ) -> list[Write]:
        """Start writing objects wherever they are missing; returns the writes of "through" tiers.

        Tiers that are written only by :meth:`demote` are passed over.

        What another store is writing there already is among them.

        What a tier refuses, because too much is in flight or it is down, is dropped there and
        listed in ``refused``. A few are started per turn of the loop; cancelled in between, it
        leaves those it has started to run.
        """
        through: list[Write] = []
        started = 0
        for tier in self._lower:
            if tier.write == "demote":
                continue
            for span, record in moves:
                if not tier.tails and span.tokens < self._planner.tokens_per_chunk:
                    continue
                try:
                    call = self._spill(tier, span, record)
                except Refused as no:
                    tier.refused(no.cause)
                    refused.append(Failure(span, no.cause, tier.name, no.detail))
                    continue
                started += call is not None
                if started == _AT_ONCE:
                    started = 0
                    await asyncio.sleep(0)
                if call is not None and tier.write == "through":
                    through.append(Write(span, record.key, tier, call))
        return through

    def demote(self, tier: LowerTier, record: ObjectRecord) -> Write | None:
        """Start writing one object of host memory to a tier, or join the write that runs already.

        None when the tier has it. Raises :class:`Refused`, which is the caller's to count.
        """
        span = record.chunk.span
        assert span is not None, record.key  # its bytes are in host memory
        call = self._spill(tier, span, record)
        return None if call is None else Write(span, record.key, tier, call)

    def _spill(self, tier: LowerTier, span: Span, record: ObjectRecord) -> Call[Outcome] | None:
        piece = self._planner.plan_spill(span, record, tier.index)
        if piece is None:
            return self._running.get((tier.index, record.key))
        try:
            call = tier.guard.start(
                partial(self._objects.put, tier.index, piece),
                partial(self._ended, tier, record),
                lane=Lane.WRITES,
                nbytes=piece.nbytes,
            )
        except Refused:
            self._planner.spilled(record, tier.index, ok=False)
            raise
        self._running[tier.index, record.key] = call
        return call

    def _ended(self, tier: LowerTier, record: ObjectRecord, call: Call[Outcome]) -> None:
        self._running.pop((tier.index, record.key), None)
        outcome = outcome_of(call, record.key)
        self._planner.spilled(record, tier.index, ok=outcome.ok)
        tier.transferred("store", outcome, call)

    async def committed(self, through: Sequence[Write]) -> list[Failure]:
        """Wait for "through" writes; a deadline is paid once, not per object or tier."""
        writes = [[w for w in through if w.tier is tier] for tier in self._lower]
        failed = await asyncio.gather(*(self._committed(some) for some in writes if some))
        return list(chain.from_iterable(failed))

    async def _committed(self, writes: Sequence[Write]) -> list[Failure]:
        """Wait for writes to one tier."""
        failed: list[Failure] = []
        is_late = False
        for span, key, tier, call in writes:
            if call.has_ended or (not is_late and await tier.guard.wait(call)):
                outcome = outcome_of(call, key)
                if outcome.cause is not None:
                    failed.append(Failure(span, outcome.cause, tier.name, outcome.detail))
                continue
            if not is_late:
                tier.fails(Cause.DEADLINE, "not written in time", Lane.WRITES)
            is_late = True
            failed.append(Failure(span, Cause.DEADLINE, tier.name, "not written yet"))
        return failed

    async def flush(self) -> None:
        """Wait until everything started so far has been written or has failed.

        A tier that ends no write for as long as its deadline has failed; its writes go on.
        """
        running = list(self._running.items())
        mine = [[call for (at, _), call in running if at == tier.index] for tier in self._lower]
        await asyncio.gather(*map(_settle, self._lower, mine))


async def _settle(tier: LowerTier, writes: Sequence[Call[Outcome]]) -> None:
    if await tier.guard.settle(writes):
        tier.fails(Cause.DEADLINE, f"not written within {tier.guard.deadline} s", Lane.WRITES)
