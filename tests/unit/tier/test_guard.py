"""The guard: a deadline frees the waiter, never the call; too much is refused, never queued."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kvlayer.tier.guard import Call, Guard, Refused

SOON = 0.002
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


def raising(error: Exception) -> Callable[[], Coroutine[Any, Any, str]]:
    async def work() -> str:
        raise error

    return work


@pytest.mark.asyncio
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


@pytest.mark.asyncio
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


@pytest.mark.asyncio
async def test_past_the_bound_of_orphans_everything_is_refused_until_one_comes_back() -> None:
    guard = Guard(SOON, 2)
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


@pytest.mark.asyncio
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


@pytest.mark.asyncio
async def test_no_more_calls_run_at_once_than_may() -> None:
    guard, running, most = Guard(NEVER, 3), 0, 0
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


@pytest.mark.asyncio
async def test_a_call_cancelled_before_it_starts_is_booked_and_never_runs() -> None:
    guard, work, booked = Guard(NEVER, 1), Work(), list[Call[str]]()
    call = guard.start(work, booked.append)
    call.cancel()
    assert await guard.wait(call)
    assert booked == [call]
    assert isinstance(call.error, asyncio.CancelledError)
    assert not work.began.is_set()
    assert guard.inflight == 0


@pytest.mark.asyncio
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


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["result", "error", "cancel"])
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


@pytest.mark.asyncio
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


@pytest.mark.asyncio
async def test_an_error_nobody_asks_for_is_no_warning() -> None:
    guard = Guard(NEVER, 1)
    await guard.start(raising(ValueError("unheard"))).ended()


@pytest.mark.asyncio
@pytest.mark.parametrize("is_stubborn", [True, False])
async def test_closing_waits_until_every_call_has_let_go(is_stubborn: bool) -> None:
    guard, booked = Guard(NEVER, 2), list[Call[str]]()
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


@pytest.mark.asyncio
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
