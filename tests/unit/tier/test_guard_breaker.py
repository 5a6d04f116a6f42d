"""The guard and its breakers: who is refused, who tries a tier out; no trial is for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from kvlayer.results import Cause
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.breaker import BreakerState
from kvlayer.tier.guard.guard import Guard, Lane, Refused, TierCall

DEADLINE = 2.0
PAUSE = 1.0  # the first; a trial comes after half of it to all of it
STUCK = BreakerState.OPEN


class Work:
    """A call that waits at a gate; a stubborn one waits on through cancellations."""

    def __init__(self, *, is_stubborn: bool = False) -> None:
        self.gate = asyncio.Event()
        self.is_stubborn = is_stubborn
        self.began = 0
        self.raises: BaseException | None = None

    async def __call__(self) -> str:
        self.began += 1
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                if not self.is_stubborn:
                    raise
        if self.raises is not None:
            raise self.raises
        return "done"


class Probe(Work):
    """A probe that remembers when it was asked, and how many ran at once."""

    def __init__(self, *, answers: bool, is_stubborn: bool = False) -> None:
        super().__init__(is_stubborn=is_stubborn)
        self.at: list[float] = []
        self.running = self.most = 0
        if answers:
            self.gate.set()

    async def __call__(self) -> str:
        self.at.append(asyncio.get_running_loop().time())
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await super().__call__()
        finally:
            self.running -= 1


async def some_turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def now() -> float:
    return asyncio.get_running_loop().time()


def nothing_left(guard: Guard) -> bool:
    """No timer that would ring, no task but the test's own, nothing lent."""
    scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    assert [handle for handle in scheduled if not handle.cancelled()] == []
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert (guard.inflight, guard.inflight_nbytes, guard.orphans) == (0, 0, 0)
    return True


def state(guard: Guard, lane: Lane = Lane.READS) -> BreakerState:
    return guard.breaker(lane).state


# -- opening -------------------------------------------------------------------------------------


@in_virtual_time
async def test_opening_refuses_what_waits_and_keeps_what_runs_until_it_lets_go() -> None:
    guard = Guard(DEADLINE, 2)
    running, waiting, writing = Work(is_stubborn=True), Work(), Work()
    first = guard.start(running)
    others = [guard.start(waiting) for _ in range(5)]
    assert not await guard.wait(first)
    write = guard.start(writing, lane=Lane.WRITES)
    await some_turns()
    guard.missed(Lane.READS, "late")
    for call in others:
        assert await call.ended(0.001)
        assert isinstance(call.error, Refused)
        assert call.error.cause is Cause.TIER_DOWN
        assert "late" in call.error.detail
    assert waiting.began == 0
    assert (guard.inflight, guard.orphans) == (2, 1)  # the stuck read and the write
    with pytest.raises(Refused) as no:
        guard.start(waiting)
    assert no.value.cause is Cause.TIER_DOWN
    assert not write.has_ended  # the other direction is not concerned
    running.gate.set()
    writing.gate.set()
    assert await first.ended() and await write.ended()
    assert (guard.inflight, guard.orphans) == (0, 0)
    assert not guard.breaker(Lane.READS).is_closed  # a late end is no sign of health
    await guard.aclose()


@in_virtual_time
async def test_opening_is_told_once_with_its_reason() -> None:
    told: list[tuple[Lane, str]] = []
    guard = Guard(DEADLINE, 2)
    guard.on_opened = lambda lane, reason: told.append((lane, reason))
    for _ in range(5):
        guard.failed(Lane.WRITES, "full")
    guard.missed(Lane.WRITES, "late")
    guard.missed(Lane.READS, "silent")
    assert told == [(Lane.WRITES, "full"), (Lane.READS, "silent")]
    await guard.aclose()


@pytest.mark.parametrize("is_waited_for", [True, False])
@in_virtual_time
async def test_a_call_that_ran_longer_than_the_deadline_is_late_whoever_waited(
    is_waited_for: bool,
) -> None:
    """Else the late landing of what nobody waits for would close a breaker."""
    guard, work = Guard(DEADLINE, 4), Work()
    call = guard.start(work)
    if is_waited_for:
        assert not await guard.wait(call)
    await asyncio.sleep(DEADLINE + 0.1 - now())
    work.gate.set()
    assert await call.ended()
    assert call.was_late
    in_time = guard.start(work)
    assert await guard.wait(in_time) and not in_time.was_late
    await guard.aclose()


# -- writes without anybody who waits ------------------------------------------------------------


@in_virtual_time
async def test_writes_that_end_no_call_for_a_deadline_are_down() -> None:
    told: list[str] = []
    guard = Guard(DEADLINE, 8)  # two writes at once
    guard.on_opened = lambda lane, reason: told.append(f"{lane.value}: {reason}")
    stuck = Work(is_stubborn=True)
    calls = [guard.start(stuck, lane=Lane.WRITES, nbytes=10) for _ in range(6)]
    await asyncio.sleep(DEADLINE - 0.1)
    assert state(guard, Lane.WRITES) is BreakerState.CLOSED
    await asyncio.sleep(0.2)
    assert state(guard, Lane.WRITES) is BreakerState.OPEN
    assert told == ["writes: no write ended within 2.0 s"]
    assert [call.has_ended for call in calls] == [False] * 2 + [True] * 4
    assert (guard.orphans, guard.inflight_nbytes) == (2, 20)
    assert state(guard) is BreakerState.CLOSED
    stuck.gate.set()
    await some_turns()
    assert (guard.orphans, guard.inflight_nbytes) == (0, 0)
    assert state(guard, Lane.WRITES) is BreakerState.OPEN  # late ends close nothing
    await guard.aclose()


@in_virtual_time
async def test_slow_writes_that_make_progress_are_let_be() -> None:
    guard, ended = Guard(DEADLINE, 4), list[float]()

    async def write() -> None:
        await asyncio.sleep(DEADLINE - 0.01)
        ended.append(now())

    calls = [guard.start(write, lane=Lane.WRITES) for _ in range(20)]
    assert await guard.settle(calls) == []
    assert len(ended) == 20
    assert now() == pytest.approx(20 * (DEADLINE - 0.01))
    assert state(guard, Lane.WRITES) is BreakerState.CLOSED
    await asyncio.sleep(10 * DEADLINE)  # an idle lane is not watched
    assert state(guard, Lane.WRITES) is BreakerState.CLOSED
    assert nothing_left(guard)
    await guard.aclose()


# -- probing reads -------------------------------------------------------------------------------


@in_virtual_time
async def test_a_probe_that_answers_closes_the_breaker_and_is_told() -> None:
    guard, probe, told = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=True), list[float]()
    guard.probe = probe
    guard.on_probed = lambda: told.append(now())
    guard.missed(Lane.READS, "late")
    await asyncio.sleep(PAUSE / 2 - 0.001)
    assert probe.at == []
    assert not guard.serves
    await asyncio.sleep(PAUSE / 2 + 0.002)
    assert guard.serves
    assert probe.at == told
    assert PAUSE / 2 <= told[0] <= PAUSE
    await asyncio.sleep(100)
    assert len(probe.at) == 1
    assert nothing_left(guard)


@in_virtual_time
async def test_failing_probes_come_ever_later_and_users_pay_nothing_meanwhile() -> None:
    guard, probe = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=True)
    guard.probe, probe.raises = probe, OSError("unreachable")
    guard.missed(Lane.READS, "late")
    for _ in range(1000):
        with pytest.raises(Refused):
            guard.start(Work())
        await asyncio.sleep(0.5)
    pauses = [b - a for a, b in zip(probe.at, probe.at[1:], strict=False)]
    for pause, longest in zip(pauses, (2, 4, 8, 16, 32, 60, 60), strict=False):
        assert longest / 2 <= pause <= longest
    assert len(pauses) >= 7
    assert probe.most == 1
    assert guard.breaker(Lane.READS).reason == "OSError: unreachable"
    probe.raises = None
    await asyncio.sleep(61)
    assert guard.serves  # without a restart
    await guard.aclose()
    assert nothing_left(guard)


@in_virtual_time
async def test_a_probe_that_hangs_counts_as_failed_and_another_is_made() -> None:
    guard, probe = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=False)
    guard.probe = probe
    guard.missed(Lane.READS, "late")
    await asyncio.sleep(30)
    assert len(probe.at) >= 3
    assert probe.most == 1
    for a, b in zip(probe.at, probe.at[1:], strict=False):
        assert b - a >= DEADLINE
    assert "no answer to a probe within 2.0 s" in guard.breaker(Lane.READS).reason
    probe.gate.set()
    await asyncio.sleep(61)
    assert guard.serves
    await guard.aclose()


@in_virtual_time
async def test_a_probe_that_never_lets_go_is_made_once_and_does_not_pass_when_it_returns() -> None:
    guard, probe = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=False, is_stubborn=True)
    told: list[float] = []
    guard.probe, guard.on_probed = probe, lambda: told.append(now())
    guard.missed(Lane.READS, "late")
    await asyncio.sleep(1000)
    assert len(probe.at) == 1
    assert not guard.serves
    probe.gate.set()  # it answers 1,000 seconds late: that is no answer
    await some_turns()
    assert not guard.serves
    assert told == []
    await asyncio.sleep(PAUSE * 2 + 0.1)
    assert len(probe.at) == 2
    assert guard.serves
    assert len(told) == 1
    await guard.aclose()


@in_virtual_time
async def test_a_probe_that_the_tier_cancels_is_a_failure_and_not_an_endless_loop() -> None:
    guard, probe = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=True)
    guard.probe, probe.raises = probe, asyncio.CancelledError()
    guard.missed(Lane.READS, "late")
    await asyncio.sleep(10)
    assert 2 <= len(probe.at) <= 6
    assert state(guard) is BreakerState.OPEN
    probe.raises = None
    await asyncio.sleep(20)
    assert guard.serves
    await guard.aclose()


@in_virtual_time
async def test_a_probe_that_was_overtaken_tells_nothing() -> None:
    """A call succeeds, another misses its deadline, and only then the probe is answered."""
    guard, probe, told = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=False), list[float]()
    guard.probe, guard.on_probed = probe, lambda: told.append(now())
    guard.missed(Lane.READS, "late")
    await asyncio.sleep(PAUSE + 0.001)
    assert state(guard) is BreakerState.HALF_OPEN
    guard.succeeded(Lane.READS)
    assert guard.serves
    guard.missed(Lane.READS, "late again")
    probe.gate.set()
    await some_turns()
    assert told == []
    assert not guard.serves
    await asyncio.sleep(2 * PAUSE + 0.001)  # the second pause: one success does not make it short
    assert guard.serves
    assert len(told) == 1
    await guard.aclose()


@in_virtual_time
async def test_a_success_before_the_probe_makes_it_needless() -> None:
    guard, probe = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=True)
    guard.probe = probe
    guard.missed(Lane.READS, "late")
    guard.succeeded(Lane.READS)
    await asyncio.sleep(10)
    assert probe.at == []
    assert guard.serves
    assert nothing_left(guard)


@in_virtual_time
async def test_while_a_probe_runs_no_user_is_admitted() -> None:
    guard, probe = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=False)
    guard.probe = probe
    guard.missed(Lane.READS, "late")
    await asyncio.sleep(PAUSE + 0.001)
    with pytest.raises(Refused) as no:
        guard.start(Work())
    assert no.value.cause is Cause.TIER_DOWN
    await guard.aclose()


# -- trials by users' calls ----------------------------------------------------------------------


@in_virtual_time
async def test_one_write_tries_and_the_others_are_refused_until_it_has_ended() -> None:
    guard, work = Guard(DEADLINE, 8, pause=PAUSE), Work()
    guard.missed(Lane.WRITES, "late")
    with pytest.raises(Refused):
        guard.start(work, lane=Lane.WRITES)
    await asyncio.sleep(PAUSE)
    trial = guard.start(work, lambda _: guard.succeeded(Lane.WRITES), lane=Lane.WRITES)
    for _ in range(3):
        with pytest.raises(Refused) as no:
            guard.start(work, lane=Lane.WRITES)
        assert no.value.cause is Cause.TIER_DOWN
        await some_turns()
    assert work.began == 1
    work.gate.set()
    assert await trial.ended()
    assert state(guard, Lane.WRITES) is BreakerState.CLOSED
    assert await guard.start(work, lane=Lane.WRITES).ended()
    await guard.aclose()


async def due(guard: Guard, lane: Lane) -> None:
    """Open a breaker and wait until a trial is due."""
    guard.missed(lane, "late")
    await asyncio.sleep(guard.breaker(lane).trial_at - now())


def is_tried_again(guard: Guard, lane: Lane) -> bool:
    """Whether some later call is admitted: what a wedged breaker never does."""
    breaker = guard.breaker(lane)
    return breaker.is_closed or (breaker.state is STUCK and breaker.trial_at < now() + 61)


REFUSALS: dict[str, Callable[[Guard], Any]] = {
    "bytes": lambda guard: guard.start(Work(), lane=Lane.WRITES, nbytes=90),
    "queue": lambda guard: [guard.start(Work(), lane=Lane.WRITES) for _ in range(4)],
}


@pytest.mark.parametrize("why", REFUSALS)
@in_virtual_time
async def test_a_trial_that_is_refused_for_another_reason_is_none(why: str) -> None:
    guard = Guard(DEADLINE, 4, max_queued=3, max_write_nbytes=100, pause=0.5)
    REFUSALS[why](guard)
    # Opened by someone else's error: what is in flight stays, and is not late.
    guard.breaker(Lane.WRITES).missed(now(), "late")
    await asyncio.sleep(0.6)
    with pytest.raises(Refused) as no:
        guard.start(Work(), lane=Lane.WRITES, nbytes=20)
    assert no.value.cause is Cause.BUSY
    assert state(guard, Lane.WRITES) is BreakerState.OPEN
    assert is_tried_again(guard, Lane.WRITES)
    await guard.aclose()


@in_virtual_time
async def test_a_trial_that_is_refused_because_orphans_hold_every_turn_is_none() -> None:
    guard, stuck = Guard(DEADLINE, 4, pause=PAUSE), Work(is_stubborn=True)
    guard.start(stuck, lane=Lane.WRITES)
    await asyncio.sleep(DEADLINE + 10 * PAUSE)
    assert (guard.orphans, state(guard, Lane.WRITES)) == (1, BreakerState.OPEN)
    with pytest.raises(Refused) as no:
        guard.start(Work(), lane=Lane.WRITES)
    assert no.value.cause is Cause.BUSY
    stuck.gate.set()
    await some_turns()
    guard.start(stuck, lane=Lane.WRITES)  # the tier has let go: now it may be tried
    assert state(guard, Lane.WRITES) is BreakerState.HALF_OPEN
    await some_turns()
    assert state(guard, Lane.WRITES) is BreakerState.CLOSED
    await guard.aclose()


@pytest.mark.parametrize("lane", Lane)
@in_virtual_time
async def test_a_trial_that_is_called_off_leaves_the_next_call_to_try(lane: Lane) -> None:
    guard, work = Guard(DEADLINE, 4, pause=PAUSE), Work()
    for begin in (True, False):
        await due(guard, lane)
        trial = guard.start(work, lane=lane)
        if begin:
            await some_turns()
        trial.cancel()
        await trial.ended()
        assert state(guard, lane) is BreakerState.OPEN
        again = guard.start(work, lane=lane)  # at once
        work.gate.set()
        assert await again.ended()
        assert guard.breaker(lane).is_closed
        work.gate.clear()
    await guard.aclose()
    assert nothing_left(guard)


@pytest.mark.parametrize("lane", Lane)
@pytest.mark.parametrize("error", [ValueError("a bug"), asyncio.CancelledError()])
@in_virtual_time
async def test_a_trial_that_raises_what_nobody_reports_has_failed(
    error: BaseException, lane: Lane
) -> None:
    guard, work = Guard(DEADLINE, 4, pause=PAUSE), Work()
    work.raises = error
    work.gate.set()
    await due(guard, lane)
    assert await guard.start(work, lane=lane).ended()
    assert state(guard, lane) is BreakerState.OPEN
    with pytest.raises(Refused):
        guard.start(work, lane=lane)  # not at once
    assert is_tried_again(guard, lane)
    await guard.aclose()


@pytest.mark.parametrize("lane", Lane)
@in_virtual_time
async def test_a_trial_that_is_answered_with_what_is_no_fault_of_the_tier_passes(
    lane: Lane,
) -> None:
    """An object that vanished or was damaged: the tier is well, and says so."""
    guard, work = Guard(DEADLINE, 4, pause=PAUSE), Work()
    work.gate.set()
    await due(guard, lane)
    assert await guard.start(work, lane=lane).ended()
    assert guard.breaker(lane).is_closed
    await guard.aclose()


@pytest.mark.parametrize("lane", Lane)
@pytest.mark.parametrize("how", ["nobody waits", "its waiter left", "as a hint"])
@in_virtual_time
async def test_a_trial_that_is_not_answered_in_time_has_failed(how: str, lane: Lane) -> None:
    guard, work = Guard(DEADLINE, 4, pause=PAUSE), Work(is_stubborn=True)
    await due(guard, lane)
    if how == "as a hint":
        if lane is Lane.WRITES:
            return  # hints are questions
        guard.hint(work)
    else:
        trial = guard.start(work, lane=lane)
        await some_turns()
        if how == "its waiter left":
            trial.cancel()
        elif lane is Lane.READS:
            assert not await guard.wait(trial)
            guard.missed(lane, "as the waiter of a read says")
    await asyncio.sleep(DEADLINE + 0.1)
    assert state(guard, lane) is BreakerState.OPEN
    assert guard.orphans == 1
    work.gate.set()
    await some_turns()
    assert (state(guard, lane), guard.orphans) == (BreakerState.OPEN, 0)
    assert is_tried_again(guard, lane)
    await guard.aclose()
    assert nothing_left(guard)


@in_virtual_time
async def test_a_write_on_trial_that_waits_for_reads_is_no_wedge() -> None:
    guard, read, write = Guard(DEADLINE, 1, pause=PAUSE), Work(), Work()
    guard.start(read)
    await due(guard, Lane.WRITES)
    trial = guard.start(write, lane=Lane.WRITES)
    await asyncio.sleep(100)
    assert (write.began, state(guard, Lane.WRITES)) == (0, BreakerState.HALF_OPEN)
    read.gate.set()
    write.gate.set()
    assert await trial.ended()
    assert guard.breaker(Lane.WRITES).is_closed
    await guard.aclose()


@in_virtual_time
async def test_whatever_happens_a_lane_is_asked_again() -> None:
    """Random verdicts, cancellations and late ends: no sequence of them wedges a breaker."""
    for seed in range(60):
        rng = random.Random(seed)
        guard = Guard(DEADLINE, rng.choice([1, 4, 9]), max_queued=3, pause=PAUSE)
        guard.max_write_nbytes = 50
        works: list[Work] = []
        calls: list[TierCall[str]] = []
        for _ in range(60):
            lane = rng.choice(list(Lane))
            choice = rng.random()
            if choice < 0.4:
                work = Work(is_stubborn=rng.random() < 0.5)
                work.raises = rng.choice([None, None, ValueError("x"), asyncio.CancelledError()])
                if rng.random() < 0.5:
                    work.gate.set()
                works.append(work)
                try:
                    calls.append(guard.start(work, lane=lane, nbytes=rng.randrange(60)))
                except Refused:
                    works.pop()
            elif choice < 0.5 and calls:
                rng.choice(calls).cancel()
            elif choice < 0.6 and works:
                rng.choice(works).gate.set()
            elif choice < 0.7:
                rng.choice([guard.missed, guard.failed])(lane, "as they say")
            elif choice < 0.8:
                guard.succeeded(lane)
            else:
                await asyncio.sleep(rng.choice([0, 0, 0.3, 1, 3, 70]))
        for work in works:
            work.gate.set()
        await asyncio.sleep(130)
        assert (guard.inflight, guard.orphans, guard.inflight_nbytes) == (0, 0, 0)
        for lane in Lane:
            good = Work()
            good.gate.set()
            assert await guard.start(good, lane=lane).ended(), (seed, lane)
            assert guard.breaker(lane).is_closed
        await guard.aclose()
        assert nothing_left(guard)


# -- closing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stubborn", [True, False])
@in_virtual_time
async def test_closing_leaves_no_timer_task_or_lent_memory(is_stubborn: bool) -> None:
    guard = Guard(DEADLINE, 3, pause=PAUSE)
    probe = Probe(answers=False, is_stubborn=is_stubborn)
    guard.probe = probe
    works = [Work(is_stubborn=is_stubborn) for _ in range(8)]
    for work in works[:3]:
        guard.start(work)  # running and queued
    for work in works[3:6]:
        guard.start(work, lane=Lane.WRITES, nbytes=5)  # watched for progress
    guard.hint(works[6])  # expiring
    await some_turns()
    guard.missed(Lane.READS, "late")  # a probe is due
    await asyncio.sleep(PAUSE + 0.001)
    assert probe.running == 1
    closing = asyncio.ensure_future(guard.aclose())
    await asyncio.sleep(10 * DEADLINE)
    assert closing.done() is not is_stubborn
    for work in [*works, probe]:
        work.gate.set()
    await closing
    assert nothing_left(guard)
    with pytest.raises(Refused):
        guard.start(Work())
    await asyncio.sleep(1000)
    assert len(probe.at) == 1


@in_virtual_time
async def test_closing_before_the_probe_is_due_makes_none() -> None:
    guard, probe = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=True)
    guard.probe = probe
    guard.missed(Lane.READS, "late")
    await guard.aclose()
    assert nothing_left(guard)
    guard.missed(Lane.READS, "late again")
    assert nothing_left(guard)


@in_virtual_time
async def test_a_breaker_that_opens_while_the_guard_closes_plans_no_probe() -> None:
    guard, work = Guard(DEADLINE, 4, pause=PAUSE), Work(is_stubborn=True)
    guard.probe = Probe(answers=True)
    guard.start(work, lambda _: guard.missed(Lane.READS, "failed on its way out"))
    await some_turns()
    closing = asyncio.ensure_future(guard.aclose())
    await some_turns()
    work.gate.set()
    await closing
    assert nothing_left(guard)


# -- eager tasks ----------------------------------------------------------------------------------


def eager(loop: asyncio.AbstractEventLoop, work: Any, **_: Any) -> asyncio.Future[Any]:
    """Runs a task's work where it is created, as ``asyncio.eager_task_factory`` does.

    Only for work that does not wait: there the two are the same.
    """
    ended = loop.create_future()
    with pytest.raises(StopIteration) as stop:
        work.send(None)
    ended.set_result(stop.value.value)
    return ended


@in_virtual_time
async def test_a_probe_that_ends_where_it_begins_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tier would never be asked again, and closing would wait for ever."""
    guard, loop = Guard(DEADLINE, 4, pause=PAUSE), asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", eager))  # from Python 3.12 on
    answers = ["sick", "sick", None]
    asked: list[float] = []

    async def trouble() -> str | None:
        asked.append(loop.time())
        return answers.pop(0)

    monkeypatch.setattr(guard, "_trouble", trouble)
    guard.probe = Probe(answers=True)
    guard.missed(Lane.READS, "late")
    await asyncio.sleep(20)
    assert len(asked) == 3
    assert guard.serves
    await guard.aclose()


@in_virtual_time
async def test_a_probe_that_is_cancelled_by_others_is_made_again() -> None:
    guard, probe = Guard(DEADLINE, 4, pause=PAUSE), Probe(answers=False)
    guard.probe = probe
    guard.missed(Lane.READS, "late")
    await asyncio.sleep(PAUSE)
    assert guard._probing is not None
    guard._probing.cancel()
    probe.gate.set()
    await asyncio.sleep(2 * PAUSE)
    assert len(probe.at) > 1
    assert guard.serves
    await guard.aclose()
