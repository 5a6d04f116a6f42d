"""The stack's steps where they can go wrong: expiring leases, shorter readers, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from stacks import CHUNK, Rig, chain_of, check_accounts, hybrid_layout, make_rig

from kvlayer.abc.stager import Landed
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ChunkChain, Part
from kvlayer.layout import KVView
from kvlayer.results import Cause
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.messages import Outcome, Piece
from kvlayer.tier.planner.records import HostState
from kvlayer.tier.stack import Window

FULL, WINDOW, STATE = Part(0, (0, 2), (0, 2)), Part(1, (0, 1), (0, 2)), Part(2, (0, 1), None)


def view(tokens: int) -> KVView:
    return KVView([], [range(tokens)] * 3)


async def store(rig: Rig, chain: ChunkChain) -> None:
    window = Window(0, chain.num_tokens)
    await rig.stack.store(chain, view(chain.num_tokens), window, tail=True)


@pytest.mark.asyncio
async def test_a_hit_that_is_whole_asks_no_shared_tier_for_windows_it_does_not_need() -> None:
    rig, chain = make_rig(layout=hybrid_layout(20), shared=True), chain_of(96)
    last = chain.span(len(chain) - 2).start  # the engine has let go of earlier windows
    todo = rig.planner.plan_store(
        chain, 0, tail=False, holds=lambda _group, span: span.start >= last
    )
    rig.write_into(todo.gathers)
    rig.planner.stored(todo.gathers, ok=True)
    rig.planner.settle(chain, todo.gathers)
    assert not all(cover for covers in rig.planner.match(chain).covers for cover in covers)
    assert (await rig.stack.finder.find(chain)).tokens == 96
    assert rig.backend.count("contains") == 0
    assert (await rig.stack.finder.find(chain_of(112))).tokens == 96
    assert rig.backend.count("contains") > 0
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_lease_that_expires_while_its_prefix_comes_up_loses_nothing() -> None:
    rig, chain = make_rig(pages=4), chain_of(64)
    await rig.send_down(chain)
    rig.hold(chain_of(32))  # half of it is in host memory already
    match = rig.planner.match(chain)
    rig.planner.lease(match, owner="", seconds=5.0)
    rig.backend.gate = asyncio.Event()
    promoting = asyncio.create_task(rig.stack.promote(match))
    await asyncio.sleep(0)
    await rig.backend.arrived.wait()
    rig.clock.now += 10.0
    other = rig.planner.plan_store(chain_of(64, seed=1), 0, tail=False, holds=lambda _g, _s: True)
    assert other.gathers == []  # what is being promoted is not for the taking
    rig.backend.gate.set()
    report = await promoting
    assert (report.tokens, report.failed) == (64, ())
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_promotion_that_fails_halfway_says_how_far_it_came() -> None:
    rig, chain = make_rig(), chain_of(64)
    await rig.send_down(chain)
    del rig.backend.objects[rig.planner.match(chain).covers[2][0][0].key]
    report = await rig.stack.promote(rig.planner.match(chain))
    assert report.tokens == 32
    assert report.failed[0].cause is Cause.VANISHED
    await rig.settled()  # what was asked for behind it may still be on its way
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_promoting_nothing_is_nothing() -> None:
    rig = make_rig()
    report = await rig.stack.promote(rig.planner.match(chain_of(64)))
    assert (report.tokens, report.failed) == (0, ())
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_hybrid_reader_that_takes_less_gets_the_window_before_its_own_end() -> None:
    """An engine rounds a hit down: the window and the state must belong to the shorter end."""
    rig, chain = make_rig(layout=hybrid_layout(20)), chain_of(96)
    await store(rig, chain)
    match = rig.planner.match(chain)
    assert match.tokens == 96
    report = await rig.stack.retrieve(match, view(48), Window(0, 48))
    assert report.tokens == 48
    loaded = {(part, first) for part, first, _, _ in rig.stager.scattered}
    assert loaded == {
        *((FULL, first) for first in (0, 16, 32)),
        *((WINDOW, first) for first in (16, 32)),
        (STATE, 32),
    }
    await rig.stack.flush()  # what no tier had is offered when it is used
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_hybrid_reader_that_ends_inside_a_chunk_gets_the_last_whole_one() -> None:
    """There is no state in the middle of a chunk."""
    rig, chain = make_rig(layout=hybrid_layout(20)), chain_of(96)
    await store(rig, chain)
    report = await rig.stack.retrieve(rig.planner.match(chain), view(63), Window(0, 63))
    assert report.tokens == 48
    assert max(first for part, first, _, _ in rig.stager.scattered if part == STATE) == 32
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_reader_of_full_attention_may_end_inside_a_chunk() -> None:
    rig, chain = make_rig(), chain_of(96)
    await store(rig, chain)
    report = await rig.stack.retrieve(rig.planner.match(chain), view(63), Window(0, 63))
    assert report.tokens == 63
    assert rig.stager.scattered[-1][1:] == (48, 15, 0)
    rig.stager.scattered.clear()
    report = await rig.stack.retrieve(rig.planner.match(chain), view(20), Window(30, 50))
    assert report.tokens == 50
    assert [s[1:] for s in rig.stager.scattered] == [(0, 2, 14), (2, 16, 0), (18, 2, 0)]
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_gather_that_fails_leaves_nothing_behind() -> None:
    rig, chain = make_rig(), chain_of(40)
    rig.stager.raises = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        await store(rig, chain)
    assert rig.planner.host.extents.used == 0
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_store_cancelled_while_it_gathers_leaves_nothing_behind() -> None:
    rig, chain = make_rig(), chain_of(40)
    rig.stager.gate = asyncio.Event()
    storing = asyncio.create_task(store(rig, chain))
    await rig.stager.arrived.wait()
    assert rig.planner.match(chain).tokens == 0
    storing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await storing
    assert rig.planner.host.extents.used == 0
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_scatter_that_fails_lets_go_of_every_transfer() -> None:
    rig, chain = make_rig(), chain_of(64)
    await rig.send_down(chain)
    rig.stager.raises = RuntimeError("device lost")
    match = rig.planner.match(chain)
    with pytest.raises(RuntimeError, match="device lost"):
        await rig.stack.retrieve(match, view(64), Window(0, 64))
    await rig.settled()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_what_a_scatter_misses_ends_the_prefix_and_the_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig, chain = make_rig(), chain_of(64)
    await rig.send_down(chain)
    await rig.stack.promote(rig.planner.match(chain_of(32)))  # the rest is a batch of its own
    rig.backend.gate = asyncio.Event()
    calls: list[list[int]] = []

    async def scatter(
        _: KVView, pieces: Sequence[Piece], start: int, stop: int, landed: Landed | None
    ) -> list[Outcome]:
        calls.append([piece.first_token for piece in pieces])
        return [Outcome(pieces[1].key, Cause.RANK_DOWN, "rank 1: no luck")]

    monkeypatch.setattr(rig.stack.device, "scatter", scatter)
    report = await rig.stack.retrieve(rig.planner.match(chain), view(64), Window(0, 64))
    assert calls == [[0, 16]]
    assert report.tokens == 16
    assert [(f.span.start, f.cause, f.detail) for f in report.failed] == [
        (16, Cause.RANK_DOWN, "rank 1: no luck")
    ]
    rig.backend.gate.set()
    await rig.settled()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_objects_are_held_until_their_scatter_has_ended() -> None:
    rig, chain = make_rig(pages=2), chain_of(32)
    await store(rig, chain)
    rig.stager.gate = asyncio.Event()
    match = rig.planner.match(chain)
    reading = asyncio.create_task(rig.stack.retrieve(match, view(32), Window(0, 32)))
    await rig.stager.arrived.wait()
    other = rig.planner.plan_store(chain_of(32, seed=1), 0, tail=False, holds=lambda _g, _s: True)
    assert other.gathers == []
    assert rig.planner.evict(match.path(), Cause.CLEARED, "") == []
    rig.stager.gate.set()
    assert (await reading).tokens == 32
    await rig.stack.flush()  # what no tier had is offered when it is used
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_an_answer_of_a_shared_tier_is_a_sign_of_life() -> None:
    rig, chain = make_rig(shared=True), chain_of(32)
    await rig.send_down(chain)
    rig.planner.vanished(list(rig.backend.objects), 1, "", Cause.EVICTED)
    assert rig.planner.match(chain).tokens == 0
    rig.backend.raises = BackendError("down")
    assert (await rig.stack.finder.find(chain)).tokens == 0
    assert not rig.tier.health().ok
    rig.backend.raises = None
    assert (await rig.stack.finder.find(chain)).tokens == 32
    assert rig.tier.health().ok
    await rig.aclose()


@in_virtual_time
async def test_a_tier_that_does_not_answer_in_time_is_a_miss() -> None:
    rig, chain = make_rig(shared=True, deadline=2.0), chain_of(CHUNK)
    rig.backend.gate = asyncio.Event()
    assert (await rig.stack.finder.find(chain)).tokens == 0
    assert rig.tier.misses[Cause.DEADLINE] >= 1
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_load_that_runs_while_the_stack_closes_ends_in_a_miss() -> None:
    rig, chain = make_rig(), chain_of(32)
    await rig.send_down(chain)
    rig.backend.gate = asyncio.Event()
    match = rig.planner.match(chain)
    reading = asyncio.create_task(rig.stack.retrieve(match, view(32), Window(0, 32)))
    await rig.backend.arrived.wait()
    await rig.stack.aclose()
    report = await reading
    assert report.tokens == 0
    assert report.failed
    assert all(r.host is HostState.ABSENT for r in rig.planner.directory.objects())
    check_accounts(rig.planner, idle=True)
    await rig.aclose()
