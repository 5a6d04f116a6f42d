"""The guard: a deadline frees the waiter, never the call; too much is refused, never queued."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvlayer.results import Cause
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.guard import Guard, Lane, Refused, TierCall

SOON = 2.0
NEVER = 3600.0


class Work:
    """A call that waits at a gate, and may refuse to be cancelled."""

    def __init__(self, *, is_stubborn: bool = False) -> None:
        self.gate = asyncio.Event()
        self.began = asyncio.Event()
        self.is_stubborn = is_stubborn
        self.has_returned = False

    async def __call__(self) -> str:
        self.began.set()
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                if not self.is_stubborn:
                    raise
        self.has_returned = True
        return "done"


def pending_timers() -> list[asyncio.TimerHandle]:
    """What the running loop would still call by itself."""
    scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return [handle for handle in scheduled if not handle.cancelled()]


def raising(error: Exception) -> Callable[[], Coroutine[Any, Any, str]]:
    async def work() -> str:
        raise error

    return work


@in_virtual_time
async def test_a_deadline_frees_the_waiter_and_the_call_goes_on() -> None:
    guard, work = Guard(SOON, 4), Work()
    call = guard.start(work)
    assert not await guard.wait(call)
    assert guard.orphans == 1
    assert not call.has_ended
    assert guard.inflight == 1
    work.gate.set()
    assert await call.ended()
    assert call.result() == "done"
    assert (guard.orphans, guard.inflight) == (0, 0)


@in_virtual_time
async def test_a_call_that_two_waiters_gave_up_is_one_orphan() -> None:
    """Many requests may share one stuck transfer; that is no reason to refuse all others."""
    guard, work = Guard(SOON, 4), Work()
    call = guard.start(work)
    assert await asyncio.gather(*(guard.wait(call) for _ in range(6))) == [False] * 6
    assert guard.orphans == 1
    other = guard.start(raising(ValueError("x")))
    assert await guard.wait(other)
    work.gate.set()
    assert await call.ended()
    assert guard.orphans == 0


@in_virtual_time
async def test_past_the_bound_of_orphans_everything_is_refused_until_one_comes_back() -> None:
    guard = Guard(SOON, 3)
    works = [Work(is_stubborn=True), Work(is_stubborn=True)]
    calls = [guard.start(work) for work in works]
    for call in calls:
        assert not await guard.wait(call)
    with pytest.raises(Refused):
        guard.start(Work())
    works[0].gate.set()
    await calls[0].ended()
    again = guard.start(raising(ValueError("x")))
    assert await guard.wait(again)
    works[1].gate.set()
    await guard.aclose()
    assert guard.orphans == 0


@in_virtual_time
async def test_too_much_waiting_is_refused_and_a_refusal_starts_nothing() -> None:
    guard, work = Guard(NEVER, 1, max_queued=1), Work()
    running, queued = guard.start(work), guard.start(work)
    started = False

    async def never() -> None:
        nonlocal started
        started = True

    with pytest.raises(Refused):
        guard.start(never)
    work.gate.set()
    assert await guard.wait(running)
    assert await guard.wait(queued)
    assert not started
    await guard.aclose()


@in_virtual_time
async def test_no_more_calls_run_at_once_than_may() -> None:
    guard, running, most = Guard(NEVER, 4), 0, 0
    turn = asyncio.Event()

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            turn.set()
        await turn.wait()
        running -= 1

    calls = [guard.start(work) for _ in range(9)]
    for call in calls:
        assert await guard.wait(call)
    assert most == 3


@in_virtual_time
async def test_a_call_cancelled_before_it_starts_is_booked_and_never_runs() -> None:
    guard, work, booked = Guard(NEVER, 1), Work(), list[TierCall[str]]()
    call = guard.start(work, booked.append)
    call.cancel()
    assert await guard.wait(call)
    assert booked == [call]
    assert isinstance(call.error, asyncio.CancelledError)
    assert not work.began.is_set()
    assert guard.inflight == 0


@in_virtual_time
async def test_a_call_cancelled_in_the_queue_leaves_its_turn_to_the_next() -> None:
    guard, first, second, third = Guard(NEVER, 1), Work(), Work(), Work()
    calls = [guard.start(work) for work in (first, second, third)]
    await first.began.wait()
    calls[1].cancel()
    await calls[1].ended()
    first.gate.set()
    third.gate.set()
    assert await guard.wait(calls[2])
    assert not second.began.is_set()
    assert calls[2].result() == "done"


@pytest.mark.parametrize("how", ["result", "error", "cancel"])
@in_virtual_time
async def test_a_call_is_booked_once_before_any_waiter_goes_on(how: str) -> None:
    guard, work, order = Guard(NEVER, 1), Work(), list[str]()
    do = raising(ValueError("x")) if how == "error" else work
    call = guard.start(do, lambda _: order.append("booked"))

    async def wait(name: str) -> None:
        assert await guard.wait(call)
        assert call.has_ended
        order.append(name)

    waiters = [asyncio.create_task(wait(n)) for n in "ab"]
    if how != "error":
        await work.began.wait()
        if how == "cancel":
            call.cancel()
        else:
            work.gate.set()
    await asyncio.gather(*waiters)
    assert order == ["booked", "a", "b"]


@in_virtual_time
async def test_cancelling_a_waiter_leaves_the_call_alone() -> None:
    guard, work = Guard(NEVER, 1), Work()
    call = guard.start(work)
    waiter = asyncio.create_task(guard.wait(call))
    await work.began.wait()
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not call.has_ended
    assert guard.orphans == 0
    work.gate.set()
    assert await guard.wait(call)
    assert call.result() == "done"


@pytest.mark.parametrize("lane", Lane)
@in_virtual_time
async def test_a_turn_that_comes_just_as_its_call_is_cancelled_is_the_next_ones(lane: Lane) -> None:
    """The turn has been given and the call has not run since: nobody but it could give it back."""
    guard, works = Guard(NEVER, 1), [Work() for _ in range(3)]
    first, second, third = (guard.start(work, lane=lane) for work in works)
    await works[0].began.wait()
    guard.on_freed = lambda: second.cancel() if second.has_begun else None
    works[0].gate.set()
    await third_begins(works[2])
    assert isinstance(second.error, asyncio.CancelledError) and not works[1].began.is_set()
    works[2].gate.set()
    assert await guard.wait(third) and third.result() == first.result() == "done"
    assert second.has_begun
    assert (guard.running, guard.inflight) == (0, 0)


async def third_begins(work: Work) -> None:
    async with asyncio.timeout(SOON):  # virtual: it never begins where the turn is lost
        await work.began.wait()


@in_virtual_time
async def test_an_error_nobody_asks_for_is_no_warning() -> None:
    complaints: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    guard = Guard(NEVER, 1)
    call = guard.start(raising(ValueError("unheard")))
    assert await call.ended()
    assert isinstance(call.error, ValueError)
    del call
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize("is_stubborn", [True, False])
@in_virtual_time
async def test_closing_waits_until_every_call_has_let_go(is_stubborn: bool) -> None:
    guard, booked = Guard(NEVER, 3), list[TierCall[str]]()
    works = [Work(is_stubborn=is_stubborn) for _ in range(3)]
    for work in works:
        guard.start(work, booked.append)
    await works[0].began.wait()
    await works[1].began.wait()
    closing = asyncio.create_task(guard.aclose())
    if is_stubborn:
        done, _ = await asyncio.wait({closing}, timeout=SOON)
        assert not done
        for work in works:
            work.gate.set()
    await closing
    assert len(booked) == 3
    assert guard.inflight == 0
    assert not works[2].began.is_set()


@in_virtual_time
async def test_a_closing_guard_admits_nothing() -> None:
    """A request that tries again when its call is cancelled must not keep the cache open."""
    guard, work = Guard(NEVER, 2), Work()

    async def insist() -> int:
        tries = 0
        while True:
            try:
                call = guard.start(work)
            except Refused:
                return tries
            tries += 1
            await guard.wait(call)

    insisting = asyncio.create_task(insist())
    await work.began.wait()
    await guard.aclose()
    assert await insisting == 1
    with pytest.raises(Refused):
        guard.start(work)


# -- turns ---------------------------------------------------------------------------------------


async def some_turns() -> None:
    """Let everything happen that needs no time to pass."""
    for _ in range(20):
        await asyncio.sleep(0)


class Crowd:
    """Calls that wait at one gate each, and the order in which they began."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.began: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.calls: dict[str, TierCall[None]] = {}

    def start(self, name: str, *, nbytes: int = 0) -> TierCall[None]:
        """Start a call; one whose name begins with "w" writes."""
        gate = self.gates[name] = asyncio.Event()

        async def work() -> None:
            self.began.append(name)
            await gate.wait()

        lane = Lane.WRITES if name.startswith("w") else Lane.READS
        self.calls[name] = self.guard.start(work, lane=lane, nbytes=nbytes)
        return self.calls[name]

    async def end(self, name: str) -> None:
        self.gates[name].set()
        assert await self.calls[name].ended()
        await some_turns()


@in_virtual_time
async def test_reads_go_before_writes_that_came_first() -> None:
    guard = Guard(NEVER, 1)
    crowd = Crowd(guard)
    for name in ("r0", "w1", "w2", "r1", "r2"):
        crowd.start(name)
    await some_turns()
    for name in ("r0", "r1", "r2", "w1", "w2"):
        await crowd.end(name)
    assert crowd.began == ["r0", "r1", "r2", "w1", "w2"]
    await guard.aclose()


@pytest.mark.parametrize(
    ("turns", "reads", "writes"),
    [(1, 1, 1), (2, 1, 1), (3, 2, 1), (4, 3, 1), (8, 7, 2), (12, 11, 3), (16, 14, 4), (32, 28, 8)],
)
@in_virtual_time
async def test_writes_take_a_quarter_of_the_turns_and_reads_leave_an_eighth(
    turns: int, reads: int, writes: int
) -> None:
    for first in ("reads", "writes"):
        guard = Guard(NEVER, turns)
        crowd = Crowd(guard)
        names = [*(f"r{i}" for i in range(2 * turns)), *(f"w{i}" for i in range(2 * turns))]
        for name in names if first == "reads" else reversed(names):
            crowd.start(name)
            await some_turns()
        took = {kind: sum(name.startswith(kind) for name in crowd.began) for kind in "rw"}
        if turns == 1:  # the one turn goes to whoever comes first, and then to reads
            assert took == ({"r": 1, "w": 0} if first == "reads" else {"r": 0, "w": 1})
        else:
            assert took["r"] == (reads if first == "reads" else min(reads, turns - writes))
            assert took["w"] == (min(writes, turns - reads) if first == "reads" else writes)
        await guard.aclose()


@in_virtual_time
async def test_calls_that_left_the_queue_are_forgotten_though_no_turn_comes() -> None:
    """Requests that give up while a tier is stuck must not be remembered for as long as it is."""
    guard = Guard(NEVER, 1)
    stuck = Work(is_stubborn=True)
    guard.start(stuck)
    await stuck.began.wait()
    for _ in range(3):
        calls = [guard.start(Work()) for _ in range(50)]
        await some_turns()
        for call in calls:
            call.cancel()
            await call.ended()
    assert guard.inflight == 1
    assert len(guard._reads.waiting) == 0
    stuck.gate.set()
    await guard.aclose()


@in_virtual_time
async def test_a_queue_full_of_writes_keeps_no_read_out() -> None:
    guard = Guard(NEVER, 4, max_queued=16)
    crowd = Crowd(guard)
    for i in range(17):
        crowd.start(f"w{i}")
    with pytest.raises(Refused) as no:
        crowd.start("w17")
    assert no.value.cause is Cause.BUSY
    crowd.start("r0")
    await some_turns()
    assert "r0" in crowd.began
    await guard.aclose()


# -- bytes ---------------------------------------------------------------------------------------


@in_virtual_time
async def test_the_write_that_would_pass_the_bound_of_bytes_is_refused() -> None:
    guard = Guard(NEVER, 4, max_write_nbytes=100)
    crowd = Crowd(guard)
    crowd.start("w0", nbytes=60)
    crowd.start("w1", nbytes=40)
    for nbytes in (1, 40, 1000):
        with pytest.raises(Refused, match="100 bytes are waiting") as no:
            crowd.start("w2", nbytes=nbytes)
        assert no.value.cause is Cause.BUSY
    assert guard.inflight_nbytes == 100
    crowd.start("r0", nbytes=1000)  # reads hold memory that somebody waits for
    assert guard.inflight_nbytes == 1100
    await some_turns()
    await crowd.end("w0")
    crowd.start("w3", nbytes=60)
    with pytest.raises(Refused):
        crowd.start("w4", nbytes=1)
    assert guard.inflight_nbytes == 1100
    await guard.aclose()
    assert guard.inflight_nbytes == 0


@in_virtual_time
async def test_one_write_larger_than_the_bound_goes_alone() -> None:
    guard = Guard(NEVER, 4, max_write_nbytes=100)
    crowd = Crowd(guard)
    crowd.start("w0", nbytes=500)
    with pytest.raises(Refused):
        crowd.start("w1", nbytes=1)
    await some_turns()
    await crowd.end("w0")
    crowd.start("w2", nbytes=1)
    with pytest.raises(Refused):
        crowd.start("w3", nbytes=500)
    await guard.aclose()


# -- orphans -------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_cancelled_call_that_does_not_let_go_is_an_orphan_a_deadline_later() -> None:
    """Its requester has left, so nobody would notice that it keeps a turn for ever."""
    guard = Guard(SOON, 3)
    works = [Work(is_stubborn=True), Work(is_stubborn=True)]
    for work in works:
        call = guard.start(work)
        await work.began.wait()
        call.cancel()
    await asyncio.sleep(SOON - 0.1)
    assert guard.orphans == 0
    await asyncio.sleep(0.2)
    assert guard.orphans == 2
    with pytest.raises(Refused) as no:
        guard.start(Work())
    assert no.value.cause is Cause.BUSY
    for work in works:
        work.gate.set()
    await some_turns()
    assert guard.orphans == 0
    await guard.aclose()


@in_virtual_time
async def test_a_call_that_lets_go_when_cancelled_never_was_an_orphan() -> None:
    guard, work = Guard(SOON, 3), Work()
    call = guard.start(work)
    await work.began.wait()
    call.cancel()
    assert await call.ended()
    assert not call.was_late
    assert pending_timers() == []
    await guard.aclose()


@pytest.mark.parametrize("is_stubborn", [True, False])
@in_virtual_time
async def test_a_hint_is_cancelled_at_the_deadline_and_an_orphan_while_it_hangs_on(
    is_stubborn: bool,
) -> None:
    guard, work = Guard(SOON, 3), Work(is_stubborn=is_stubborn)
    guard.hint(work)
    await asyncio.sleep(SOON + 0.1)
    assert (guard.inflight, guard.orphans) == ((1, 1) if is_stubborn else (0, 0))
    work.gate.set()
    await some_turns()
    assert (guard.inflight, guard.orphans) == (0, 0)
    await guard.aclose()


@pytest.mark.parametrize("lane", Lane)
@in_virtual_time
async def test_a_call_whose_answer_is_lost_is_called_off_a_deadline_after_it_was_given_up(
    lane: Lane,
) -> None:
    """A network forgets requests. Else as many of them as turns would end the lane for ever."""
    guard, lost = Guard(SOON, 8), Work()
    calls = [guard.start(lost, lane=lane, nbytes=10) for _ in range(2)]
    if lane is Lane.READS:
        assert await asyncio.gather(*(guard.wait(call) for call in calls)) == [False, False]
    else:
        await asyncio.sleep(SOON + 0.01)  # nobody waits, but somebody watches
    assert (guard.orphans, guard.inflight_nbytes) == (2, 20)
    await asyncio.sleep(SOON - 0.1)
    assert guard.orphans == 2  # late is not lost yet
    await asyncio.sleep(0.2)
    assert (guard.orphans, guard.inflight, guard.inflight_nbytes) == (0, 0, 0)
    assert [call.was_late for call in calls] == [True, True]
    await guard.aclose()
    assert pending_timers() == []


@in_virtual_time
async def test_orphans_of_one_lane_do_not_refuse_the_other_until_they_hold_every_turn() -> None:
    guard = Guard(SOON, 8)
    works = [Work(is_stubborn=True) for _ in range(9)]
    reads = [guard.start(work) for work in works[:7]]
    assert await asyncio.gather(*(guard.wait(call) for call in reads)) == [False] * 7
    with pytest.raises(Refused):
        guard.start(Work())
    write = guard.start(works[7], lane=Lane.WRITES)
    assert not await guard.wait(write)
    assert guard.orphans == 8
    with pytest.raises(Refused):  # of the writes only one of two turns is stuck
        guard.start(works[8], lane=Lane.WRITES)
    for work in works:
        work.gate.set()
    await guard.aclose()


@in_virtual_time
async def test_settling_waits_while_the_lane_makes_progress_and_gives_up_when_it_does_not() -> None:
    guard, loop = Guard(SOON, 20), asyncio.get_running_loop()
    works = [Work(is_stubborn=True) for _ in range(5)]
    calls = [guard.start(work, lane=Lane.WRITES) for work in works]
    for i, work in enumerate(works[:3], 1):
        loop.call_at(1.5 * i, work.gate.set)
    late = await guard.settle(calls)
    assert loop.time() == pytest.approx(4.5 + SOON)
    assert set(late) == set(calls[3:])
    assert [call.was_late for call in calls] == [False, True, True, True, True]
    assert guard.orphans == 2  # the others were late, and have let go
    works[3].gate.set()
    works[4].gate.set()
    await guard.aclose()
