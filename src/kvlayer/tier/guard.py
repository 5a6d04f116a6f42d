"""What stands between a request and a tier: deadlines, turns, bounds and a breaker.

A deadline frees the waiter, never the memory: the call goes on until the backend has really let go
of its buffers, and counts as an orphan meanwhile. Reads go before writes, and neither can take
every turn. When too much waits, too many bytes are held for writing, abandoned calls hold every
slot, or the breaker is open, work is refused at once instead of queued.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from enum import Enum
from random import Random
from sys import maxsize
from typing import Any, Generic, TypeVar

from kvlayer.results import Cause
from kvlayer.tier.breaker import Breaker

__all__ = ["Call", "Guard", "Lane", "Refused"]

T = TypeVar("T")


class Lane(Enum):
    """The two directions of a tier. A disk that is full still serves what it holds."""

    READS = "reads"
    WRITES = "writes"


class Refused(Exception):  # noqa: N818  # a refusal, not an error: callers turn it into a cause
    """The call was not made: ``cause`` is ``BUSY`` or ``TIER_DOWN``."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


class Call(Generic[T]):
    """One call to a tier. It has *ended* once its outcome was booked, not merely computed."""

    __slots__ = ("_ended", "_task", "lane", "nbytes", "was_late")

    def __init__(
        self,
        task: asyncio.Task[T],
        booked: Callable[[Call[T]], None],
        lane: Lane,
        nbytes: int,
    ) -> None:
        self._task = task
        self.lane = lane
        self.nbytes = nbytes
        self.was_late = False
        """Whether a deadline passed before it ended."""
        self._ended: asyncio.Future[None] = task.get_loop().create_future()

        def book(_: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # seen: whoever waits asks for it, a hint may fail unheard
            try:
                booked(self)
            finally:
                self._ended.set_result(None)

        task.add_done_callback(book)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    def cancel(self) -> None:
        """Ask it to stop. It ends when the backend has let go of what it was lent."""
        self._task.cancel()

    @property
    def error(self) -> BaseException | None:
        """What it raised, ``CancelledError`` included; None when there is a result."""
        if self._task.cancelled():
            return asyncio.CancelledError()
        return self._task.exception()

    @property
    def was_cancelled(self) -> bool:
        """Whether it ended by being cancelled."""
        return self._task.cancelled()

    def result(self) -> T:
        """Its result. Raises what it raised."""
        return self._task.result()

    @staticmethod
    async def any_ended(calls: Iterable[Call[Any]], seconds: float) -> bool:
        """Wait until one of ``calls`` has ended, at most ``seconds``."""
        done, _ = await asyncio.wait(
            {call._ended for call in calls}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        return bool(done)

    async def ended(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most ``seconds``. Cancelling the waiter leaves it alone."""
        done, _ = await asyncio.wait({self._ended}, timeout=seconds)
        return bool(done)


class _Turns:
    """What runs and what waits in one lane."""

    def __init__(self, limit: int, breaker: Breaker) -> None:
        self.limit = limit
        self.breaker = breaker
        self.running = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.progress_at = 0.0
        """When a call of this lane last began or ended."""

    def next(self) -> asyncio.Future[None] | None:
        """The next that may begin, if the lane has a turn left."""
        while self.waiting and self.running < self.limit:
            turn = self.waiting.popleft()
            if not turn.done():
                return turn
        return None


class Guard:
    """Bounds one tier. ``deadline`` in seconds, ``max_inflight`` running calls of both lanes.

    At most ``max_queued`` more wait for their turn, and writes hold at most ``max_write_nbytes``
    bytes, running or waiting. While the breaker of the reads is open, ``probe`` (set by the owner)
    is called for no one, first after ``pause`` seconds; that of the writes lets one write try.
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
        self._lanes = {
            Lane.READS: _Turns(
                max_inflight - max_inflight // 8, Breaker(pause=pause, jitter=jitter)
            ),
            Lane.WRITES: _Turns(max(max_inflight // 4, 1), Breaker(pause=pause, jitter=jitter)),
        }
        self._max_inflight = max_inflight
        self._max_calls = max_inflight + max_queued
        self._orphans: set[Call[Any]] = set()
        self._calls: set[Call[Any]] = set()
        self._is_closing = False
        self._timers: dict[Lane, asyncio.TimerHandle] = {}
        self._probing: asyncio.Task[None] | None = None
        self.probe: Callable[[], Coroutine[Any, Any, object]] | None = None
        self.on_stalled: Callable[[str], None] | None = None
        """Told when running writes made no progress for a whole deadline."""
        self.on_probed: Callable[[], None] | None = None
        """Told when a probe found the tier serving again."""

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
        return sum(call.nbytes for call in self._calls)

    def breaker(self, lane: Lane) -> Breaker:
        return self._lanes[lane].breaker

    @property
    def serves(self) -> bool:
        """Whether a read would be admitted, as far as the breaker goes."""
        return self._lanes[Lane.READS].breaker.is_closed

    # -- calls -----------------------------------------------------------------------------------

    def start(
        self,
        call: Callable[[], Coroutine[Any, Any, T]],
        booked: Callable[[Call[T]], None] | None = None,
        *,
        lane: Lane = Lane.READS,
        nbytes: int = 0,
    ) -> Call[T]:
        """Run ``call()`` when it is its turn. ``nbytes`` are what it moves.

        Raises :class:`Refused` when too much waits, while the breaker is open, and once
        :meth:`aclose` was called. A call that still waits when the breaker opens ends with
        :class:`Refused` as its error.

        ``booked`` is called once when the call is over, in whatever way, before anyone who waits
        for it goes on: the place to give memory back.
        """
        self._admit(lane, nbytes)

        def book(ended: Call[T]) -> None:
            self._calls.discard(ended)
            self._orphans.discard(ended)
            if booked is not None:
                booked(ended)

        task = asyncio.get_running_loop().create_task(self._run(call, self._lanes[lane]))
        started = Call(task, book, lane, nbytes)
        self._calls.add(started)
        return started

    def _admit(self, lane: Lane, nbytes: int) -> None:
        if self._is_closing:
            raise Refused(Cause.BUSY, "the tier is being closed")
        breaker = self._lanes[lane].breaker
        # Where nothing probes, a user's call is the trial. Writes are rarely waited for.
        may_try = lane is Lane.WRITES or self.probe is None
        if not breaker.is_closed and not (
            may_try and breaker.try_now(asyncio.get_running_loop().time())
        ):
            raise Refused(Cause.TIER_DOWN, f"not asked for now: {breaker.reason}")
        late = sum(call.lane is lane for call in self._orphans)
        if len(self._calls) >= self._max_calls or late >= self._lanes[lane].limit:
            raise Refused(Cause.BUSY, f"{len(self._calls)} calls in flight, {late} of them late")
        if lane is Lane.WRITES and nbytes:
            held = sum(call.nbytes for call in self._calls if call.lane is lane)
            if held and held + nbytes > self.max_write_nbytes:
                raise Refused(Cause.BUSY, f"{held} bytes are waiting to be written")

    async def _run(self, call: Callable[[], Coroutine[Any, Any, T]], lane: _Turns) -> T:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane.waiting.append(turn)
        self._take_turns()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._end_turn(lane)  # it was cancelled just as its turn came
            raise
        try:
            return await call()
        finally:
            self._end_turn(lane)

    def _take_turns(self) -> None:
        reads, writes = self._lanes[Lane.READS], self._lanes[Lane.WRITES]
        while reads.running + writes.running < self._max_inflight:
            lane, turn = reads, reads.next()  # somebody waits for a read
            if turn is None:
                lane, turn = writes, writes.next()
            if turn is None:
                return
            lane.running += 1
            lane.progress_at = asyncio.get_running_loop().time()
            turn.set_result(None)
            if lane is writes:
                self._watch_writes()

    def _end_turn(self, lane: _Turns) -> None:
        lane.running -= 1
        lane.progress_at = asyncio.get_running_loop().time()
        self._take_turns()

    def hint(self, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run ``call()`` for no one: not at all when busy, cancelled at the deadline."""

        def book(_: Call[object]) -> None:
            expiry.cancel()

        try:
            started = self.start(call, book)
        except Refused:
            return
        expiry = asyncio.get_running_loop().call_later(self.deadline, started.cancel)

    # -- waiting ---------------------------------------------------------------------------------

    async def wait(self, call: Call[Any], seconds: float | None = None) -> bool:
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

    async def settle(self, calls: Iterable[Call[Any]]) -> set[Call[Any]]:
        """Wait for calls while one of them ends within each deadline.

        Returns those that were given up: they go on, counted as orphans.
        """
        left = {call for call in calls if not call.has_ended}
        while left:
            if not await Call.any_ended(left, self.deadline):
                for call in left:
                    self._orphan(call)
                break
            left = {call for call in left if not call.has_ended}
        return left

    def _orphan(self, call: Call[Any]) -> None:
        call.was_late = True
        self._orphans.add(call)

    # -- the breaker -----------------------------------------------------------------------------

    def missed(self, lane: Lane, reason: str) -> None:
        """A deadline was missed: ask no more for now, and refuse what waits in the lane."""
        if self._lanes[lane].breaker.missed(asyncio.get_running_loop().time(), reason):
            self._opened(lane)

    def failed(self, lane: Lane, reason: str) -> None:
        """The tier itself answered with an error."""
        if self._lanes[lane].breaker.failed(asyncio.get_running_loop().time(), reason):
            self._opened(lane)

    def succeeded(self, lane: Lane) -> None:
        """A call succeeded within its deadline."""
        self._lanes[lane].breaker.succeeded()

    def _opened(self, lane: Lane) -> None:
        turns = self._lanes[lane]
        refusal = f"not asked for now: {turns.breaker.reason}"
        while turns.waiting:
            turn = turns.waiting.popleft()
            if not turn.done():
                turn.set_exception(Refused(Cause.TIER_DOWN, refusal))
        if lane is Lane.READS:
            self._probe_later()

    def _probe_later(self) -> None:
        if self._is_closing or self.probe is None:
            return
        at = self._lanes[Lane.READS].breaker.trial_at
        self._set_timer(Lane.READS, at, self._start_probe)

    def _start_probe(self) -> None:
        if self._probing is None and not self._is_closing:
            self._probing = asyncio.get_running_loop().create_task(self._probe())

    async def _probe(self) -> None:
        """Ask the tier something small. One that never lets go is never asked a second time."""
        breaker, loop = self._lanes[Lane.READS].breaker, asyncio.get_running_loop()
        assert self.probe is not None
        try:
            if not breaker.try_now(loop.time()):
                return  # a call from before it opened has succeeded
            async with asyncio.timeout(self.deadline):
                await self.probe()
        except Exception as exc:  # noqa: BLE001  # foreign code: whatever it raises, it is not well
            breaker.failed(loop.time(), f"{type(exc).__name__}: {exc}")
        else:
            breaker.passed()
            if self.on_probed is not None:
                self.on_probed()
        finally:
            self._probing = None
            if not breaker.is_closed:
                self._probe_later()

    def _watch_writes(self) -> None:
        if Lane.WRITES not in self._timers:
            at = self._lanes[Lane.WRITES].progress_at + self.deadline
            self._set_timer(Lane.WRITES, at, self._check_writes)

    def _check_writes(self) -> None:
        """Nobody waits for written-back objects, so their lane is watched for progress."""
        writes = self._lanes[Lane.WRITES]
        if not writes.running or self._is_closing:
            return
        if asyncio.get_running_loop().time() < writes.progress_at + self.deadline:
            self._watch_writes()
            return
        for call in self._calls:
            if call.lane is Lane.WRITES:
                self._orphan(call)
        reason = f"no write ended within {self.deadline} s"
        self.missed(Lane.WRITES, reason)
        if self.on_stalled is not None:
            self.on_stalled(reason)

    def _set_timer(self, lane: Lane, at: float, what: Callable[[], None]) -> None:
        def ring() -> None:
            self._timers.pop(lane, None)
            what()

        earlier = self._timers.get(lane)
        if earlier is not None:
            earlier.cancel()
        self._timers[lane] = asyncio.get_running_loop().call_at(at, ring)

    async def aclose(self) -> None:
        """Admit nothing more, cancel everything in flight, wait until all lent memory is back."""
        self._is_closing = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        while self._calls:
            call = next(iter(self._calls))
            for each in self._calls:
                each.cancel()
            await call.ended()
        while self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})
