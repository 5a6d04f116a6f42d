"""The stack runs plans: the Planner decides, Device and Objects move; this is the list of steps."""

from __future__ import annotations

import asyncio
import logging
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from kvlayer._steps import SLICE, Steps
from kvlayer.abc.stager import Landed
from kvlayer.identity.keys import ChunkChain, ObjectKey, Span
from kvlayer.layout import HitRule, KVView
from kvlayer.patience import Patience
from kvlayer.results import Cause, Failure, RetrieveReport
from kvlayer.runtime.foreign import Foreign, words
from kvlayer.runtime.turns import in_turns, soon, to_the_end
from kvlayer.tier.epochs import EpochOver, Epochs
from kvlayer.tier.guard.estimate import Rate
from kvlayer.tier.messages import Outcome, Piece
from kvlayer.tier.planner import plan
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import REBOUND, Planner
from kvlayer.tier.planner.records import ObjectRecord
from kvlayer.tier.storing import Stored, Storing, has_slots, moved
from kvlayer.tier.tier import LowerTier, Tier
from kvlayer.tier.transfer.demotion import Demotion
from kvlayer.tier.transfer.device import Device
from kvlayer.tier.transfer.finder import Finder
from kvlayer.tier.transfer.listing import listed
from kvlayer.tier.transfer.loads import Loads, Wanted
from kvlayer.tier.transfer.objects import Objects
from kvlayer.tier.transfer.reading import Reading
from kvlayer.tier.transfer.spills import Spills

__all__ = ["Stack", "Window"]

_log = logging.getLogger(__name__)

_NOTED = 100  # listed objects noted in one turn of the loop: some 10 us each
_SLICE = 32  # objects named in one turn of the loop: some 4 us each
_UNTOLD = 64  # paths whose use a tier is told of when it has been written; the latest


@dataclass(frozen=True, slots=True)
class Window:
    """The tokens ``[start, stop)`` of a prompt that a view covers."""

    start: int
    stop: int


class Stack:
    """All tiers of one cache, on one event loop."""

    def __init__(
        self,
        planner: Planner,
        device: Device,
        objects: Objects,
        host: Tier,
        lower: Sequence[LowerTier],
        *,
        foreign: Foreign | None = None,
        clock: Callable[[], float],
        prefill: Rate | None = None,
        high_watermark: float = 1.0,
        low_watermark: float = 1.0,
        epochs: Epochs | None = None,
    ) -> None:
        self.planner = planner
        self.epochs = epochs or Epochs()
        """What runs, by epoch."""
        self.device = device
        self.objects = objects
        self.host = host
        self.lower = tuple(lower)
        self.prefill = prefill or Rate()
        """How fast the engine recomputes what is not loaded."""
        self.foreign = foreign or Foreign()
        """What calling other people's code has cost."""
        self.clock = clock
        self.loads = Loads(planner, objects, host, lower, clock=clock, evicted=self.evicted)
        self.finder = Finder(planner, objects, self.loads, lower, prefill=self.prefill, clock=clock)
        self.spills = Spills(planner, objects, lower)
        self.demotion = Demotion(
            planner, self.spills, host, lower, high=high_watermark, low=low_watermark
        )
        self.loads.spares = self.demotion.lacks
        native = (g.tokens_per_block for g in planner.layout.groups if g.form != "canonical")
        self._native_step = math.lcm(*native)
        """Native payloads move in whole blocks; 1 where there are none."""
        self._recoveries: list[asyncio.Task[None]] = []
        self._untold = {tier.index: deque[Sequence[ObjectRecord]](maxlen=_UNTOLD) for tier in lower}
        """Paths that were used while a tier was being written to."""
        self.spills.on_written = self._all_written

    @property
    def inflight(self) -> int:
        """Calls to lower tiers that run or wait their turn."""
        return sum(tier.guard.inflight for tier in self.lower)

    # -- store -----------------------------------------------------------------------------------

    async def store(
        self,
        chain: ChunkChain,
        view: KVView,
        window: Window,
        *,
        tail: bool,
        on_gathered: Callable[[], None] | None = None,
        patience: Patience | None = None,
    ) -> Stored:
        """Gather what is missing, serve it, and send it down. See ``Cache.store``."""
        storing = Storing(
            self, chain, view, window.start, patience=patience or Patience(0.0), tail=tail
        )
        return await storing.run(on_gathered)

    # -- retrieve --------------------------------------------------------------------------------

    async def retrieve(
        self,
        match: Match,
        view: KVView,
        window: Window,
        *,
        deadline: float | None = None,
        landed: Landed | None = None,
        lease: Lease | None = None,
        on_claimed: Callable[[Match], Steps[None]] | None = None,
    ) -> RetrieveReport:
        """Bring a match up and scatter it, in prompt order. See ``Cache.retrieve``.

        ``lease`` holds it, or did: what is still usable is claimed, and ``on_claimed`` told of it
        before anything moves. Without one the caller holds it.
        """
        if landed is not None:
            landed = _Told(self.foreign, landed)
        claimed, match = await in_turns(self.planner.claiming(match, lease, window.stop))
        reading = Reading(self.planner, match, lease)
        stop = min(match.tokens, window.stop)
        bound = Window(window.start, stop - stop % self._native_step)
        trouble: list[Failure] = []
        done = 0
        try:
            if on_claimed is not None:
                await in_turns(on_claimed(claimed))
            if not self._has_place(view, window, bound):
                return self._no_place(match, bound)
            wanted = await reading.within(bound.start, bound.stop)
            until = await in_turns(self.finder.budget(wanted, deadline))
            arriving = self.loads.arrive(wanted, trouble, until, room=reading)
            with self.epochs.within(match.chain.epoch):
                async with aclosing(arriving) as arrivals:
                    async for batch in arrivals:
                        pieces = await in_turns(_pieces(batch))
                        is_last = done + len(batch) == len(wanted)  # layers are complete only then
                        scatter = self.device.scatter(
                            view, pieces, bound.start, bound.stop, landed if is_last else None
                        )
                        missed = await moved(scatter, pieces)
                        whole = len(batch)
                        if missed:
                            whole = _before(batch, missed, self.host.name, trouble)
                        done += whole
                        self.host.hits += len(pieces)
                        self.host.loaded_nbytes += sum(piece.nbytes for piece in pieces)
                        if whole < len(batch):
                            break
                        await reading.scattered(batch, bound.stop)
        except EpochOver:
            return self._rebound(match, bound)
        finally:
            try:
                await to_the_end(reading.closing())
            finally:
                self.demotion.grown()
        self.touch(match.path())
        if done == len(wanted):
            return RetrieveReport(max(bound.stop, bound.start))
        return RetrieveReport(self._usable(match, wanted[0][0], done, bound), tuple(trouble))

    def _rebound(self, match: Match, bound: Window) -> RetrieveReport:
        """Nothing of a match is served: its epoch is over."""
        return self._nothing(match, bound, Cause.REBOUND, REBOUND)

    def _nothing(self, match: Match, bound: Window, cause: Cause, detail: str) -> RetrieveReport:
        """The report of a load that brings nothing, from the first span on that it was to bring."""
        at = bisect_right(match.spans, bound.start, key=lambda span: span.stop)
        lost = [span for span in match.spans[at : at + 1] if span.start < bound.stop]
        self.host.refused(cause)
        failed = tuple(Failure(span, cause, self.host.name, detail) for span in lost)
        return RetrieveReport(bound.start, failed)

    def _has_place(self, view: KVView, window: Window, bound: Window) -> bool:
        """Whether a view has all the slots that a hit of ``bound.stop`` tokens needs.

        Of windows and states it may have only those that a longer hit needs, found before.
        """
        if bound.start >= bound.stop:
            return True
        for g, layout in enumerate(self.planner.layout.groups):
            first = layout.group.first_needed(bound.stop)
            if layout.group.hit_rule is HitRule.EVERY_CHUNK or first >= bound.stop:
                continue
            at = max(first, bound.start) - window.start
            if not has_slots(view, g, at, bound.stop - window.start):
                return False
        return True

    def _no_place(self, match: Match, bound: Window) -> RetrieveReport:
        """Nothing of a match is loaded: the view was made for a longer one."""
        detail = (
            f"what is left of the hit ends at token {bound.stop}, and the view has no slots for "
            "the window or the state there"
        )
        return self._nothing(match, bound, Cause.VANISHED, detail)

    def _usable(self, match: Match, first: Span, done: int, bound: Window) -> int:
        """Tokens of the correct prefix after ``done`` spans from ``first`` on were scattered."""
        groups = [layout.group for layout in self.planner.layout.groups]
        count = bisect_left(match.spans, first.start, key=lambda span: span.start) + done
        if any(group.hit_rule is not HitRule.EVERY_CHUNK for group in groups):
            count = plan.ending(
                count,
                lambda i: match.spans[i].stop,
                groups,
                lambda i, g: bool(match.covering(i)[g]),
            )
        stop = match.spans[count - 1].stop if count else 0
        return max(min(stop, bound.stop), bound.start)

    async def hold(
        self, chain: ChunkChain, *, owner: str, seconds: float
    ) -> tuple[Lease, RetrieveReport]:
        """Bring a prompt's usable prefix into host memory and lease it for ``seconds``.

        Nothing stays leased when this raises or is cancelled, or the chain's epoch ends.
        """
        try:
            with self.epochs.within(chain.epoch):
                match, lease = await self.finder.lease(
                    chain, owner=owner, seconds=seconds, at_any_price=True, is_holding=True
                )
                held = False
                try:
                    report = await self._promote(match, None, at_any_price=True)
                    held = True
                finally:
                    if not held:
                        await to_the_end(self.planner.releasing(lease.number))
        except EpochOver:
            nothing = Match(chain, [], [])
            lease = self.planner.lease(nothing, owner=owner, seconds=seconds)
            whole = Span(0, chain.num_tokens, b"")
            self.host.refused(Cause.REBOUND)
            failed = Failure(whole, Cause.REBOUND, self.host.name, REBOUND)
            return lease, RetrieveReport(0, (failed,))
        return lease, report

    async def promote(self, match: Match, *, deadline: float | None = None) -> RetrieveReport:
        """Bring a match into host memory; the caller's lease holds it there afterwards.

        It is waited for: a load that has taken as long as computing would is abandoned.
        """
        try:
            with self.epochs.within(match.chain.epoch):
                return await self._promote(match, deadline)
        except EpochOver:
            return self._rebound(match, Window(0, match.tokens))

    async def _promote(
        self, match: Match, deadline: float | None, *, at_any_price: bool = False
    ) -> RetrieveReport:
        trouble: list[Failure] = []
        done = 0
        # Pinned, too: the lease may run out before everything is there.
        match, _ = await in_turns(self.planner.claiming(match, None, match.tokens))
        try:
            until: float | None = None
            if not at_any_price:
                until = await in_turns(self.finder.budget(match.needs, deadline))
            async with aclosing(self.loads.arrive(match.needs, trouble, until)) as arrivals:
                async for batch in arrivals:
                    done += len(batch)
        finally:
            try:
                await to_the_end(self.planner.unpinning([*match.path()]))
            finally:
                self.demotion.grown()
        if not match.spans:
            return RetrieveReport(0)
        tokens = self._usable(match, match.spans[0], done, Window(0, match.tokens))
        return RetrieveReport(tokens, tuple(trouble))

    # -- background ------------------------------------------------------------------------------

    def evicted(self, gone: Sequence[ObjectRecord]) -> None:
        """Tell what had to go, before anything else can happen to the same objects."""
        self.spills.gave_up(gone)
        nbytes = sum(record.nbytes for record in gone)
        self.host.lost(self.planner.host.order.name, [record.key for record in gone], nbytes)

    def touch(self, path: Sequence[ObjectRecord]) -> None:
        """A prompt was used: offer what was not written, keep lower tiers' order of use alive.

        Deepest first, without waiting for it.
        """
        soon(self._touching(path))

    def _touching(self, path: Sequence[ObjectRecord]) -> Steps[None]:
        for at in range(0, len(path), _SLICE):
            self.spills.offer(path[at : at + _SLICE])
            if at + _SLICE < len(path):
                yield
        for tier in self.lower:
            if self.spills.is_writing(tier.index):
                self._untold[tier.index].append(path)
            else:
                yield from self._telling_use(tier, path)

    def _telling_use(self, tier: LowerTier, path: Sequence[ObjectRecord]) -> Steps[None]:
        keys: list[ObjectKey] = []
        for stop in range(len(path), 0, -_SLICE):
            some = reversed(path[max(stop - _SLICE, 0) : stop])
            keys += [record.key for record in some if record.tiers >> tier.index & 1]
            if stop > _SLICE:
                yield
        if keys:
            tier.guard.hint(partial(self._touched, tier.index, keys))

    async def _touched(self, tier: int, keys: Sequence[ObjectKey]) -> None:
        for at in range(0, len(keys), SLICE):
            await self.objects.touch(tier, keys[at : at + SLICE])
            await asyncio.sleep(0)

    def _all_written(self, tier: LowerTier) -> None:
        """A tier has got all it was to get: the paths that lead there are recent, root first."""
        soon(self._telling_all(tier))

    def _telling_all(self, tier: LowerTier) -> Steps[None]:
        paths = self._untold[tier.index]
        while paths:
            path = paths.popleft()
            yield from self._telling_use(tier, path)
            if len(path) > 1:
                yield

    def recover(self, tier: LowerTier, namespace: str) -> None:
        """Start learning what a tier already holds of a namespace."""
        self._recoveries = [task for task in self._recoveries if not task.done()]
        task = asyncio.get_running_loop().create_task(self._recover(tier, namespace))
        task.add_done_callback(partial(_recovery_ended, tier))
        self._recoveries.append(task)

    async def _recover(self, tier: LowerTier, namespace: str) -> None:
        self.planner.listing(tier.index, namespace, started=True)
        try:
            await self._read_listing(tier, namespace)
        finally:
            self.planner.listing(tier.index, namespace, started=False)
        tier.listed[namespace] = None

    async def _read_listing(self, tier: LowerTier, namespace: str) -> None:
        async for batch in listed(tier, namespace):
            for at in range(0, len(batch.keys), _NOTED):
                some = slice(at, at + _NOTED)
                self.planner.note(batch.keys[some], tier.index, batch.copies[some])
                await asyncio.sleep(0)

    async def recovered(self) -> None:
        """Wait until every tier's listing has been read."""
        if self._recoveries:
            await asyncio.wait(self._recoveries)

    async def flush(self, *, drain: bool = False) -> None:
        """Wait until everything started so far has been written or has failed.

        ``drain``: the process ends, so what only leaves host memory now is written first.
        """
        await (self.demotion.drain() if drain else self.demotion.settled())
        await self.spills.flush()

    async def aclose(self, seconds: float | None = None) -> None:
        """Cancel what runs and wait until all lent memory is back.

        A tier that will not let go of it within ``seconds`` keeps it: no slot is handed out then,
        and one line in the log says so.
        """
        self.spills.close()
        await self.demotion.aclose()
        for task in self._recoveries:
            task.cancel()
        await self.recovered()
        for tier in self.lower:
            if stuck := await tier.guard.aclose(seconds):
                self.planner.retire()
                _log.warning(
                    "%d calls to %s did not end within %g s of being cancelled: what they were "
                    "lent is not used again",
                    stuck,
                    tier.name,
                    seconds,
                )


class _Told:
    """Whoever is told of layers: not any more, once it has raised."""

    def __init__(self, foreign: Foreign, landed: Landed) -> None:
        self._foreign = foreign
        self._landed: Landed | None = landed

    def __call__(self, group: int, layer: int) -> None:
        if self._landed is not None and not self._foreign.call(
            "on_layer", self._landed, group, layer
        ):
            self._landed = None


def _pieces(batch: Wanted) -> Steps[list[Piece]]:
    pieces: list[Piece] = []
    for at, (span, records) in enumerate(batch):
        if at and not at % _SLICE:
            yield
        pieces += [
            Piece(record.key, span.start, span.tokens, record.offset, record.nbytes)
            for record in records
        ]
    return pieces


def _before(batch: Wanted, missed: Sequence[Outcome], tier: str, trouble: list[Failure]) -> int:
    """How many spans of a batch come before the first that was not scattered whole."""
    causes = {outcome.key: outcome for outcome in missed}
    for count, (span, records) in enumerate(batch):
        for record in records:
            _, cause, detail, *_ = causes.get(record.key, (None, None, ""))
            if cause is not None:
                trouble.append(Failure(span, cause, tier, detail))
                return count
    return len(batch)


def _recovery_ended(tier: LowerTier, task: asyncio.Task[None]) -> None:
    """A listing that failed costs nothing but questions: lookups go on asking the tier."""
    if not task.cancelled() and (error := task.exception()) is not None:
        tier.complains(Cause.TIER_DOWN, words(error))
