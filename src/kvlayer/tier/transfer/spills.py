"""Sending objects down from host memory to the tiers that are written to.

A tier takes what it can; the rest stays queued in the order it came, root before leaf. What is
queued is held by nobody: it is dropped, and counted, when host memory itself must be given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from kvlayer._steps import SLICE, Steps
from kvlayer.identity.keys import ObjectKey, Span
from kvlayer.results import Cause, Failure
from kvlayer.tier.guard.guard import Lane, Refused, TierCall
from kvlayer.tier.messages import Outcome
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.tier import LowerTier
from kvlayer.tier.transfer.flight import outcome_of
from kvlayer.tier.transfer.objects import Objects
from kvlayer.tier.transfer.writes import Unwritten, Write, WriteQueue

__all__ = ["Spills", "Unwritten", "Write"]

_AT_ONCE = 8  # writes begun per turn of the loop, to travel together: some 0.1 ms each
_SLACK = 64  # writes of what has gone already that are not worth clearing up


class Spills:
    """Runs writes to the lower tiers; each holds its object in host memory while it runs."""

    def __init__(self, planner: Planner, objects: Objects, lower: Sequence[LowerTier]) -> None:
        self._planner = planner
        self._objects = objects
        self._lower = [tier for tier in lower if tier.write != "never"]
        self._queues = {tier.index: WriteQueue(tier) for tier in self._lower}
        self._is_closed = False
        self.on_written: Callable[[LowerTier], None] | None = None
        """Told when a tier has got all it was to get."""
        for queue in self._queues.values():
            queue.tier.guard.on_freed = partial(self._pump, queue)
            queue.tier.on_opened = queue.changed

    # -- queueing --------------------------------------------------------------------------------

    async def start(
        self, moves: Sequence[tuple[Span, ObjectRecord]], refused: list[Failure]
    ) -> list[Write]:
        """Queue objects for the tiers that lack them; returns the writes of "through" tiers.

        Tiers that are written only by :meth:`demote` are passed over. What another store is
        writing there already is among them. What a tier that is down will not take for now stays
        queued; where nobody would wait for it, it is listed in ``refused``. Cancelled, it leaves
        what it has queued to be written.
        """
        through: list[Write] = []
        for tier in self._lower:
            if tier.write == "demote":
                continue
            queue, is_down = self._queues[tier.index], tier.guard.is_down(Lane.WRITES)
            for span, record in moves:
                write = self._enqueue(queue, span, record)
                if write is None:
                    continue
                if tier.write == "through":
                    through.append(write)
                elif is_down and not write.is_running:
                    tier.refused(Cause.TIER_DOWN)
                    refused.append(Failure(span, Cause.TIER_DOWN, tier.name, _down(tier)))
            self._pump(queue)
            await asyncio.sleep(0)
        return through

    def offer(self, path: Iterable[ObjectRecord]) -> None:
        """A prompt is used: what a tier failed to write of it, or no tier has, is tried again."""
        for tier in self._lower:
            if tier.write == "demote":
                continue
            queue, bit = self._queues[tier.index], 1 << tier.index
            for record in path:
                if record.host is not HostState.READY or (record.tiers | record.writing) & bit:
                    continue
                has_failed = tier.has_failed(Lane.WRITES, record.key)
                if has_failed is None:
                    continue  # several times in a row: whoever stores it again may try
                if (has_failed or not record.tiers) and record.chunk.span is not None:
                    self._enqueue(queue, record.chunk.span, record)
            self._pump(queue)

    def _enqueue(self, queue: WriteQueue, span: Span, record: ObjectRecord) -> Write | None:
        """The write that brings the object there; None when the tier has it, or takes no tails."""
        tier = queue.tier
        if not tier.tails and span.tokens < self._planner.tokens_per_chunk:
            return None
        write = queue.find(record.key)
        if write is not None and write.record is not record and not write.is_running:
            self.gave_up((write.record,))  # its bytes have gone, and these have come since
            write = None
        if write is None and not record.tiers >> tier.index & 1:
            if len(queue.waiting) > 2 * len(self._planner.host) + _SLACK:
                self.gave_up([w.record for w in queue.waiting.values() if w.is_lost])
            queue.count += 1
            write = queue.waiting[record.key] = Write(span, record, tier, queue.count)
        return write

    def demote(self, tier: LowerTier, record: ObjectRecord) -> Write | None:
        """Start writing one object of host memory to a tier, or join the write that runs already.

        None when the tier has it. Raises :class:`Refused`, which is the caller's to count.
        """
        span = record.chunk.span
        assert span is not None, record.key  # its bytes are in host memory
        queue = self._queues[tier.index]
        write = queue.running.get(record.key)
        if write is None and not record.tiers >> tier.index & 1:
            write = queue.waiting.get(record.key) or Write(span, record, tier)
            self._begin(queue, write)
        return write

    def gave_up(self, records: Iterable[ObjectRecord]) -> None:
        """Host memory needed the room of these objects: what is not written of them is dropped."""
        for record in records:
            for queue in self._queues.values():
                write = queue.waiting.pop(record.key, None)
                if write is not None:
                    self._drop(queue, write)

    def _drop(self, queue: WriteQueue, write: Write) -> None:
        queue.tier.drops(write.key)
        detail = "host memory needed its room before it was written"
        write.end(Outcome(write.key, Cause.NO_ROOM, detail))
        queue.changed()

    def withdraw(self, tier: int, keys: Sequence[ObjectKey] | None = None) -> Steps[list[Write]]:
        """Do not write these objects to a tier, or none at all: they are about to be removed there.

        Returns the writes that run already: see :meth:`settled`.
        """
        queue, running = self._queues.get(tier), list[Write]()
        if queue is None:
            return running
        named = [*queue.waiting, *queue.running] if keys is None else keys
        for at in range(0, len(named), SLICE):
            for key in named[at : at + SLICE]:
                if (write := queue.waiting.pop(key, None)) is not None:
                    write.end(
                        Outcome(key, Cause.CLEARED, "removed by request before it was written")
                    )
            queue.changed()
            if len(named) > SLICE:
                yield
        for at in range(0, len(named), SLICE):
            for key in named[at : at + SLICE]:
                if (write := queue.running.get(key)) is not None:
                    write.is_withdrawn = True
                    running.append(write)
            if len(named) > SLICE:
                yield
        return running

    # -- running ---------------------------------------------------------------------------------

    def _pump(self, queue: WriteQueue) -> None:
        """Begin what the tier has room for; a few now, the rest in the loop's next turns."""
        if not queue.waiting or queue.is_pumping or self._is_closed:
            return
        for _ in range(_AT_ONCE):
            if not self._begin_next(queue):
                return
        queue.is_pumping = True
        asyncio.get_running_loop().call_soon(self._pump_on, queue)

    def _pump_on(self, queue: WriteQueue) -> None:
        queue.is_pumping = False
        self._pump(queue)

    def _begin_next(self, queue: WriteQueue) -> bool:
        """Begin the write that has waited longest; False when none can begin now."""
        write = next(iter(queue.waiting.values()), None)
        if write is None:
            return False
        guard = queue.tier.guard
        if not guard.has_room(Lane.WRITES, write.record.nbytes):
            self._try_later(queue)
            return False
        try:
            self._begin(queue, write)
        except Refused:
            self._try_later(queue)
            return False
        return True

    def _try_later(self, queue: WriteQueue) -> None:
        """An open breaker closes only when somebody tries: nobody tells when that may be."""
        breaker = queue.tier.guard.breaker(Lane.WRITES)
        if breaker.is_closed or breaker.is_half_open or queue.timer is not None:
            return
        loop = asyncio.get_running_loop()
        if breaker.trial_at > loop.time():  # else what is stuck holds the turns: its end is told
            queue.timer = loop.call_at(breaker.trial_at, self._ring, queue)

    def _ring(self, queue: WriteQueue) -> None:
        queue.timer = None
        self._pump(queue)

    def _begin(self, queue: WriteQueue, write: Write) -> None:
        """Its turn has come. Raises :class:`Refused`; then it waits on, if it was waiting."""
        tier, record = queue.tier, write.record
        piece = self._planner.plan_spill(write.span, record, tier.index)
        if piece is None:
            queue.waiting.pop(write.key, None)
            if record.tiers >> tier.index & 1:
                write.end(Outcome(write.key, None, "", record.nbytes))
            else:
                self._drop(queue, write)
            return
        try:
            with tier.emit.within(write.request):  # not of whoever's turn has just ended
                write.call = tier.guard.send(
                    self._objects.writing(tier.index, piece),
                    partial(self._ended, queue, write),
                    lane=Lane.WRITES,
                    nbytes=piece.nbytes,
                )
                tier.begins("store", write.key, piece.nbytes)
        except Refused:
            self._planner.spilled(record, tier.index, ok=False)
            raise
        queue.waiting.pop(write.key, None)
        queue.running[write.key] = write

    def _ended(self, queue: WriteQueue, write: Write, call: TierCall[Outcome]) -> None:
        tier = queue.tier
        queue.running.pop(write.key, None)
        outcome = outcome_of(call, write.key)
        self._planner.spilled(write.record, tier.index, ok=outcome.ok, copy=outcome.copy)
        waits_on = not (self._is_closed or write.is_withdrawn)
        if isinstance(call.error, Refused) and waits_on:
            # The breaker opened before its turn came: it keeps its place, and was never tried.
            queue.wait_again(write)
        else:
            tier.transferred("store", outcome, call)
            write.end(outcome)
        queue.changed()
        if self.on_written is not None and not self.is_writing(tier.index):
            self.on_written(tier)

    # -- waiting ---------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether a tier that takes writes has some to do."""
        return any(True for _ in self._busy())

    def _busy(self) -> Iterator[WriteQueue]:
        for queue in self._queues.values():
            if (queue.running or queue.waiting) and not queue.tier.guard.is_down(Lane.WRITES):
                yield queue

    async def change(self) -> bool:
        """Wait until a write ends on any tier; False when none did for as long as a deadline."""
        watched = {queue: queue.watch() for queue in self._busy()}
        if not watched:
            return False
        try:
            done, _ = await asyncio.wait(
                watched.values(),
                timeout=max(queue.tier.guard.deadline for queue in watched),
                return_when=asyncio.FIRST_COMPLETED,
            )
            return bool(done)
        finally:
            for queue, watcher in watched.items():
                queue.watchers.pop(watcher, None)

    async def committed(self, through: Sequence[Write]) -> list[Failure]:
        """Wait for "through" writes while their tier makes progress.

        A tier that ends no write for as long as its deadline has failed; that is paid once.
        """
        writes = [[w for w in through if w.tier is tier] for tier in self._lower]
        failed = await asyncio.gather(*(self._committed(some) for some in writes if some))
        return list(chain.from_iterable(failed))

    async def _committed(self, writes: Sequence[Write]) -> list[Failure]:
        """Wait for writes to one tier."""
        failed: list[Failure] = []
        trouble: tuple[Cause, str] | None = None
        for write in writes:
            if trouble is None:
                trouble = await self._wait(write)
            outcome = write.outcome
            if outcome is None:
                assert trouble is not None
                cause, detail = trouble
                failed.append(Failure(write.span, cause, write.tier.name, detail))
            elif outcome.cause is not None:
                failed.append(Failure(write.span, outcome.cause, write.tier.name, outcome.detail))
        if trouble is not None and trouble[0] is Cause.DEADLINE:
            writes[0].tier.fails(Cause.DEADLINE, "not written in time", Lane.WRITES)
        return failed

    async def _wait(self, write: Write) -> tuple[Cause, str] | None:
        """Wait for one write; why it is not worth waiting for any longer, if so."""
        tier = write.tier
        queue, guard = self._queues[tier.index], tier.guard
        while not write.ended.done():
            if write.call is not None and write.call.was_late:
                return Cause.DEADLINE, "not written yet"
            if not write.is_running and guard.is_down(Lane.WRITES):
                tier.refused(Cause.TIER_DOWN)
                return Cause.TIER_DOWN, _down(tier)
            if not await queue.change(guard.deadline) and not write.ended.done():
                guard.give_up([w.call for w in queue.running.values() if w.call is not None])
                return Cause.DEADLINE, "not written yet"
        return None

    async def settled(self, writes: Sequence[Write]) -> int:
        """Wait for writes while their tier makes progress; how many had not ended then."""
        for write in writes:
            if await self._wait(write) is not None:
                break
        return sum(not write.ended.done() for write in writes)

    async def flush(self) -> None:
        """Wait until everything queued so far has been written, has failed, or cannot be written.

        A tier that ends no write for as long as its deadline has failed; its writes go on. What a
        tier that is down has not got stays queued.
        """
        await asyncio.gather(*map(self._flush, self._queues.values()))

    async def _flush(self, queue: WriteQueue) -> None:
        for write in [*queue.running.values(), *queue.waiting.values()]:
            trouble = await self._wait(write)
            if trouble is not None:
                if trouble[0] is Cause.DEADLINE:
                    detail = f"not written within {queue.tier.guard.deadline} s"
                    queue.tier.fails(Cause.DEADLINE, detail, Lane.WRITES)
                if not queue.running or trouble[0] is Cause.DEADLINE:
                    return

    def unwritten(self) -> list[Unwritten]:
        """What the tiers have not got yet: what is lost if the process ends now."""
        found: list[Unwritten] = []
        for queue in self._queues.values():
            left = [*queue.running.values(), *queue.waiting.values()]
            if left:
                nbytes = sum(write.record.nbytes for write in left)
                found.append(Unwritten(queue.tier.name, len(left), nbytes))
        return found

    def is_writing(self, tier: int) -> bool:
        """Whether a tier has something left to get."""
        queue = self._queues.get(tier)
        return queue is not None and bool(queue.running or queue.waiting)

    def queued(self, tier: int) -> int:
        """Objects that wait for their turn to be written to a tier."""
        queue = self._queues.get(tier)
        return 0 if queue is None else len(queue.waiting)

    def close(self) -> None:
        """Begin nothing more; what waits is not written."""
        self._is_closed = True
        for queue in self._queues.values():
            if queue.timer is not None:
                queue.timer.cancel()
            for write in queue.waiting.values():
                write.end(Outcome(write.key, Cause.BUSY, "the cache is being closed"))
            queue.waiting.clear()
            queue.changed()


def _down(tier: LowerTier) -> str:
    reason = tier.guard.breaker(Lane.WRITES).reason
    return f"not asked for now: {reason}" if reason else "what it was given before is stuck"
