"""Demotion: host memory is emptied in the background, and nothing is lost or blocked by it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest
import pytest_asyncio
from hang import HANG
from stacks import Rig, chain_of, check_accounts, make_rig, pattern

from kvlayer.errors import BackendError
from kvlayer.events import ObjectsEvicted
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.layout import KVView
from kvlayer.results import Cause
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.guard import Lane
from kvlayer.tier.planner.records import HostState
from kvlayer.tier.stack import Window

PAGES = 20
MARKS = (0.8, 0.9)  # of 20 pages: from 19 on there is too much, at 16 it is enough


Demoting: TypeAlias = Callable[..., Rig]


@asynccontextmanager
async def making() -> AsyncGenerator[Demoting]:
    """Makes rigs, and closes them whatever became of the test."""
    rigs: list[Rig] = []

    def make(**more: Any) -> Rig:
        settings = {
            "pages": PAGES,
            "write": "demote",
            "watermarks": MARKS,
            "max_inflight": 32,  # eight writes
            **more,
        }
        rigs.append(make_rig(**settings))
        return rigs[-1]

    try:
        yield make
    finally:
        for rig in rigs:
            await rig.aclose()


@pytest_asyncio.fixture
async def demoting() -> AsyncIterator[Demoting]:
    """:func:`making`, of a test's own loop."""
    async with making() as make:
        yield make


async def store(rig: Rig, seed: int, *, tokens: int = 16, tail: bool = False) -> None:
    """Store one prompt through the stack; one page per chunk."""
    view = KVView([], [range(tokens)])
    await rig.stack.store(chain_of(tokens, seed=seed), view, Window(0, tokens), tail=tail)


async def fill(rig: Rig, count: int, *, first: int = 0) -> None:
    for seed in range(first, first + count):
        await store(rig, seed)


def used(rig: Rig) -> int:
    return rig.planner.host.extents.used // 4096


def place(rig: Rig, seed: int) -> tuple[bool, int]:
    """Whether a prompt is in host memory, and on which tiers."""
    (record,) = rig.planner.match(chain_of(16, seed=seed)).path()
    return record.host is HostState.READY, record.tiers


def serve_again(rig: Rig) -> None:
    """As when the breaker's pause is over and a trial went well."""
    rig.tier.guard.succeeded(Lane.WRITES)


@pytest.mark.asyncio
async def test_below_the_mark_nothing_is_written_and_nothing_leaves(demoting: Demoting) -> None:
    rig = demoting()
    await fill(rig, 18)
    await rig.stack.flush()
    assert rig.backend.count("put") == 0
    assert used(rig) == 18


@pytest.mark.asyncio
async def test_above_the_mark_the_coldest_objects_move_down_and_are_found_there(
    demoting: Demoting,
) -> None:
    rig = demoting()
    await fill(rig, 19)
    await rig.stack.flush()
    assert used(rig) == 16
    assert rig.backend.count("put") == 3
    assert [place(rig, seed) for seed in range(4)] == [(False, 2)] * 3 + [(True, 0)]
    assert rig.stack.host.demoted == 3
    assert rig.stack.host.evicted == 0
    events = [e for e in rig.events if isinstance(e, ObjectsEvicted)]
    assert {e.policy for e in events} == {"demotion"}
    assert sum(len(e.keys) for e in events) == 3
    assert sum(e.nbytes for e in events) == 3 * 4096
    rig.stager.bytes.clear()
    match = rig.planner.match(chain_of(16))
    report = await rig.stack.retrieve(match, KVView([], [range(16)]), Window(0, 16))
    assert report.tokens == 16
    assert rig.stager.bytes == [pattern(0, match.path()[0].part, 4096)]
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_what_a_tier_got_when_it_was_stored_is_dropped_without_a_write(
    demoting: Demoting,
) -> None:
    rig = demoting(write="through")
    await fill(rig, 19)
    await rig.stack.flush()
    assert used(rig) == 16
    assert rig.backend.count("put") == 19
    assert rig.stack.host.demoted == 3
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_a_store_that_failed_on_its_way_down_is_tried_again_before_it_leaves(
    demoting: Demoting,
) -> None:
    rig = demoting(write="through")
    rig.backend.fails = BackendError("full")
    await fill(rig, 3)
    rig.backend.fails = None
    await fill(rig, 16, first=3)
    await rig.stack.flush()
    assert [place(rig, seed) for seed in range(4)] == [(False, 2)] * 3 + [(True, 2)]


@pytest.mark.asyncio
async def test_a_round_goes_on_until_the_mark_however_much_there_is_to_drop(
    demoting: Demoting,
) -> None:
    rig = demoting(write="through", pages=600, watermarks=(0.1, 0.9))
    rig.backend.gate = asyncio.Event()
    storing = asyncio.create_task(store(rig, 0, tokens=16 * 560))
    while sum(left.objects for left in rig.stack.spills.unwritten()) < 560:  # noqa: ASYNC110
        await asyncio.sleep(0)
    rig.backend.gate.set()  # all of it is still to be written when it settles
    await storing
    await rig.stack.flush()
    # What the tier was being given when the round passed it stays: it counted as gone.
    assert 60 <= used(rig) <= 60 + 2 * 8
    check_accounts(rig.planner, idle=True)


@pytest.mark.parametrize("is_prefetch", [True, False])
@pytest.mark.asyncio
async def test_a_loaded_prompt_makes_room_too(demoting: Demoting, is_prefetch: bool) -> None:
    rig = demoting()
    await fill(rig, 19)
    await rig.stack.flush()
    await fill(rig, 2, first=30)
    assert used(rig) == 18
    match = rig.planner.match(chain_of(16))
    if is_prefetch:
        await rig.stack.promote(match)
    else:
        await rig.stack.retrieve(match, KVView([], [range(16)]), Window(0, 16))
    await rig.stack.flush()
    assert used(rig) == 16
    assert place(rig, 0) == (True, 2)
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_a_tier_that_fails_ends_the_round_and_loses_nothing_that_fits(
    demoting: Demoting,
) -> None:
    rig = demoting()
    rig.backend.fails = BackendError("dead")
    await fill(rig, 19)
    await rig.stack.flush()
    assert used(rig) == 19
    tried = rig.backend.count("put")
    assert 0 < tried <= 8  # one attempt, no busy loop
    assert rig.tier.misses[Cause.TIER_DOWN] == tried
    assert all(place(rig, seed) == (True, 0) for seed in range(19))
    await store(rig, 19)
    assert used(rig) == 20
    await rig.stack.flush()
    await store(rig, 20)  # it does not fit any more: what the store needs goes, as ever
    await rig.stack.flush()
    assert rig.planner.match(chain_of(16)).tokens == 0
    assert all(place(rig, seed) == (True, 0) for seed in range(1, 21))
    assert rig.stack.host.demoted == 0
    assert rig.stack.host.evicted == 1
    rig.backend.fails = None
    serve_again(rig)
    await store(rig, 21)
    await rig.stack.flush()
    assert used(rig) == 16
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_a_tier_that_is_not_asked_for_now_ends_the_round(demoting: Demoting) -> None:
    rig = demoting()
    rig.tier.guard.missed(Lane.WRITES, "dead")
    await fill(rig, 19)
    await rig.stack.flush()
    assert rig.backend.count("put") == 0
    assert rig.tier.misses[Cause.TIER_DOWN] == 1  # none of those behind the first is tried
    assert used(rig) == 19
    check_accounts(rig.planner, idle=True)
    serve_again(rig)
    await store(rig, 19)
    await rig.stack.flush()
    assert used(rig) == 16


@pytest.mark.asyncio
async def test_a_tier_that_admits_few_at_once_gets_them_one_after_the_other(
    demoting: Demoting,
) -> None:
    rig = demoting(max_inflight=1, max_queued=0)
    await fill(rig, 19)
    await rig.stack.flush()
    assert used(rig) == 16
    await rig.stack.flush(drain=True)
    assert rig.backend.count("put") == 19
    assert rig.tier.misses.total() == 0
    check_accounts(rig.planner, idle=True)


@in_virtual_time
async def test_a_tier_that_hangs_holds_what_is_above_the_low_mark_and_no_more() -> None:
    async with making() as demoting:
        rig = demoting(deadline=0.002)
        rig.backend.gate, rig.backend.is_stubborn = asyncio.Event(), True
        await fill(rig, 19)
        await rig.stack.demotion.settled()
        assert 0 < rig.planner.host.pinned_nbytes <= 3 * 4096
        assert rig.tier.misses[Cause.DEADLINE] == 1
        for seed in range(19, 60):
            await store(rig, seed)
            await rig.stack.demotion.settled()
        assert rig.planner.host.pinned_nbytes <= 4 * 4096
        assert all(place(rig, seed) == (True, 0) for seed in range(44, 60))  # stores went on
        rig.tier.guard.deadline = 30.0
        rig.backend.gate.set()
        await rig.settled()
        assert rig.planner.host.pinned_nbytes == 0
        late = [seed for seed in range(60) if rig.planner.match(chain_of(16, seed=seed)).tokens]
        assert late[:2] == [0, 1]  # written too late to leave, and not lost
        serve_again(rig)
        await store(rig, 60)
        await rig.stack.flush()
        assert used(rig) == 16
        check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_what_is_asked_for_while_it_is_written_stays_in_host_memory(
    demoting: Demoting,
) -> None:
    rig = demoting()
    rig.backend.gate = asyncio.Event()
    await fill(rig, 19)
    await rig.backend.arrived.wait()
    lease = rig.planner.lease(rig.planner.match(chain_of(16)), owner="", seconds=9.0)
    rig.backend.gate.set()
    await rig.stack.flush()
    rig.planner.release(lease.number)
    assert place(rig, 0) == (True, 2)
    assert place(rig, 1) == (False, 2)
    assert used(rig) == 16  # another went in its place
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_every_tier_that_waits_for_it_gets_an_object_before_it_leaves(
    demoting: Demoting,
) -> None:
    rig = demoting(tiers=2)
    await fill(rig, 19)
    await rig.stack.flush()
    assert [place(rig, seed) for seed in range(3)] == [(False, 6)] * 3
    rig.backends[0].fails = BackendError("dead")
    await fill(rig, 3, first=19)
    await rig.stack.flush()
    assert place(rig, 3) == (False, 4)  # one failed, the other has it
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_tails_a_tier_does_not_take_are_left_to_the_stores_that_need_room(
    demoting: Demoting,
) -> None:
    rig = demoting(tails=False)
    for seed in range(19):
        await store(rig, seed, tokens=4, tail=True)
    await rig.stack.flush()
    assert (used(rig), rig.backend.count("put")) == (19, 0)
    for seed in range(20, 60):
        await store(rig, seed)
        await rig.stack.flush()
    left = [seed for seed in range(19) if rig.planner.match(chain_of(4, seed=seed)).tokens]
    assert len(left) <= 4  # what lies above the low mark: they crowd out nothing else
    assert all(rig.planner.match(chain_of(16, seed=seed)).tokens for seed in range(20, 60))
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_a_tier_that_forgets_at_once_is_not_written_for_ever(demoting: Demoting) -> None:
    rig = demoting()
    put = rig.backend.put

    async def forgetful(writes):  # type: ignore[no-untyped-def]
        done = await put(writes)
        asyncio.get_running_loop().call_soon(
            rig.planner.vanished, [w.key for w in writes], 1, "evicted", Cause.EVICTED
        )
        await asyncio.sleep(0)
        return done

    rig.backend.put = forgetful  # type: ignore[method-assign]
    spilled = rig.planner.spilled

    def noted(record, tier, **how):  # type: ignore[no-untyped-def]
        spilled(record, tier, **how)
        rig.planner.vanished([record.key], tier, "evicted", Cause.EVICTED)

    rig.planner.spilled = noted  # type: ignore[method-assign]
    await fill(rig, 19)
    await asyncio.wait_for(rig.stack.flush(), HANG)
    assert used(rig) == 19
    assert rig.backend.count("put") == 3
    check_accounts(rig.planner, idle=True)


class Moody(PrefixLRU):
    """Somebody's policy with a bug in it."""

    def victim(self) -> int | None:
        raise ZeroDivisionError


@pytest.mark.asyncio
async def test_a_policy_that_raises_is_replaced_with_one_log_line_and_the_round_goes_on(
    demoting: Demoting,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = demoting(policy=Moody)
    await fill(rig, 18)
    with caplog.at_level(logging.ERROR, "kvlayer"):
        await store(rig, 18)
        await rig.stack.flush()
    (record,) = caplog.records
    assert "raised ZeroDivisionError: prefix-lru takes its place" in record.message
    assert used(rig) == 16


@pytest.mark.asyncio
@pytest.mark.parametrize("is_stubborn", [True, False])
async def test_closing_ends_a_round_and_gives_every_hold_back(
    demoting: Demoting, is_stubborn: bool
) -> None:
    rig = demoting()
    rig.backend.gate, rig.backend.is_stubborn = asyncio.Event(), is_stubborn
    await fill(rig, 19)
    await rig.backend.arrived.wait()
    closing = asyncio.create_task(rig.stack.aclose())
    if is_stubborn:
        for _ in range(10):
            await asyncio.sleep(0)
        assert not closing.done()  # the bytes are still being read
        assert rig.planner.host.pinned_nbytes > 0
        rig.backend.gate.set()
    await closing
    assert rig.stack.demotion._round is None
    check_accounts(rig.planner, idle=True)
    assert used(rig) == 19
    tried = rig.tier.misses[Cause.BUSY]
    rig.stack.demotion.grown()  # and no other round begins
    await rig.stack.demotion.settled()
    assert rig.tier.misses[Cause.BUSY] == tried


@pytest.mark.asyncio
async def test_one_round_at_a_time(demoting: Demoting) -> None:
    rig = demoting()
    rig.backend.gate = asyncio.Event()
    await fill(rig, 19)
    while rig.backend.count("put") < 3:  # noqa: ASYNC110  # a thread checks them first
        await asyncio.sleep(0)
    await store(rig, 19)
    for _ in range(100):
        await asyncio.sleep(0)
    assert rig.backend.count("put") == 3
    rig.backend.gate.set()
    await rig.stack.flush()
    assert used(rig) == 16  # what came meanwhile is taken along


# -- the end of the process ---------------------------------------------------------------------


@pytest.mark.asyncio
async def test_draining_writes_what_host_memory_alone_holds_and_drops_nothing(
    demoting: Demoting,
) -> None:
    rig = demoting()
    await fill(rig, 10)
    await rig.stack.flush(drain=True)
    assert [place(rig, seed) for seed in range(10)] == [(True, 2)] * 10
    assert rig.backend.count("put") == 10
    await rig.stack.flush(drain=True)
    assert rig.backend.count("put") == 10
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_draining_goes_on_without_a_tier_that_fails(demoting: Demoting) -> None:
    rig = demoting(tiers=2)
    rig.backends[0].fails = BackendError("dead")
    await fill(rig, 18)
    await rig.stack.flush(drain=True)
    assert [place(rig, seed) for seed in range(18)] == [(True, 4)] * 18
    assert rig.backends[0].count("put") <= 8
    check_accounts(rig.planner, idle=True)


@pytest.mark.asyncio
async def test_draining_writes_to_tiers_that_wait_for_it_alone(demoting: Demoting) -> None:
    rig = demoting(write="through")
    rig.backend.fails = BackendError("full")
    await fill(rig, 10)
    tried = rig.backend.count("put")
    await rig.stack.flush(drain=True)
    assert rig.backend.count("put") == tried
