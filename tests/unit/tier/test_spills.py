"""Spills: what is written down is whole, held while it is read, and refused rather than queued."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stacks import Rig, chain_of, check_accounts, framed, make_rig

from kvlayer.errors import BackendError, BackendTimeoutError
from kvlayer.events import TierChanged
from kvlayer.identity.keys import ChunkChain
from kvlayer.results import Cause, Failure
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.transfer.spills import Write

SOON = 2.0


async def spill(
    rig: Rig, chain: ChunkChain, *, tail: bool = False
) -> tuple[list[Write], list[Failure]]:
    """Hold a prompt and start writing it down."""
    todo = rig.hold(chain, tail=tail)
    moves = [(slot.span, slot.record) for slot in todo.gathers]
    moves += [(span, found) for span, known in todo.skipped for found in known]
    refused: list[Failure] = []
    return await rig.stack.spills.start(moves, refused), refused


@pytest.mark.asyncio
async def test_a_written_object_is_on_the_tier_when_its_write_has_committed() -> None:
    rig, chain = make_rig(), chain_of(32)
    writes, refused = await spill(rig, chain)
    assert refused == []
    assert await rig.stack.spills.committed(writes) == []
    records = rig.planner.match(chain).path()
    assert [r.tiers for r in records] == [2, 2]  # known the moment committed() returns
    assert [len(stored) for stored in rig.backend.objects.values()] == [framed(4096)] * 2
    check_accounts(rig.planner, idle=True)
    assert (rig.tier.stored, rig.tier.stored_nbytes) == (2, 8192)
    await rig.aclose()


@pytest.mark.asyncio
async def test_no_byte_of_a_former_object_is_written() -> None:
    rig, chain = make_rig(), chain_of(16)
    rig.slab.view(0, rig.slab.nbytes)[:] = b"\xee" * rig.slab.nbytes
    writes, _ = await spill(rig, chain)
    await rig.stack.spills.committed(writes)
    (stored,) = rig.backend.objects.values()
    nbytes = rig.planner.payload(rig.planner.match(chain).path()[0].part, 16).segments()[0].nbytes
    assert not any(stored[4096 + nbytes :])
    await rig.aclose()


@pytest.mark.asyncio
async def test_an_object_being_written_is_held_in_host_memory() -> None:
    rig, chain = make_rig(pages=2), chain_of(32)
    rig.backend.gate = asyncio.Event()
    writes, _ = await spill(rig, chain)
    await rig.backend.arrived.wait()
    other = rig.planner.plan_store(chain_of(16, seed=1), 0, tail=False, holds=lambda _g, _s: True)
    assert other.gathers == []
    assert rig.planner.evict(rig.planner.match(chain).path(), Cause.CLEARED, "") == []
    rig.backend.gate.set()
    assert await rig.stack.spills.committed(writes) == []
    check_accounts(rig.planner, idle=True)
    assert len(rig.planner.evict(rig.planner.match(chain).path(), Cause.CLEARED, "")) == 2
    await rig.aclose()


@pytest.mark.asyncio
async def test_two_stores_of_the_same_content_write_it_once() -> None:
    rig, chain = make_rig(), chain_of(32)
    rig.backend.gate = asyncio.Event()
    first, _ = await spill(rig, chain)
    second, _ = await spill(rig, chain)
    assert [write.call for write in second] == [write.call for write in first]
    rig.backend.gate.set()
    await rig.stack.spills.committed(first)
    third, _ = await spill(rig, chain)
    assert third == []
    assert rig.backend.count("put") == 2
    await rig.aclose()


@pytest.mark.asyncio
async def test_what_failed_to_be_written_is_written_by_the_next_store() -> None:
    rig, chain = make_rig(), chain_of(16)
    rig.backend.fails = BackendError("full")
    writes, _ = await spill(rig, chain)
    (failure,) = await rig.stack.spills.committed(writes)
    assert (failure.cause, failure.tier, failure.span) == (
        Cause.TIER_DOWN,
        "tier-1",
        chain.span(0),
    )
    assert rig.planner.match(chain).path()[0].tiers == 0
    rig.backend.fails = None
    writes, _ = await spill(rig, chain)
    assert len(writes) == 1
    assert await rig.stack.spills.committed(writes) == []
    # One object that fails says nothing of the tier.
    assert [e.ok for e in rig.events if isinstance(e, TierChanged)] == []
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_two_objects_that_fail_in_a_row_are_the_tiers_trouble() -> None:
    rig, chain = make_rig(), chain_of(32)
    rig.backend.fails = BackendError("full")
    writes, _ = await spill(rig, chain)
    assert len(await rig.stack.spills.committed(writes)) == 2
    assert not rig.tier.health().ok
    rig.backend.fails = None
    writes, _ = await spill(rig, chain)
    assert await rig.stack.spills.committed(writes) == []
    assert [e.ok for e in rig.events if isinstance(e, TierChanged)] == [False, True]
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (BackendError("broken"), Cause.TIER_DOWN),
        (BackendTimeoutError("slow"), Cause.DEADLINE),
        (RuntimeError("a bug"), Cause.TIER_DOWN),
        (OSError(28, "No space left on device"), Cause.TIER_DOWN),
    ],
)
async def test_a_write_that_raises_is_a_failure_and_leaves_no_pin(
    fault: Exception, cause: Cause
) -> None:
    rig, chain = make_rig(), chain_of(32)
    rig.backend.raises = fault
    writes, _ = await spill(rig, chain)
    failed = await rig.stack.spills.committed(writes)
    assert [f.cause for f in failed] == [cause, cause]
    assert rig.planner.match(chain).tokens == 32  # host memory still serves
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("results", [[], [None, None], ["?"]])
async def test_a_tier_that_answers_nonsense_has_not_stored(results: list[Any]) -> None:
    rig, chain = make_rig(), chain_of(16)
    rig.backend.results = results
    writes, _ = await spill(rig, chain)
    (failure,) = await rig.stack.spills.committed(writes)
    assert failure.cause is Cause.TIER_DOWN
    assert rig.planner.match(chain).path()[0].tiers == 0
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_a_deadline_frees_the_store_and_is_paid_once_per_tier() -> None:
    rig, chain = make_rig(deadline=SOON, max_inflight=8), chain_of(64)
    rig.backend.gate, rig.backend.is_stubborn = asyncio.Event(), True
    writes, _ = await spill(rig, chain)
    failed = await rig.stack.spills.committed(writes)
    assert [f.cause for f in failed] == [Cause.DEADLINE] * 4
    # A quarter of eight turns writes. What waited behind them waits on, and nothing holds it.
    assert rig.planner.host.pinned_nbytes == 2 * 4096  # the bytes are still being read
    assert rig.stack.spills.queued(1) == 2
    assert rig.tier.misses == {Cause.DEADLINE: 1}
    rig.backend.gate.set()
    rig.tier.guard.deadline = 30.0  # only the wait above was meant to run into it
    await rig.settled()
    assert [r.tiers for r in rig.planner.match(chain).path()] == [2, 2, 0, 0]  # late is not lost
    await asyncio.sleep(60)  # the breaker's pause is over: one that waits tries, the other follows
    assert [r.tiers for r in rig.planner.match(chain).path()] == [2, 2, 2, 2]
    check_accounts(rig.planner, idle=True)
    assert rig.tier.guard.orphans == 0
    await rig.aclose()


@pytest.mark.asyncio
async def test_past_the_bound_a_write_waits_for_its_turn() -> None:
    rig, chain = make_rig(max_inflight=1, max_queued=1), chain_of(64)
    rig.backend.gate = asyncio.Event()
    writes, refused = await spill(rig, chain)
    assert (len(writes), refused) == (4, [])
    await rig.backend.arrived.wait()
    assert rig.planner.host.pinned_nbytes <= 2 * 4096  # what waits is held by nobody
    assert rig.stack.spills.queued(1) >= 2
    rig.backend.gate.set()
    assert await rig.stack.spills.committed(writes) == []
    assert rig.tier.misses.total() == 0
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_write_back_returns_nothing_to_wait_for_and_flush_waits() -> None:
    rig, chain = make_rig(write="back"), chain_of(32)
    rig.backend.gate = asyncio.Event()
    writes, _ = await spill(rig, chain)
    assert writes == []
    flushing = asyncio.create_task(rig.stack.spills.flush())
    await rig.backend.arrived.wait()
    assert not flushing.done()
    rig.backend.gate.set()
    await flushing
    assert len(rig.backend.objects) == 2
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_read_only_tier_is_never_written() -> None:
    rig, chain = make_rig(write="never"), chain_of(32)
    assert await spill(rig, chain) == ([], [])
    await rig.stack.spills.flush()
    assert rig.backend.count("put") == 0
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_tier_without_tails_gets_full_chunks_only() -> None:
    rig, chain = make_rig(tails=False), chain_of(24)
    writes, _ = await spill(rig, chain, tail=True)
    assert [w.span.stop for w in writes] == [16]
    await rig.stack.spills.committed(writes)
    await rig.aclose()


@pytest.mark.asyncio
async def test_each_tier_is_written_and_one_that_fails_does_not_hide_the_other() -> None:
    rig, chain = make_rig(tiers=2), chain_of(16)
    rig.backends[0].fails = BackendError("broken")
    writes, _ = await spill(rig, chain)
    (failure,) = await rig.stack.spills.committed(writes)
    assert failure.tier == "tier-1"
    assert rig.planner.match(chain).path()[0].tiers == 4
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("is_stubborn", [True, False])
async def test_closing_ends_writes_and_gives_every_pin_back(is_stubborn: bool) -> None:
    rig, chain = make_rig(max_inflight=2), chain_of(64)
    rig.backend.gate, rig.backend.is_stubborn = asyncio.Event(), is_stubborn
    await spill(rig, chain)
    await rig.backend.arrived.wait()
    closing = asyncio.create_task(rig.stack.aclose())
    if is_stubborn:
        await asyncio.sleep(0)
        assert not closing.done()
        assert rig.planner.host.pinned_nbytes > 0
        rig.backend.gate.set()
    await closing
    check_accounts(rig.planner, idle=True)
    assert rig.backend.objects == {} or is_stubborn
    assert rig.tier.health().ok  # it was told to stop
    await rig.aclose()


@pytest.mark.asyncio
async def test_cancelling_the_store_leaves_its_writes_to_finish() -> None:
    rig, chain = make_rig(), chain_of(16)
    rig.backend.gate = asyncio.Event()
    writes, _ = await spill(rig, chain)
    waiting = asyncio.create_task(rig.stack.spills.committed(writes))
    await rig.backend.arrived.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    rig.backend.gate.set()
    await rig.settled()
    assert len(rig.backend.objects) == 1
    check_accounts(rig.planner, idle=True)
    await rig.aclose()
