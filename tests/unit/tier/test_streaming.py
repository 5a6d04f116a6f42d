"""A load larger than host memory streams through it; what is held for somebody stays."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from stacks import Rig, chain_of, check_accounts, make_rig

from kvlayer.identity.keys import ChunkChain
from kvlayer.layout import KVView
from kvlayer.patience import Patience
from kvlayer.results import Cause, RetrieveReport
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.planner.records import HostState
from kvlayer.tier.stack import Window
from kvlayer.tier.transfer.reading import Reading


async def below(rig: Rig, *chains: ChunkChain) -> None:
    """Put prompts on the tier; host memory keeps what fits."""
    for chain in chains:
        count = chain.num_tokens
        view = KVView([], [range(count)])
        stored = await rig.stack.store(
            chain, view, Window(0, count), tail=False, patience=Patience()
        )
        assert len(stored.spans) == count // 16
    await rig.stack.flush()
    await rig.settled()
    rig.stager.scattered.clear()


async def read(rig: Rig, chain: ChunkChain) -> RetrieveReport:
    """Look a prompt up, load it, and let go of it."""
    match = await rig.stack.finder.find(chain)
    lease = rig.planner.lease(match, owner="", seconds=1e6)
    count = chain.num_tokens
    try:
        return await rig.stack.retrieve(
            match, KVView([], [range(count)]), Window(0, count), lease=lease
        )
    finally:
        rig.planner.release(lease.number)


@pytest.mark.parametrize("pages", [1, 2, 5, 39])
@in_virtual_time
async def test_a_load_larger_than_host_memory_streams_through_it(pages: int) -> None:
    rig, chain = make_rig(write="back", pages=pages), chain_of(16 * 40)
    await below(rig, chain)
    for _ in range(2):
        rig.stager.scattered.clear()
        report = await read(rig, chain)
        assert report == RetrieveReport(640)
        assert [first for _, first, _, _ in rig.stager.scattered] == [16 * i for i in range(40)]
        await rig.settled()
        check_accounts(rig.planner, idle=True)
    assert rig.tier.misses.total() == rig.stack.host.misses.total() == 0
    await rig.aclose()


@in_virtual_time
async def test_many_loads_share_a_host_memory_that_holds_none_of_them() -> None:
    rig = make_rig(write="back", pages=8)
    chains = [chain_of(16 * 20, seed=seed) for seed in range(4)]
    await below(rig, *chains)
    reports = await asyncio.gather(*(read(rig, chain) for chain in chains))
    assert all(report.tokens or report.failed[0].cause is Cause.NO_ROOM for report in reports)
    assert max(report.tokens for report in reports) == 320
    await rig.settled()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_what_is_held_for_somebody_is_not_streamed_over() -> None:
    rig, held, other = make_rig(write="back", pages=6), chain_of(48, seed=3), chain_of(16 * 20)
    await below(rig, held, other)
    lease, report = await rig.stack.hold(held, owner="", seconds=1e6)
    assert report.tokens == 48
    assert (await read(rig, other)).tokens == 320
    assert [r.host for r in rig.planner.match(held).path()] == [HostState.READY] * 3
    assert (await read(rig, held)).tokens == 48  # reading it does not end the holding
    assert (await read(rig, other)).tokens == 320
    assert [r.host for r in rig.planner.match(held).path()] == [HostState.READY] * 3
    rig.planner.release(lease.number)
    await rig.settled()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_what_was_scattered_is_free_although_it_is_leased() -> None:
    rig, chain = make_rig(write="back"), chain_of(16 * 10)
    await below(rig, chain)
    match = await rig.stack.finder.find(chain)
    lease = rig.planner.lease(match, owner="", seconds=1e6)
    assert rig.planner.host.pinned_nbytes == 10 * 4096
    view = KVView([], [range(100)])
    report = await rig.stack.retrieve(match, view, Window(0, 100), lease=lease)
    assert report.tokens == 100
    # Six chunks whole; the seventh was cut, and may be read on from there.
    assert rig.planner.host.pinned_nbytes == 4 * 4096
    report = await rig.stack.retrieve(match, KVView([], [range(60)]), Window(100, 160), lease=lease)
    assert report.tokens == 160
    assert rig.planner.host.pinned_nbytes == 0
    assert rig.planner.release(lease.number)
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.parametrize("is_one_lease", [True, False])
@in_virtual_time
async def test_a_prompt_is_read_piece_by_piece_through_memory_that_holds_few_of_them(
    is_one_lease: bool,
) -> None:
    """What lies before a piece the engine has: neither the lease nor the load keeps it."""
    rig, chain = make_rig(write="back", pages=4), chain_of(16 * 12)
    await below(rig, chain)

    def leased() -> tuple[Any, Any]:
        match = rig.planner.match(chain)
        return match, rig.planner.leases.grant(match.path(), owner="", deadline=1e6)

    match, lease = leased()
    for start in range(0, 16 * 12, 32):
        view = KVView([], [range(32)])
        report = await rig.stack.retrieve(match, view, Window(start, start + 32), lease=lease)
        assert (report.tokens, report.failed) == (start + 32, ())
        if not is_one_lease:
            assert rig.planner.release(lease.number)
            match, lease = leased()
    assert rig.planner.release(lease.number)
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_a_path_that_was_streamed_is_given_up_from_its_end() -> None:
    rig, chain = make_rig(write="back", pages=10), chain_of(16 * 10)
    await below(rig, chain)
    rig.planner.evict(rig.planner.match(chain).path(), Cause.CLEARED, "")
    assert (await read(rig, chain)).tokens == 160
    await below(rig, chain_of(16 * 4, seed=9))
    ready = [r.host is HostState.READY for r in rig.planner.match(chain).path()]
    assert ready == [True] * 6 + [False] * 4
    await rig.aclose()


@in_virtual_time
async def test_a_streaming_load_cancelled_at_any_await_lets_go_of_everything() -> None:
    ends: list[bool] = []
    for turns in range(1, 60):
        rig, chain = make_rig(write="back", pages=3), chain_of(16 * 12)
        await below(rig, chain)
        task = asyncio.create_task(read(rig, chain))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        ends.append(task.cancelled())
        await rig.settled()
        check_accounts(rig.planner, idle=True)
        await rig.aclose()
    assert all(ends[:10]), "it has not so many awaits"


@in_virtual_time
async def test_a_lease_that_holds_keeps_what_is_read_through_it() -> None:
    rig, chain = make_rig(write="back"), chain_of(48)
    await below(rig, chain)
    lease, _ = await rig.stack.hold(chain, owner="", seconds=1e6)
    match = rig.planner.match(chain)
    view = KVView([], [range(48)])
    assert (await rig.stack.retrieve(match, view, Window(0, 48), lease=lease)).tokens == 48
    assert rig.planner.host.pinned_nbytes == 3 * 4096
    assert rig.planner.release(lease.number)
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.parametrize("raised", [RuntimeError, asyncio.CancelledError])
@pytest.mark.parametrize("step", ["within", "budget"])
@in_virtual_time
async def test_a_load_that_ends_before_it_begins_lets_go_of_everything(
    step: str, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, chain = make_rig(write="back"), chain_of(16 * 4)
    await below(rig, chain)

    def fail(*_: object) -> None:
        raise raised

    owner = Reading if step == "within" else rig.stack.finder
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(raised):
        await read(rig, chain)
    check_accounts(rig.planner, idle=True)
    await rig.aclose()
