"""One store, run: plan what fits, gather it, send it down, wait for room, go on with the rest.

It waits only while it holds nothing: what it gathered is served and queued for the tiers by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from kvlayer.errors import ClosedError
from kvlayer.identity.keys import ChunkChain, Span
from kvlayer.layout import AttentionKind, KVView
from kvlayer.patience import Patience
from kvlayer.results import Cause, Failure, StoreReport
from kvlayer.runtime.foreign import awaited
from kvlayer.runtime.turns import in_turns, to_the_end
from kvlayer.tier.epochs import EpochOver
from kvlayer.tier.guard.guard import Lane
from kvlayer.tier.messages import Outcome, Piece
from kvlayer.tier.planner.planner import REBOUND, Keeps, Reservation, StorePlan
from kvlayer.tier.planner.promises import Promise
from kvlayer.tier.planner.records import ObjectRecord
from kvlayer.tier.planner.store_planner import spans_to_store
from kvlayer.tier.transfer.loads import down
from kvlayer.tier.transfer.promised import settled
from kvlayer.tier.transfer.spills import Write

if TYPE_CHECKING:
    from kvlayer.tier.stack import Stack

__all__ = ["Stored", "Storing", "has_slots", "moved"]

_SLICE = 6  # spans planned per turn of the loop: some 20 us each, or 70 where others must go
_PART = 32  # spans gathered at once: others stage in between
_VAIN = 3  # waits for room in a row that bring none: no tier takes what host memory keeps for it


@dataclass(slots=True)
class Stored:
    """What came of a store. ``spans`` were gathered, in prompt order; ``nbytes`` of payload."""

    spans: list[Span] = field(default_factory=list[Span])
    skipped: dict[Span, None] = field(default_factory=dict[Span, None])
    dropped: list[Span] = field(default_factory=list[Span])
    failed: list[Failure] = field(default_factory=list[Failure])
    nbytes: int = 0

    def report(self) -> StoreReport:
        """As its caller sees it."""
        counts = len(self.spans), len(self.skipped), len(self.dropped)
        return StoreReport(*counts, tuple(self.failed))


class Storing:
    """The store of one prompt, as far as ``view`` covers it from token ``start`` on."""

    def __init__(
        self,
        stack: Stack,
        chain: ChunkChain,
        view: KVView,
        start: int,
        *,
        patience: Patience,
        tail: bool,
    ) -> None:
        self._stack = stack
        self._planner = stack.planner
        self._chain = chain
        self._view = view
        self._start = start
        self._patience = patience
        self._tail = tail
        kinds = [held.group.kind for held in stack.planner.layout.groups]
        self._holds = partial(_holds, view, start, kinds)
        self._writes: list[Write] = []
        """Those a tier with ``write = "through"`` is to commit."""
        self._stored = Stored()
        self._spans: set[Span] = set()
        """Those that were gathered."""
        self._has_told = False
        """Whoever lent the view knows that it is free."""
        self._vain = 0
        """Waits in a row in which writes ended and no tier had taken anything."""
        self._seen = 0
        """Objects that tiers had taken when it was last planned: what came since is news."""

    async def run(self, on_gathered: Callable[[], None] | None) -> Stored:
        """Store it all, or as much as there is room for. ``on_gathered``: the view is free."""
        path: list[ObjectRecord] = []
        try:
            with self._stack.epochs.within(self._chain.epoch):
                path = await self._all(on_gathered)
        except EpochOver:
            self._stop(on_gathered)
        self._stored.failed += await self._stack.spills.committed(self._writes)
        self._stack.touch(path)
        return self._stored

    # -- steps -----------------------------------------------------------------------------------

    async def _all(self, on_gathered: Callable[[], None] | None) -> list[ObjectRecord]:
        """Gather and queue all of it; the prompt's objects."""
        spans = spans_to_store(self._chain, self._start, tail=self._tail)
        todo = await self._plan(spans, self._keeps())
        path = await self._gather(todo, on_gathered)
        while rest := self._rest(todo):
            await self._settled(todo.joined)
            keeps = todo.keeps
            if todo.is_blocked:
                keeps = self._keeps() if await self._room() else None
            todo = await self._plan([rest], keeps, is_rest=True)
            path = await self._gather(todo, on_gathered)
        return path

    def _stop(self, on_gathered: Callable[[], None] | None) -> None:
        """Its epoch is over: what was not gathered before is not stored any more."""
        stored, host = self._stored, self._stack.host
        told = {*stored.spans, *stored.skipped, *stored.dropped}
        told.update(failure.span for failure in stored.failed)
        spans = spans_to_store(self._chain, self._start, tail=self._tail)
        lost = [span for some in spans for span in some if span not in told]
        stored.failed += [Failure(span, Cause.REBOUND, host.name, REBOUND) for span in lost]
        host.misses[Cause.REBOUND] += len(lost)
        if on_gathered is not None and not self._has_told:
            self._stack.foreign.call("on_gathered", on_gathered)

    async def _plan(
        self, spans: Iterable[Sequence[Span]], keeps: Keeps | None, *, is_rest: bool = False
    ) -> StorePlan:
        """Plan the first of ``spans``, which come in slices. What is planned is to be gathered."""
        todo = StorePlan(self._chain, self._holds, keeps, down(self._stack.lower))
        steps = self._planner.planning(todo, spans, _SLICE, is_rest=is_rest)
        self._seen = self._taken()
        try:
            await in_turns(steps)
        finally:
            self._stack.evicted(_taken(todo))  # also what a planning that raised had given up
        return todo

    async def _gather(
        self, todo: StorePlan, on_gathered: Callable[[], None] | None
    ) -> list[ObjectRecord]:
        """Plan what fits and gather it, part by part; the prompt's objects so far.

        What was gathered is served and queued for the tiers, and held until all of it is.
        """
        done: list[Reservation] = []
        is_gathered = False
        try:
            while await self._part(todo, done, on_gathered):
                todo.part_done()
            is_gathered = True
            return await to_the_end(self._planner.settling(self._chain, done))
        finally:
            if not is_gathered:
                todo.part_done()
                self._planner.gathered(todo, None)  # it may still hold the prefix
                self._planner.settle(self._chain, done)
            self._stack.demotion.grown()

    async def _part(
        self,
        todo: StorePlan,
        done: list[Reservation],
        on_gathered: Callable[[], None] | None,
    ) -> bool:
        """Plan and gather the next part of a plan, appended to ``done``; whether there is more."""
        stack, planner = self._stack, self._planner
        missed: Sequence[Outcome] | None = None
        try:
            while not todo.is_planned and todo.planned < _PART:
                await asyncio.sleep(0)
                self._seen = self._taken()
                await in_turns(planner.planning_more(todo, _SLICE))
                stack.evicted(_taken(todo))
            pieces = [slot.piece for slot in todo.gathers]
            if len(pieces) > _SLICE:
                await asyncio.sleep(0)
            missed = (  # stays None when cancelled: then nothing was gathered
                await moved(stack.device.gather(self._view, pieces, self._start), pieces)
                if pieces
                else ()
            )
        finally:
            failed = planner.gathered(todo, missed)
            stack.evicted(_taken(todo))  # what a planning that raised had given up
            done += todo.gathers
        if len(todo.gathers) > _SLICE:
            await asyncio.sleep(0)
        self._count(todo, failed)
        goes_on = not todo.is_planned
        if on_gathered is not None and not goes_on and not self._rest(todo):
            self._has_told = True
            stack.foreign.call("on_gathered", on_gathered)
        if len(todo.gathers) > _SLICE:
            await asyncio.sleep(0)
        moves = [(slot.span, slot.record) for slot in todo.gathers]
        moves += [(span, record) for span, records in todo.skipped for record in records]
        self._writes += await stack.spills.start(moves, self._stored.failed)
        return goes_on

    def _count(self, todo: StorePlan, failed: Sequence[Failure]) -> None:
        stored, host = self._stored, self._stack.host
        if failed:  # what comes after it is useless alone
            todo.dropped += todo.unplanned
            todo.unplanned.clear()
            todo.joined.clear()
        stored.failed += failed
        stored.spans += [span for span in todo.spans if span not in self._spans]
        self._spans.update(todo.spans)
        stored.skipped |= dict.fromkeys(s for s, _ in todo.skipped if s not in self._spans)
        stored.dropped += todo.dropped
        nbytes = sum(slot.piece.nbytes for slot in todo.gathers)
        stored.nbytes += nbytes
        host.gathers([slot.record.key for slot in todo.gathers], nbytes)
        if todo.dropped:
            host.misses[Cause.NO_ROOM] += len(todo.dropped)

    @staticmethod
    def _rest(todo: StorePlan) -> list[Span]:
        """What is to be planned again: what had no room, and what others were storing."""
        if not todo.joined:
            return [*todo.unplanned]
        joined = (span for span, _ in todo.joined)
        return sorted({*joined, *todo.unplanned}, key=lambda span: span.start)

    async def _settled(self, joined: Iterable[tuple[Span, Promise]]) -> None:
        """Wait until others have stored what they were storing, or have failed to."""
        for span, promise in joined:
            await settled(promise, span.hash, promise.until - self._now())

    # -- room ------------------------------------------------------------------------------------

    def _keeps(self) -> Keeps | None:
        """What must not make room: what tiers that take writes have still to get."""
        outlets = self._stack.demotion.outlets
        taking = sum(
            1 << tier.index
            for tier in self._stack.lower
            if tier.write != "never" and not tier.guard.is_down(Lane.WRITES)
        )
        if not taking or not self._patience.left(self._now()):
            return None
        return lambda record: bool(outlets.wanted(record) & taking)

    async def _room(self) -> bool:
        """Wait until tiers have written something; False where nothing would make room."""
        return await self._patience.wait(asyncio.ensure_future(self._news()), self._now())

    async def _news(self) -> bool:
        """Whether some writes have ended: several where they come fast, or planning would cost."""
        spills, demotion = self._stack.spills, self._stack.demotion
        taken = self._taken()
        if taken > self._seen:  # since it was planned, and before anybody waited for it
            self._vain = 0
            return True
        has_news = has_room = await demotion.make_room()
        for _ in range(_SLICE):
            if not spills.is_busy or not await spills.change():
                break
            has_news = True
        # A tier that refuses what it is offered is offered it again by the next planning.
        self._vain = 0 if has_room or self._taken() > taken else self._vain + 1
        return has_news and self._vain < _VAIN

    def _taken(self) -> int:
        """How many objects lower tiers have taken so far."""
        return sum(tier.stored for tier in self._stack.lower)

    def _now(self) -> float:
        return self._stack.clock()


def _taken(todo: StorePlan) -> list[ObjectRecord]:
    """What a plan had to evict, once."""
    gone, todo.evicted = todo.evicted, []
    return gone


async def moved(move: Awaitable[Sequence[Outcome]], pieces: Sequence[Piece]) -> Sequence[Outcome]:
    """What a move missed, which is everything when the cache is closed meanwhile."""
    try:
        return await awaited(lambda: move)
    except ClosedError as exc:
        return [Outcome(piece.key, Cause.BUSY, str(exc)) for piece in pieces]


def _holds(
    view: KVView, view_start: int, kinds: Sequence[AttentionKind], group: int, span: Span
) -> bool:
    """Whether the engine still has what this group keeps of the span (no slot is -1).

    That is every token, or the state after the last one.
    """
    first = span.stop - 1 if kinds[group] is AttentionKind.STATE else span.start
    return has_slots(view, group, first - view_start, span.stop - view_start)


def has_slots(view: KVView, group: int, first: int, stop: int) -> bool:
    """Whether a view has a slot for each of its tokens ``first .. stop``, which are some."""
    slots = view.slots[group][first:stop]
    return int(slots.min() if hasattr(slots, "min") else min(slots)) >= 0
