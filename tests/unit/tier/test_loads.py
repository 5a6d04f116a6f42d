"""Loads: every object comes up once, in order, verified, or it is a shorter prefix with a cause."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from stacks import CHUNK, Rig, chain_of, check_accounts, framed, make_rig, pattern

from kvlayer.abc.backend import Read, ReadResult
from kvlayer.errors import BackendError, BackendTimeoutError, BackendUnavailableError
from kvlayer.events import ObjectQuarantined, TierChanged, TransferDone
from kvlayer.identity.keys import ChunkChain, ObjectKey
from kvlayer.results import Cause, Failure
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.guard import Lane
from kvlayer.tier.planner.records import HostState
from kvlayer.tier.transfer import loads
from kvlayer.tier.transfer.flight import Flight
from kvlayer.tier.transfer.loads import Wanted

SOON = 2.0


def wanted(rig: Rig, chain: ChunkChain) -> Wanted:
    match = rig.planner.match(chain)
    return [
        (span, [found for cover in covers for found in cover])
        for span, covers in zip(match.spans, match.covers, strict=True)
    ]


async def load(rig: Rig, chain: ChunkChain) -> tuple[int, list[Failure]]:
    """Bring a prompt up as ``retrieve`` does; how many spans arrived, and what ended it."""
    todo, trouble = wanted(rig, chain), list[Failure]()
    path = [found for _, records in todo for found in records]
    rig.planner.pin(path)
    done = 0
    try:
        async with aclosing(rig.stack.loads.arrive(todo, trouble)) as arrivals:
            async for batch in arrivals:
                for span, records in batch:
                    for found in records:
                        assert found.host is HostState.READY
                        view = rig.slab.view(found.offset, found.nbytes)
                        segment = rig.planner.payload(found.part, span.tokens).segments()[0]
                        expected = pattern(span.start, found.part, found.nbytes)
                        assert view[: segment.nbytes] == expected[: segment.nbytes]
                done += len(batch)
    finally:
        rig.planner.unpin(path)
    return done, trouble


def idle(rig: Rig) -> None:
    check_accounts(rig.planner, idle=True)
    assert rig.tier.guard.inflight == 0


@pytest.mark.asyncio
async def test_what_is_below_comes_up_and_stays() -> None:
    rig, chain = make_rig(), chain_of(64)
    await rig.send_down(chain)
    assert await load(rig, chain) == (4, [])
    assert rig.backend.count("get") == 4
    assert await load(rig, chain) == (4, [])
    assert rig.backend.count("get") == 4  # in host memory now
    assert (rig.tier.hits, rig.tier.misses.total()) == (4, 0)
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_spans_are_given_as_soon_as_they_are_there_without_waiting_for_later_ones() -> None:
    rig, chain = make_rig(), chain_of(48)
    rig.hold(chain_of(32))
    tail_only = rig.planner.plan_store(chain, 32, tail=False, holds=lambda _g, _s: True)
    rig.write_into(tail_only.gathers)
    rig.planner.stored(tail_only.gathers, ok=True)
    rig.planner.settle(chain, tail_only.gathers)
    await rig.stack.spills.start([(s.span, s.record) for s in tail_only.gathers], [])
    await rig.stack.spills.flush()
    rig.planner.evict([s.record for s in tail_only.gathers], Cause.CLEARED, "")
    rig.backend.gate = asyncio.Event()
    trouble: list[Failure] = []
    todo = wanted(rig, chain)
    assert len(todo) == 3
    async with aclosing(rig.stack.loads.arrive(todo, trouble)) as arrivals:
        first = await anext(arrivals)
        assert [span.stop for span, _ in first] == [16, 32]
        rig.backend.gate.set()
        second = await anext(arrivals)
        assert [span.stop for span, _ in second] == [48]
    await rig.aclose()


@pytest.mark.asyncio
async def test_what_was_taken_is_waited_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the end of a long load would let go of all of it at once."""
    rig, chain, left = make_rig(), chain_of(96), list[ObjectKey]()
    await rig.send_down(chain)
    leave = Flight.leave

    def leaves(flight: Flight) -> None:
        left.append(flight.key)
        leave(flight)

    monkeypatch.setattr(Flight, "leave", leaves)
    monkeypatch.setattr(loads, "FEW", 2)
    taken = list[ObjectKey]()
    async with aclosing(rig.stack.loads.arrive(wanted(rig, chain), [])) as arrivals:
        async for batch in arrivals:
            assert len(batch) == 2 and left == taken
            taken += [found.key for _, records in batch for found in records]
    assert left == taken and len(taken) == 6
    await rig.aclose()


@pytest.mark.asyncio
async def test_many_requests_for_one_object_are_one_transfer() -> None:
    rig, chain = make_rig(), chain_of(32)
    await rig.send_down(chain)
    rig.backend.gate = asyncio.Event()
    requests = [asyncio.create_task(load(rig, chain)) for _ in range(8)]
    await rig.backend.arrived.wait()
    rig.backend.gate.set()
    assert await asyncio.gather(*requests) == [(2, [])] * 8
    assert rig.backend.count("get") == 2
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_cancelling_one_request_leaves_the_transfer_to_the_others() -> None:
    rig, chain = make_rig(), chain_of(32)
    await rig.send_down(chain)
    rig.backend.gate = asyncio.Event()
    first, second = (asyncio.create_task(load(rig, chain)) for _ in range(2))
    await rig.backend.arrived.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    rig.backend.gate.set()
    assert await second == (2, [])
    assert rig.backend.count("get") == 2
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_cancelling_the_last_request_ends_the_transfer_and_gives_its_slot_back() -> None:
    rig, chain = make_rig(), chain_of(32)
    await rig.send_down(chain)
    rig.backend.gate = asyncio.Event()
    request = asyncio.create_task(load(rig, chain))
    await rig.backend.arrived.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await rig.stack.aclose()
    assert rig.planner.host.extents.used == 0
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_cancelled_request_is_no_failure_of_the_tier() -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    rig.backend.gate = asyncio.Event()
    request = asyncio.create_task(load(rig, chain))
    await rig.backend.arrived.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await rig.settled()
    assert rig.tier.health().ok
    assert rig.tier.misses.total() == 0
    assert not any(isinstance(event, TierChanged) for event in rig.events)
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("is_stubborn", [True, False])
async def test_a_request_that_joins_a_transfer_being_given_up_gets_its_object(
    is_stubborn: bool,
) -> None:
    """The first request left; its transfer is not over yet when the second one comes."""
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    rig.backend.gate, rig.backend.is_stubborn = asyncio.Event(), is_stubborn
    first = asyncio.create_task(load(rig, chain))
    await rig.backend.arrived.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(load(rig, chain))
    await asyncio.sleep(0)
    rig.backend.gate.set()
    assert await second == (1, [])
    assert rig.backend.count("get") == 2
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_backend_that_cancels_by_itself_is_asked_once() -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    rig.backend.raises = asyncio.CancelledError()
    done, (failure,) = await load(rig, chain)
    assert done == 0
    assert failure.cause is Cause.TIER_DOWN  # nobody told it to stop: it failed
    assert rig.backend.count("get") == 1
    idle(rig)
    await rig.aclose()


def unreadable(rig: Rig, bad: set[ObjectKey]) -> None:
    """From now on the tier answers with an error for some objects."""
    real = rig.backend.fill

    def fill(read: Read) -> ReadResult:
        return BackendError("bad sector") if read.key in bad else real(read)

    rig.backend.fill = fill  # type: ignore[method-assign]


@pytest.mark.asyncio
async def test_an_object_that_keeps_failing_is_set_aside_and_its_tier_serves_on() -> None:
    rig, chain, other = make_rig(shared=True), chain_of(16), chain_of(32, seed=5)
    await rig.send_down(chain)
    await rig.send_down(other)
    (key,) = [found.key for found in rig.planner.match(chain).path()]
    bad = {key}
    unreadable(rig, bad)
    for _ in range(3):
        done, (failure,) = await load(rig, chain)
        assert (done, failure.cause) == (0, Cause.TIER_DOWN)
        assert rig.tier.health().ok
    assert rig.planner.match(chain).tokens == 0
    assert (rig.tier.set_aside, rig.tier.stats(0, 0, None).set_aside) == (1, 1)
    assert [e.key for e in rig.events if isinstance(e, ObjectQuarantined)] == [key]
    assert rig.backend.count("get") == 3
    rig.planner.note([key], 1)  # another process, or a listing, says it is there
    assert rig.planner.match(chain).tokens == 0
    assert await load(rig, other) == (2, [])
    bad.clear()
    await rig.send_down(chain)
    assert await load(rig, chain) == (1, [])
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_success_in_between_is_a_new_beginning() -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    (found,) = rig.planner.match(chain).path()
    for _ in range(3):
        rig.backend.fails = BackendError("for a moment")
        for _ in range(2):
            await load(rig, chain)
        rig.backend.fails = None
        assert await load(rig, chain) == (1, [])
        rig.planner.evict([found], Cause.CLEARED, "")
    assert rig.tier.set_aside == 0
    await rig.aclose()


@pytest.mark.asyncio
async def test_different_objects_that_fail_are_the_tiers_trouble() -> None:
    rig = make_rig()
    chains = [chain_of(16, seed=seed) for seed in range(6)]
    for chain in chains:
        await rig.send_down(chain)
    rig.backend.fails = BackendError("dead")
    causes = [(await load(rig, chain))[1][0].cause for chain in chains]
    assert causes == [Cause.TIER_DOWN] * 6
    assert rig.backend.count("get") == 5  # the sixth was not asked for
    assert not rig.tier.health().ok
    assert rig.tier.set_aside == 0
    await rig.aclose()


@pytest.mark.parametrize("is_stubborn", [True, False])
@in_virtual_time
async def test_a_deadline_is_a_miss_and_the_late_landing_harms_nobody(is_stubborn: bool) -> None:
    rig, chain = make_rig(deadline=SOON), chain_of(32)
    rig.tier.guard.deadline = 30.0
    await rig.send_down(chain)
    rig.tier.guard.deadline = SOON
    rig.backend.gate, rig.backend.is_stubborn = asyncio.Event(), is_stubborn
    done, (failure,) = await load(rig, chain)
    assert done == 0
    assert failure.cause is Cause.DEADLINE
    assert not rig.tier.health().ok
    slots = {r.offset for r in rig.planner.directory.objects() if r.host is HostState.FILLING}
    if is_stubborn:  # its buffers are still lent: nobody else may have them
        assert len(slots) == 2
        assert rig.planner.host.extents.used == 2 * 4096
        other = rig.hold(chain_of(48, seed=3))
        assert not slots & {slot.piece.offset for slot in other.gathers}
    assert rig.tier.misses[Cause.DEADLINE] == 1
    rig.backend.gate.set()
    await rig.settled()
    idle(rig)
    rig.tier.guard.deadline = 30.0
    rig.tier.works()  # as a probe would find
    assert await load(rig, chain) == (2, [])
    assert rig.tier.health().ok
    await rig.aclose()


@in_virtual_time
async def test_past_the_bound_of_stuck_transfers_a_load_is_refused_at_once() -> None:
    rig = make_rig(max_inflight=1)
    first, second = chain_of(16), chain_of(16, seed=1)
    await rig.send_down(first)
    await rig.send_down(second)
    rig.tier.guard.deadline = SOON
    rig.backend.gate, rig.backend.is_stubborn = asyncio.Event(), True
    assert (await load(rig, first))[1][0].cause is Cause.DEADLINE
    rig.tier.guard.deadline = 30.0
    done, (failure,) = await load(rig, second)
    assert (done, failure.cause) == (0, Cause.TIER_DOWN)
    rig.tier.works()  # as a probe would find: the transfer is stuck all the same
    done, (failure,) = await load(rig, second)
    assert (done, failure.cause) == (0, Cause.BUSY)
    assert rig.tier.misses[Cause.BUSY] == 1
    check_accounts(rig.planner)
    rig.backend.gate.set()
    await rig.settled()
    assert await load(rig, second) == (1, [])
    idle(rig)
    await rig.aclose()


DAMAGE: list[tuple[Any, Cause]] = [
    (lambda stored: b"", Cause.EMPTY),
    (lambda stored: stored[:100], Cause.TRUNCATED),
    (lambda stored: stored[:4096], Cause.TRUNCATED),
    (lambda stored: stored[:-1], Cause.TRUNCATED),
    (lambda stored: stored[:5000] + b"\xff" + stored[5001:], Cause.CORRUPT),
    (lambda stored: bytes(len(stored)), Cause.CORRUPT),
    (lambda stored: stored[:8] + b"\x09" + stored[9:], Cause.CORRUPT),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("harm", "cause"), DAMAGE)
async def test_a_damaged_object_ends_the_prefix_and_is_never_offered_again(
    harm: Any, cause: Cause
) -> None:
    rig, chain = make_rig(), chain_of(48)
    await rig.send_down(chain)
    middle = rig.planner.match(chain).covers[1][0][0].key
    rig.backend.objects[middle] = harm(rig.backend.objects[middle])
    done, (failure,) = await load(rig, chain)
    assert done == 1
    assert (failure.span, failure.cause, failure.tier) == (chain.span(1), cause, "tier-1")
    assert rig.planner.match(chain).tokens == CHUNK
    assert middle not in rig.backend.objects
    (event,) = [e for e in rig.events if isinstance(e, ObjectQuarantined)]
    assert (event.key, event.cause) == (middle, cause)
    assert rig.tier.misses[cause] == 1
    assert rig.tier.health().ok  # the object is bad, the tier is not
    while rig.tier.guard.inflight:  # noqa: ASYNC110  # what came after it was given up
        await asyncio.sleep(0)
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("harm", ["vanish", "damage"])
async def test_all_that_a_load_misses_is_believed_to_be_missing(harm: str) -> None:
    """Not only what it missed first: the next store is to store all of it anew."""
    rig, chain = make_rig(), chain_of(5 * CHUNK)
    await rig.send_down(chain)
    for key in [*rig.backend.objects]:
        if harm == "vanish":
            del rig.backend.objects[key]
        else:
            rig.backend.objects[key] = b"x" * framed(4096)
    rig.backend.gate = asyncio.Event()
    loading = asyncio.create_task(load(rig, chain))
    await rig.backend.arrived.wait()
    rig.backend.gate.set()
    done, (failure,) = await loading
    assert (done, failure.span) == (0, chain.span(0))
    while rig.tier.guard.inflight:  # noqa: ASYNC110
        await asyncio.sleep(0)
    todo = rig.planner.plan_store(chain, 0, tail=False, holds=lambda _g, _s: True)
    assert [slot.span for slot in todo.gathers] == chain.spans(5)
    rig.planner.gathered(todo, None)
    assert rig.backend.objects == {}
    quarantined = {e.key for e in rig.events if isinstance(e, ObjectQuarantined)}
    assert len(quarantined) == (5 if harm == "damage" else 0)
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_swapped_objects_are_misplaced() -> None:
    rig, chain = make_rig(), chain_of(32)
    await rig.send_down(chain)
    one, two = list(rig.backend.objects)
    stored = rig.backend.objects
    stored[one], stored[two] = stored[two], stored[one]
    assert (await load(rig, chain))[1][0].cause is Cause.MISPLACED
    while rig.tier.guard.inflight:  # noqa: ASYNC110  # what came after it was given up
        await asyncio.sleep(0)
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_two_requests_that_find_the_same_damage_quarantine_it_once() -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    (key,) = rig.backend.objects
    rig.backend.objects[key] = b"x" * framed(4096)
    results = await asyncio.gather(load(rig, chain), load(rig, chain), load(rig, chain))
    assert [trouble[0].cause for _, trouble in results] == [Cause.CORRUPT] * 3
    assert rig.backend.count("delete") == 1
    assert sum(isinstance(e, ObjectQuarantined) for e in rig.events) == 1
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_copy_on_another_tier_takes_the_place_of_a_damaged_or_missing_one() -> None:
    for harm in ("damage", "remove"):
        rig, chain = make_rig(tiers=2), chain_of(32)
        await rig.send_down(chain)
        for key in list(rig.backends[0].objects):
            if harm == "damage":
                rig.backends[0].objects[key] = b"x" * framed(4096)
            else:
                del rig.backends[0].objects[key]
        assert await load(rig, chain) == (2, [])
        assert rig.backends[1].count("get") == 2
        idle(rig)
        await rig.aclose()


@pytest.mark.asyncio
async def test_an_object_removed_by_another_process_has_vanished() -> None:
    rig, chain = make_rig(), chain_of(32)
    await rig.send_down(chain)
    del rig.backend.objects[list(rig.backend.objects)[1]]
    done, (failure,) = await load(rig, chain)
    assert (done, failure.cause) == (1, Cause.VANISHED)
    assert rig.planner.match(chain).tokens == CHUNK
    loss = rig.planner.journal.loss(chain, chain.span(1))
    assert loss is not None
    assert loss.cause is Cause.VANISHED
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (BackendError("broken"), Cause.TIER_DOWN),
        (BackendUnavailableError("gone"), Cause.TIER_DOWN),
        (BackendTimeoutError("slow"), Cause.DEADLINE),
        (RuntimeError("a bug"), Cause.TIER_DOWN),
        (OSError(5, "I/O error"), Cause.TIER_DOWN),
    ],
)
@pytest.mark.parametrize("how", ["raises", "fails"])
async def test_a_failing_tier_is_a_miss_and_is_reported_until_it_serves_again(
    fault: Exception, cause: Cause, how: str
) -> None:
    rig, chain = make_rig(), chain_of(32)
    await rig.send_down(chain)
    if how == "raises":
        rig.backend.raises = fault
    elif isinstance(fault, BackendError):
        rig.backend.fails = fault
    else:
        rig.backend.results = [fault]
        cause = Cause.TIER_DOWN
    done, (failure,) = await load(rig, chain)
    assert (done, failure.cause) == (0, cause)
    assert not rig.tier.health().ok
    assert rig.planner.match(chain).tokens == 32  # the objects may well be there
    idle(rig)
    rig.backend.raises = rig.backend.fails = rig.backend.results = None
    rig.tier.guard.succeeded(Lane.READS)  # a deadline opens it at once
    assert await load(rig, chain) == (2, [])
    assert rig.tier.health().ok
    changes = [e.ok for e in rig.events if isinstance(e, TierChanged)]
    assert changes == [False, True]
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("results", [[], [None], [None, None], ["hit"], None])
@pytest.mark.parametrize("claims", [None, 1 << 40])
async def test_a_lying_tier_never_brings_wrong_bytes_up(
    results: list[Any] | None, claims: int | None
) -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    (key,) = rig.backend.objects
    rig.backend.objects[key] = b""
    rig.slab.view(0, rig.slab.nbytes)[:] = b"?" * rig.slab.nbytes  # what a slot held before
    rig.backend.results, rig.backend.claims = results, claims
    done, trouble = await load(rig, chain)
    assert done == 0
    assert trouble
    assert rig.planner.host.extents.used == 0
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_no_room_ends_the_prefix_before_anything_waits() -> None:
    rig, chain = make_rig(pages=3), chain_of(48)
    await rig.send_down(chain)
    held = rig.hold(chain_of(32, seed=1))
    records = [slot.record for slot in held.gathers]
    rig.planner.pin(records)
    done, (failure,) = await load(rig, chain)
    assert (done, failure.cause, failure.span) == (1, Cause.NO_ROOM, chain.span(1))
    rig.planner.unpin(records)
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_what_is_being_stored_is_in_flight_and_not_waited_for() -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    match = wanted(rig, chain)
    rig.planner.vanished(list(rig.backend.objects), 1, "", Cause.EVICTED)
    todo = rig.planner.plan_store(chain, 0, tail=False, holds=lambda _g, _s: True)
    rig.planner.note(list(rig.backend.objects), 1)  # another process put it there meanwhile
    assert rig.planner.match(chain).tokens == 16
    done, (failure,) = await load(rig, chain)
    assert (done, failure.cause) == (0, Cause.IN_FLIGHT)
    rig.write_into(todo.gathers)
    rig.planner.stored(todo.gathers, ok=True)
    rig.planner.settle(chain, todo.gathers)
    assert await load(rig, chain) == (1, [])
    assert match[0][1][0].tier == -1  # the record the first match held is history
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_record_that_was_forgotten_and_made_anew_has_vanished_for_who_held_it() -> None:
    rig, chain = make_rig(), chain_of(16)
    rig.hold(chain)
    old = wanted(rig, chain)
    rig.planner.evict([old[0][1][0]], Cause.CLEARED, "")
    rig.hold(chain)
    rig.planner.pin(old[0][1])
    trouble: list[Failure] = []
    async with aclosing(rig.stack.loads.arrive(old, trouble)) as arrivals:
        assert [batch async for batch in arrivals] == []
    assert trouble[0].cause is Cause.VANISHED
    rig.planner.unpin(old[0][1])
    assert await load(rig, chain) == (1, [])
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_two_shards_of_one_need_come_up_together_or_not_at_all() -> None:
    rig, chain = make_rig(head_shards=2), chain_of(32)
    await rig.send_down(chain)
    assert len(rig.backend.objects) == 4
    second = [r.key for r in wanted(rig, chain)[1][1]]
    assert await load(rig, chain) == (2, [])
    records = [r for _, found in wanted(rig, chain) for r in found]
    rig.planner.evict(records, Cause.CLEARED, "")
    del rig.backend.objects[second[1]]
    done, (failure,) = await load(rig, chain)
    assert (done, failure.cause) == (1, Cause.VANISHED)
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_every_transfer_is_told_to_listeners() -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    await load(rig, chain)
    moves = [e for e in rig.events if isinstance(e, TransferDone)]
    assert [(e.direction, e.nbytes, e.cause) for e in moves] == [
        ("store", 4096, None),
        ("load", 4096, None),
    ]
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_quarantine_that_fails_late_is_no_unheard_error() -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    (key,) = rig.backend.objects
    rig.backend.objects[key] = b""

    async def refuse(_keys: object) -> None:
        raise BackendError("read-only disk")

    rig.backend.quarantine = refuse  # type: ignore[method-assign]
    done, (failure,) = await load(rig, chain)
    assert (done, failure.cause) == (0, Cause.EMPTY)
    assert not rig.tier.health().ok
    assert rig.planner.match(chain).tokens == 0
    idle(rig)
    await rig.aclose()


@pytest.mark.asyncio
async def test_what_is_stored_anew_while_its_damaged_copy_is_taken_away_is_served() -> None:
    rig, chain = make_rig(), chain_of(16)
    await rig.send_down(chain)
    (key,) = rig.backend.objects
    rig.backend.objects[key] = b""
    began, gate = asyncio.Event(), asyncio.Event()

    async def slowly(_keys: object) -> None:
        began.set()
        await gate.wait()

    rig.backend.quarantine = slowly  # type: ignore[method-assign]
    loading = asyncio.create_task(load(rig, chain))
    await began.wait()
    rig.hold(chain)
    assert await loading == (1, [])  # it does not wait for the damaged one to be gone
    gate.set()
    while rig.tier.guard.inflight:  # noqa: ASYNC110
        await asyncio.sleep(0)
    idle(rig)
    await rig.aclose()
