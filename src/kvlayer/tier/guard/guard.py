"""What stands between a request and a tier: deadlines, turns, bounds and a breaker.

A deadline frees the waiter, never the memory: the call goes on until the backend has really let go
of its buffers, and counts as an orphan meanwhile; a deadline later it is told to stop. Reads go
before writes, and neither can take every turn. When too much waits, too many bytes are held for
writing, abandoned calls hold every slot, or the breaker is open, work is refused at once instead of
queued.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Hashable, Iterable
from contextlib import suppress
from math import inf
from random import Random
from sys import maxsize
from typing import Any, TypeVar

from kvlayer.results import Cause
from kvlayer.runtime.foreign import awaited, words
from kvlayer.tier.guard.breaker import Breaker
from kvlayer.tier.guard.lane_queue import LaneQueue
from kvlayer.tier.guard.tier_call import Lane, Refused, Ride, TaskRide, TierCall

__all__ = ["TierCall", "Guard", "Lane", "Refused", "Ride"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Guard:
    """Bounds one tier. ``deadline`` in seconds, ``max_inflight`` running calls of both lanes.

    In each lane at most ``max_queued`` more wait for their turn, and writes hold at most
    ``max_write_nbytes`` bytes, running or waiting. While the breaker of the reads is open,
    ``probe`` (set by the owner) is called for no one, first after ``pause`` seconds; that of the
    writes lets one write try.
    """

    def __init__(
        self,
        deadline: float,
        max_inflight: int,
        *,
        max_queued: int = 1024,
        max_write_nbytes: int = maxsize,
        pause: float = 1.0,
    ) -> None:
        self.deadline = deadline
        self.max_write_nbytes = max_write_nbytes
        jitter = Random().random  # noqa: S311  # not a secret
        kept = max(max_inflight // 8, 1)  # for writes; nothing can be kept of a single turn
        reads, writes = max(max_inflight - kept, 1), max(max_inflight // 4, 1)
        self._reads = LaneQueue(Lane.READS, reads, Breaker(pause=pause, jitter=jitter))
        self._writes = LaneQueue(Lane.WRITES, writes, Breaker(pause=pause, jitter=jitter))
        self._max_inflight = max_inflight
        self._max_queued = max_queued
        # In the order they came, so that what happens to all of them has an order, too.
        self._orphans: dict[TierCall[Any], None] = {}
        self._calls: dict[TierCall[Any], None] = {}
        self._is_closing = False
        self._probing: asyncio.Task[None] | None = None
        self.probe: Callable[[], Coroutine[Any, Any, object]] | None = None
        self.on_opened: Callable[[Lane, str], None] | None = None
        """Told when a breaker has opened, and why."""
        self.on_probed: Callable[[], None] | None = None
        """Told when a probe found the tier serving again."""
        self.on_freed: Callable[[], None] | None = None
        """Told when a call has ended: another may have room now."""

    @property
    def orphans(self) -> int:
        """Calls that a deadline has passed over and that have not ended yet."""
        return len(self._orphans)

    @property
    def inflight(self) -> int:
        """Calls running or waiting for their turn."""
        return len(self._calls)

    @property
    def inflight_nbytes(self) -> int:
        """Payload bytes of the calls running or waiting for their turn."""
        return self._reads.nbytes + self._writes.nbytes

    @property
    def running(self) -> int:
        """Calls whose turn has come and that have not ended."""
        return self._reads.running + self._writes.running

    def held_nbytes(self, lane: Lane) -> int:
        """Payload bytes of one lane's calls, running or waiting for their turn."""
        return self._lane(lane).nbytes

    def _lane(self, lane: Lane) -> LaneQueue:
        return self._reads if lane is Lane.READS else self._writes

    def breaker(self, lane: Lane) -> Breaker:
        return self._lane(lane).breaker

    def oldest(self) -> tuple[str, float]:
        """The lane of the call that has not ended for longest, and its age in seconds.

        Empty and 0 without any. From any thread.
        """
        while True:
            try:
                call = next(iter(self._calls), None)
            except RuntimeError:  # the loop begins or ends one this very moment
                continue
            if call is None:
                return "", 0.0
            return call.lane.value, call.age()

    @property
    def serves(self) -> bool:
        """Whether a read would be admitted, as far as the breaker goes."""
        return self._reads.breaker.is_closed

    def has_room(self, lane: Lane, nbytes: int) -> bool:
        """Whether a call would be admitted now and run soon: for whoever keeps a queue of his own.

        As many may wait here as may run, so that a turn that ends finds the next call ready.
        """
        turns, loop = self._lane(lane), asyncio.get_running_loop()
        if not (turns.breaker.is_closed or turns.breaker.is_due(loop.time())) or self._is_closing:
            return False
        if turns.late >= turns.limit or len(self._orphans) >= self._max_inflight:
            return False
        if lane is Lane.WRITES and 0 < turns.nbytes > self.max_write_nbytes - nbytes:
            return False
        return turns.calls < turns.limit + min(turns.limit, self._max_queued)

    def is_down(self, lane: Lane) -> bool:
        """Whether calls are refused for now: the breaker is open, or what is stuck holds all turns.

        A call that is waited for is not worth waiting for then.
        """
        turns = self._lane(lane)
        is_stuck = turns.late >= turns.limit or len(self._orphans) >= self._max_inflight
        return self._is_closing or is_stuck or not turns.breaker.is_closed

    # -- calls -----------------------------------------------------------------------------------

    def start(
        self,
        call: Callable[[], Coroutine[Any, Any, T]],
        booked: Callable[[TierCall[T]], None] | None = None,
        *,
        lane: Lane = Lane.READS,
        nbytes: int = 0,
    ) -> TierCall[T]:
        """Run ``call()`` in a task of its own when it is its turn; see :meth:`send`."""
        return self.send(TaskRide(call), booked, lane=lane, nbytes=nbytes)

    def send(
        self,
        ride: Ride[T],
        booked: Callable[[TierCall[T]], None] | None = None,
        *,
        lane: Lane = Lane.READS,
        nbytes: int = 0,
    ) -> TierCall[T]:
        """Begin ``ride`` when it is its turn. ``nbytes`` are what it moves.

        Rides that begin together may travel together: each is admitted, has its turn, ends and is
        late by itself.

        Raises :class:`Refused` when too much waits, while the breaker is open, and once
        :meth:`aclose` was called. A call that still waits when the breaker opens ends with
        :class:`Refused` as its error.

        ``booked`` is called once when the call is over, in whatever way, before anyone who waits
        for it goes on: the place to give memory back.
        """
        loop, turns = asyncio.get_running_loop(), self._lane(lane)
        now = loop.time()
        is_trial = self._admit(turns, nbytes, now)
        call: TierCall[T] = TierCall(
            ride, self, turns, booked=booked, nbytes=nbytes, loop=loop, now=now
        )
        self._calls[call] = None
        turns.calls += 1
        turns.nbytes += nbytes
        if is_trial:
            turns.trial = call
        turns.waiting[call] = None
        self._take_turns(now)
        return call

    def book(self, ended: TierCall[Any]) -> None:
        """For a call that is over: give back what it held, and tell."""
        turns, now = ended.turns, asyncio.get_running_loop().time()
        self._forget(ended, turns)
        if ended.has_begun:
            turns.running -= 1
            turns.progress_at = now
        if now - ended.began_at > self.deadline:
            ended.was_late = True  # whether or not somebody waited for so long
        try:
            if ended.booked is not None:
                ended.booked(ended)
        finally:
            if turns.trial is ended:
                self._conclude(ended, turns)
            self._take_turns(now)
            if self.on_freed is not None:
                self.on_freed()

    def _admit(self, turns: LaneQueue, nbytes: int, now: float) -> bool:
        """Whether the call is the one that tries a tier out. Raises :class:`Refused`."""
        if self._is_closing:
            raise Refused(Cause.BUSY, "the tier is being closed")
        lane, breaker = turns.lane, turns.breaker
        # Where nothing probes, a user's call is the trial. Writes are rarely waited for.
        may_try = lane is Lane.WRITES or self.probe is None
        if not breaker.is_closed and not (may_try and breaker.is_due(now)):
            raise Refused(Cause.TIER_DOWN, f"not asked for now: {breaker.reason}")
        is_stuck = turns.late >= turns.limit or len(self._orphans) >= self._max_inflight
        if is_stuck or turns.calls >= turns.limit + self._max_queued:
            detail = f"{turns.calls} {lane.value} in flight, {turns.late} of them late"
            raise Refused(Cause.BUSY, detail)
        if lane is Lane.WRITES and 0 < turns.nbytes > self.max_write_nbytes - nbytes:
            raise Refused(Cause.BUSY, f"{turns.nbytes} bytes are waiting to be written")
        return breaker.try_now(now)  # last: what is refused is no trial

    def _forget(self, ended: TierCall[Any], turns: LaneQueue) -> None:
        self._calls.pop(ended, None)
        turns.calls -= 1
        turns.nbytes -= ended.nbytes
        if ended in self._orphans:
            self._orphans.pop(ended)
            turns.late -= 1

    def _conclude(self, trial: TierCall[Any], turns: LaneQueue) -> None:
        """A trial is over. Without a verdict the breaker would stay half-open for ever."""
        turns.trial = None
        if not turns.breaker.is_half_open:
            return
        error = trial.error
        if trial.was_late:
            self.missed(trial.lane, "the call that tried it ended late")
        elif error is None:
            turns.breaker.passed(asyncio.get_running_loop().time())
        elif isinstance(error, CancelledError) and trial.was_told_to_stop:
            turns.breaker.untried()
        else:
            self.failed(trial.lane, words(error))

    def _take_turns(self, now: float) -> None:
        reads, writes = self._reads, self._writes
        for _ in range(self._max_inflight - reads.running - writes.running):
            if reads.waiting and reads.running < reads.limit:  # somebody waits for a read
                turns = reads
            elif writes.waiting and writes.running < writes.limit:
                turns = writes
            else:
                return
            call = turns.next()
            turns.progress_at = now
            if turns is writes:
                self._watch_writes()
            call.begin(now)

    def hint(self, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run ``call()`` for no one: not at all when busy, cancelled at the deadline."""
        with suppress(Refused):
            self.start(call).left_alone(cancel=True)

    # -- waiting ---------------------------------------------------------------------------------

    async def wait(self, call: TierCall[Any], seconds: float | None = None) -> bool:
        """Wait for a call until the deadline. False: it goes on, counted as an orphan.

        ``seconds`` shortens the wait; when it is less than half the deadline, a call that is left
        then is not late: it was hardly given the time. Cancelling the waiter leaves it alone.
        """
        patience = self.deadline if seconds is None else min(max(seconds, 0), self.deadline)
        if await call.ended(patience):
            return True
        if patience >= self.deadline / 2:
            self._orphan(call)
        return False

    async def wait_alone(self, call: TierCall[Any]) -> bool:
        """As :meth:`wait`, for a call that nobody else waits for.

        When the waiter is cancelled the call goes on, but no longer than another deadline.
        """
        try:
            return await self.wait(call)
        except CancelledError:
            call.left_alone(cancel=True)
            raise

    async def settle(self, calls: Iterable[TierCall[Any]]) -> list[TierCall[Any]]:
        """Wait for calls while their lane makes progress within each deadline.

        Returns those that were given up: they go on, counted as orphans.
        """
        left = [call for call in calls if not call.has_ended]
        for call in left:
            turns = call.turns
            while not call.has_ended:
                seen = turns.progress_at
                if not await call.ended(self.deadline) and turns.progress_at == seen:
                    late = [each for each in left if not each.has_ended]
                    for each in late:
                        self._orphan(each)
                    return late
        return []

    def give_up(self, calls: Iterable[TierCall[Any]]) -> None:
        """Wait for these no more: they go on, counted as orphans."""
        for call in calls:
            if not call.has_ended:
                self._orphan(call)

    def _orphan(self, call: TierCall[Any]) -> None:
        call.was_late = True
        if call not in self._orphans:
            self._orphans[call] = None
            call.turns.late += 1
            call.left_alone(cancel=True)  # an answer that is lost must not hold its turn for ever

    def passed_over(self, call: TierCall[Any]) -> None:
        """For a call that nobody waits for and that has not ended within a deadline."""
        self._orphan(call)
        if call.turns.trial is call:
            self.missed(call.lane, f"the call that tried it did not end within {self.deadline} s")

    # -- the breaker -----------------------------------------------------------------------------

    def missed(self, lane: Lane, reason: str) -> None:
        """A deadline was missed: ask no more for now, and refuse what waits in the lane."""
        if self._lane(lane).breaker.missed(asyncio.get_running_loop().time(), reason):
            self._opened(lane)

    def failed(self, lane: Lane, reason: str, about: Hashable = None) -> None:
        """The tier answered with an error, ``about`` one object or (None) about itself."""
        if self._lane(lane).breaker.failed(asyncio.get_running_loop().time(), reason, about):
            self._opened(lane)

    def succeeded(self, lane: Lane) -> None:
        """A call succeeded within its deadline."""
        breaker = self._lane(lane).breaker
        if not breaker.is_untroubled:
            breaker.succeeded(asyncio.get_running_loop().time())

    def _opened(self, lane: Lane) -> None:
        turns = self._lane(lane)
        turns.refuse_waiting(f"not asked for now: {turns.breaker.reason}")
        if lane is Lane.READS:
            self._probe_later()
        if self.on_opened is not None:
            self.on_opened(lane, turns.breaker.reason)

    def _probe_later(self) -> None:
        if not self._is_closing and self.probe is not None:
            at = self._reads.breaker.trial_at
            self._set_timer(self._reads, at, self._start_probe)

    def _start_probe(self) -> None:
        if self._probing is None:  # else it says itself when the next one is due
            self._probing = asyncio.get_running_loop().create_task(self._probe())
            # Not in the task itself: an eager one may have ended before it is assigned here.
            self._probing.add_done_callback(self._probed)

    async def _probe(self) -> None:
        """Ask the tier something small. One that never lets go is never asked a second time."""
        breaker, loop = self._reads.breaker, asyncio.get_running_loop()
        if breaker.try_now(loop.time()):
            trouble = await self._trouble()
            if trouble is not None:
                breaker.failed(loop.time(), trouble)
            elif breaker.passed(loop.time()) and self.on_probed is not None:
                self.on_probed()

    def _probed(self, probing: asyncio.Task[None]) -> None:
        self._probing = None
        if not probing.cancelled() and (error := probing.exception()) is not None:
            _log.error("a probe failed", exc_info=error)
        breaker = self._reads.breaker
        breaker.untried()  # where it ended without a verdict: half-open would be for ever
        if not breaker.is_closed:
            self._probe_later()

    async def _trouble(self) -> str | None:
        """What is wrong with the tier, by a probe."""
        assert self.probe is not None
        task = asyncio.current_task()
        expiry = asyncio.timeout(self.deadline)
        try:
            async with expiry:
                await awaited(self.probe)
        except CancelledError:
            if task is None or task.cancelling():
                raise
            return "a probe was cancelled"
        except Exception as exc:  # noqa: BLE001  # foreign code: whatever it raises, it is not well
            if not expiry.expired():
                return words(exc)
        # A thread cannot be stopped, so an answer may come after the deadline, too.
        return f"no answer to a probe within {self.deadline} s" if expiry.expired() else None

    def _watch_writes(self) -> None:
        if self._writes.timer is None and not self._is_closing:
            at = self._writes.progress_at + self.deadline
            self._set_timer(self._writes, at, self._check_writes)

    def _check_writes(self) -> None:
        """Nobody waits for written-back objects, so their lane is watched for progress."""
        writes = self._writes
        if not writes.running:
            return
        if asyncio.get_running_loop().time() < writes.progress_at + self.deadline:
            self._watch_writes()
            return
        for call in self._calls:
            if call.turns is writes:
                self._orphan(call)
        self.missed(Lane.WRITES, f"no write ended within {self.deadline} s")

    def _set_timer(self, turns: LaneQueue, at: float, what: Callable[[], None]) -> None:
        def ring() -> None:
            turns.timer = None
            what()

        if turns.timer is not None:
            turns.timer.cancel()
        turns.timer = asyncio.get_running_loop().call_at(at, ring)

    async def aclose(self, seconds: float | None = None) -> int:
        """Admit nothing more, cancel everything in flight, wait until all lent memory is back.

        After ``seconds`` what will not end is left alone; how many calls. What they were lent must
        not be used again.
        """
        self._is_closing = True
        loop = asyncio.get_running_loop()
        until = inf if seconds is None else loop.time() + seconds
        for turns in (self._reads, self._writes):
            if turns.timer is not None:
                turns.timer.cancel()
                turns.timer = None
        while self._calls:
            call = next(iter(self._calls))
            for each in self._calls:
                each.cancel()
            if not await call.ended(None if until == inf else max(until - loop.time(), 0)):
                break
        while self._probing is not None:
            self._probing.cancel()
            left = None if until == inf else max(until - loop.time(), 0)
            if not (await asyncio.wait({self._probing}, timeout=left))[0]:
                return len(self._calls) + 1
            await asyncio.sleep(0)  # what notes its end is called in the next turn
        return len(self._calls)
