"""Stores under pressure: bounds pause the writer, and what another store promised may fail."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from stacks import Rig, chain_of, check_accounts, make_rig

from kvlayer._steps import finish
from kvlayer.abc.stager import HostCopy
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ChunkChain, ObjectKey
from kvlayer.layout import KVView
from kvlayer.patience import Patience
from kvlayer.results import Cause
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.guard import Lane
from kvlayer.tier.stack import Window
from kvlayer.tier.storing import Stored


async def store(rig: Rig, chain: ChunkChain, patience: Patience | None = None) -> Stored:
    count = chain.num_tokens
    view = KVView([], [range(count)])
    return await rig.stack.store(chain, view, Window(0, count), tail=False, patience=patience)


# -- room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", ["through", "back", "demote"])
@in_virtual_time
async def test_a_prompt_longer_than_host_memory_is_written_whole(write: str) -> None:
    rig, chain = make_rig(write=write, pages=5), chain_of(16 * 40)
    stored = await store(rig, chain, Patience())
    await rig.stack.flush(drain=True)
    assert (len(stored.spans), stored.dropped, stored.failed) == (40, [], [])
    assert len(rig.backend.objects) == 40
    assert rig.tier.dropped == 0
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.parametrize("write", ["through", "back"])
@in_virtual_time
async def test_a_prompt_is_written_root_first(write: str) -> None:
    rig, chain = make_rig(write=write, pages=5), chain_of(16 * 20)
    await store(rig, chain, Patience())
    await rig.stack.flush()
    hashes = [key.end_hash for name, key in rig.backend.calls if name == "put"]
    assert hashes == [*chain.hashes]
    await rig.aclose()


@in_virtual_time
async def test_a_store_without_patience_waits_for_nothing_and_what_it_costs_is_counted() -> None:
    rig = make_rig(write="back", pages=5)
    rig.backend.gate = asyncio.Event()
    first, second = chain_of(16 * 5), chain_of(16 * 5, seed=3)
    await store(rig, first, Patience(0.0))
    began = asyncio.get_running_loop().time()
    stored = await store(rig, second, Patience(0.0))
    assert asyncio.get_running_loop().time() == began
    assert len(stored.spans) == 5 - rig.planner.host.pinned_nbytes // 4096  # what runs stays
    assert rig.tier.dropped == len(stored.spans)
    assert rig.tier.stats(0, 0, None).dropped_writes == rig.tier.dropped
    rig.backend.gate.set()
    await rig.stack.flush()
    assert len(rig.backend.objects) == 5
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_patience_is_bounded_in_seconds_and_can_be_ended() -> None:
    rig = make_rig(write="back", pages=4, deadline=1000.0)
    rig.backend.gate = asyncio.Event()
    await store(rig, chain_of(16 * 4), Patience())
    began = asyncio.get_running_loop().time()
    rig.stack.clock = asyncio.get_running_loop().time
    await store(rig, chain_of(16 * 4, seed=3), Patience(7.0))
    assert asyncio.get_running_loop().time() - began == 7.0
    patience = Patience()
    storing = asyncio.create_task(store(rig, chain_of(16 * 4, seed=5), patience))
    await asyncio.sleep(100)
    assert not storing.done()
    patience.end()
    await storing
    assert asyncio.get_running_loop().time() - began == 107.0
    assert patience.left(0.0) == 0.0
    rig.backend.gate.set()
    await rig.stack.flush()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_a_waiting_store_holds_nothing() -> None:
    """Else two of them would wait for each other."""
    rig = make_rig(write="back", pages=6)
    rig.backend.gate = asyncio.Event()
    chains = [chain_of(16 * 12, seed=seed) for seed in (1, 2, 3)]
    storing = [asyncio.create_task(store(rig, chain, Patience())) for chain in chains]
    await rig.backend.arrived.wait()
    for _ in range(50):
        await asyncio.sleep(0)
    assert not any(task.done() for task in storing)
    running = rig.tier.guard.running + rig.tier.guard.inflight
    assert rig.planner.host.pinned_nbytes <= 4096 * running  # writes that run, and no more
    rig.backend.gate.set()
    for task in storing:
        assert len((await task).spans) == 12
    await rig.stack.flush()
    assert len(rig.backend.objects) == 36
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.parametrize("write", ["through", "back", "demote"])
@in_virtual_time
async def test_a_tier_that_hangs_or_fails_is_not_waited_for_without_end(write: str) -> None:
    for fails in (None, BackendError("dead")):
        rig = make_rig(write=write, pages=4, deadline=5.0)
        rig.backend.fails = fails
        if fails is None:
            rig.backend.gate = asyncio.Event()
        for seed in range(3):
            await store(rig, chain_of(16 * 10, seed=seed), Patience())
        assert asyncio.get_running_loop().time() < 500
        await rig.aclose()


@in_virtual_time
async def test_what_is_queued_for_a_tier_that_is_down_is_written_when_it_is_back() -> None:
    rig, chain = make_rig(write="back"), chain_of(16 * 4)
    rig.tier.guard.missed(Lane.WRITES, "late")
    stored = await store(rig, chain)
    assert [f.cause for f in stored.failed] == [Cause.TIER_DOWN] * 4
    assert rig.stack.spills.queued(1) == 4
    assert [left.objects for left in rig.stack.spills.unwritten()] == [4]
    await asyncio.sleep(60)
    assert len(rig.backend.objects) == 4
    assert rig.stack.spills.unwritten() == []
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_what_failed_is_offered_again_when_its_prefix_is_used() -> None:
    rig, chain = make_rig(write="back", tiers=2), chain_of(32)
    rig.backend.fails = BackendError("full")
    await store(rig, chain)
    await rig.stack.flush()
    assert rig.backend.objects == {}
    assert len(rig.backends[1].objects) == 2
    rig.backend.fails = None
    match = rig.planner.match(chain)
    report = await rig.stack.retrieve(match, KVView([], [range(32)]), Window(0, 32))
    assert report.tokens == 32
    await rig.stack.flush()
    assert len(rig.backend.objects) == 2
    puts = rig.backend.count("put"), rig.backends[1].count("put")
    await rig.stack.retrieve(match, KVView([], [range(32)]), Window(0, 32))
    await rig.stack.flush()
    assert (rig.backend.count("put"), rig.backends[1].count("put")) == puts
    await rig.aclose()


@in_virtual_time
async def test_an_object_that_cannot_be_written_is_not_offered_for_ever() -> None:
    rig, chain = make_rig(write="back"), chain_of(16)
    rig.backend.fails = BackendError("name too long")
    await store(rig, chain)
    for _ in range(20):
        await rig.stack.flush()
        rig.stack.touch(rig.planner.match(chain).path())
    assert rig.backend.count("put") == 3
    assert rig.tier.health().ok
    await rig.aclose()


@pytest.mark.parametrize("write", ["through", "back"])
@in_virtual_time
async def test_a_tier_is_told_of_a_path_when_it_has_all_of_it_the_root_last(write: str) -> None:
    """Or the order in which it evicts would be the order in which writes happened to end."""
    rig, chain = make_rig(write=write), chain_of(16 * 6)
    told: list[list[bytes]] = []

    async def touch(keys: Sequence[ObjectKey]) -> None:
        told.append([key.end_hash for key in keys])

    rig.backend.touch = touch  # type: ignore[method-assign]
    await store(rig, chain)
    await rig.stack.flush()
    await rig.settled()
    assert told == [[*reversed(chain.hashes)]]
    await rig.aclose()


# -- promises -------------------------------------------------------------------------------------


async def two_stores(rig: Rig, chain: ChunkChain) -> Sequence[asyncio.Task[Stored]]:
    """Two stores of one prompt; the first is gathering."""
    rig.stager.gate = asyncio.Event()
    first = asyncio.create_task(store(rig, chain))
    await rig.stager.arrived.wait()
    second = asyncio.create_task(store(rig, chain))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not second.done()
    return first, second


@in_virtual_time
async def test_a_second_store_joins_the_first() -> None:
    rig, chain = make_rig(), chain_of(48)
    first, second = await two_stores(rig, chain)
    assert len(rig.planner.promises) == 3
    rig.stager.gate.set()  # type: ignore[union-attr]
    assert len((await first).spans) == 3
    assert (len((await second).spans), len((await second).skipped)) == (0, 3)
    assert rig.backend.count("put") == 3  # "through": they were there when it returned
    assert len(rig.planner.promises) == 0
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.parametrize("cancels", [True, False])
@in_virtual_time
async def test_a_second_store_stores_what_the_first_failed_to(cancels: bool) -> None:
    rig, chain = make_rig(), chain_of(48)
    first, second = await two_stores(rig, chain)
    if cancels:
        first.cancel()
    else:
        rig.stager.raises = RuntimeError("device lost")
        first.get_loop().call_soon(rig.stager.gate.set)  # type: ignore[union-attr]
        rig.planner.promises.find(chain.namespace, chain.hashes[0], 0.0).watch(  # type: ignore[union-attr]
            lambda: setattr(rig.stager, "raises", None)
        )
    await asyncio.wait({first})
    rig.stager.gate.set()  # type: ignore[union-attr]
    assert len((await second).spans) == 3
    assert rig.planner.match(chain).tokens == 48
    assert rig.backend.count("put") == 3
    assert len(rig.planner.promises) == 0
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_the_view_is_free_once_what_was_joined_is_there() -> None:
    rig, chain = make_rig(), chain_of(48)
    rig.stager.gate = asyncio.Event()
    freed: list[str] = []

    async def one(name: str) -> None:
        view = KVView([], [range(48)])
        await rig.stack.store(
            chain, view, Window(0, 48), tail=False, on_gathered=lambda: freed.append(name)
        )

    first = asyncio.create_task(one("first"))
    await rig.stager.arrived.wait()
    second = asyncio.create_task(one("second"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert freed == []
    rig.stager.gate.set()
    await asyncio.gather(first, second)
    assert freed == ["first", "second"]
    await rig.aclose()


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), GeneratorExit()])
@in_virtual_time
async def test_a_callback_that_raises_costs_nobody_a_hold(error: BaseException) -> None:
    rig, chain = make_rig(), chain_of(48)

    def fails() -> None:
        raise error

    view = KVView([], [range(48)])
    stored = await rig.stack.store(chain, view, Window(0, 48), tail=False, on_gathered=fails)
    assert (len(stored.spans), rig.backend.count("put")) == (3, 3)
    assert rig.stack.foreign.costs()["on_gathered"].errors == 1
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_an_interrupt_of_a_callback_passes_and_leaves_no_hold() -> None:
    rig, chain = make_rig(), chain_of(48)

    def interrupt() -> None:
        raise KeyboardInterrupt

    view = KVView([], [range(48)])
    with pytest.raises(KeyboardInterrupt):
        await rig.stack.store(chain, view, Window(0, 48), tail=False, on_gathered=interrupt)
    await rig.stack.flush()
    check_accounts(rig.planner, idle=True)
    assert len(rig.planner.promises) == 0
    await rig.aclose()


@in_virtual_time
async def test_a_store_cancelled_at_any_await_leaves_no_hold_and_no_promise() -> None:
    for turns in range(1, 40):
        rig, chain = make_rig(write="back", pages=5), chain_of(16 * 12)
        task = asyncio.create_task(store(rig, chain, Patience()))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await rig.stack.flush()
        check_accounts(rig.planner, idle=True)
        assert len(rig.planner.promises) == 0
        await rig.aclose()


@in_virtual_time
async def test_what_a_breaker_sends_back_keeps_its_place_in_the_queue() -> None:
    rig, chain = make_rig(write="back", max_inflight=8), chain_of(16 * 8)
    rig.backend.gate = asyncio.Event()
    await store(rig, chain)
    await rig.backend.arrived.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert rig.stack.spills.queued(1) < 6  # some wait for a turn within the guard
    rig.tier.guard.missed(Lane.WRITES, "late")
    rig.backend.gate.set()
    await asyncio.sleep(60)
    hashes = [key.end_hash for name, key in rig.backend.calls if name == "put"]
    assert hashes == [span.hash for span in chain.spans(8)]
    await rig.aclose()


# -- lookups that wait for a promise ---------------------------------------------------------------


def look(rig: Rig, chain: ChunkChain, patience: float) -> asyncio.Task[Any]:
    lease = rig.stack.finder.lease(chain, owner="", seconds=1e9, patience=patience)
    return asyncio.get_running_loop().create_task(lease)


@in_virtual_time
async def test_a_lookup_waits_for_what_another_request_is_storing() -> None:
    rig, chain = make_rig(), chain_of(48)
    rig.stager.gate = asyncio.Event()
    storing = asyncio.create_task(store(rig, chain))
    await rig.stager.arrived.wait()
    (hurried, _), waits = await look(rig, chain, 0.0), look(rig, chain, 10.0)
    assert hurried.tokens == 0
    await asyncio.sleep(5.0)
    assert not waits.done()
    assert rig.planner.host.pinned_nbytes == sum(
        s.nbytes for s in finish(rig.planner.resident())
    )  # a move
    rig.stager.gate.set()
    match, lease = await waits
    assert match.tokens == 48
    await storing
    rig.planner.release(lease.number)
    rig.planner.leases.clear()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_a_lookup_waits_no_longer_than_it_was_told_to() -> None:
    rig, chain = make_rig(), chain_of(48)
    loop = asyncio.get_running_loop()
    rig.stager.gate = asyncio.Event()
    storing = asyncio.create_task(store(rig, chain))
    await rig.stager.arrived.wait()
    began = loop.time()
    match, _ = await look(rig, chain, 3.0)
    assert (match.tokens, loop.time() - began) == (0, 3.0)
    cancelled = look(rig, chain, 3.0)
    await asyncio.sleep(1.0)
    cancelled.cancel()
    await asyncio.wait({cancelled})
    rig.stager.gate.set()
    assert len((await storing).spans) == 3
    await rig.aclose()


@pytest.mark.parametrize("cancels", [True, False])
@in_virtual_time
async def test_a_store_that_fails_ends_the_wait_of_lookups(cancels: bool) -> None:
    rig, chain = make_rig(), chain_of(48)
    loop = asyncio.get_running_loop()
    rig.stager.gate = asyncio.Event()
    storing = asyncio.create_task(store(rig, chain))
    await rig.stager.arrived.wait()
    waits = look(rig, chain, 1e3)
    await asyncio.sleep(1.0)
    if cancels:
        storing.cancel()
    else:
        rig.stager.raises = RuntimeError("device lost")
        rig.stager.gate.set()
    match, _ = await waits
    assert (match.tokens, loop.time()) == (0, pytest.approx(1.0))
    await asyncio.wait({storing})
    assert storing.cancelled() is cancels
    if not cancels:
        assert isinstance(storing.exception(), RuntimeError)
    await rig.aclose()


@in_virtual_time
async def test_a_lookup_waits_for_nothing_but_a_promise() -> None:
    rig, chain = make_rig(), chain_of(48)
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert (await look(rig, chain, 1e3))[0].tokens == 0  # nobody stores it
    await rig.send_down(chain)
    rig.backend.gate = asyncio.Event()
    match, lease = await look(rig, chain, 1e3)
    loading = asyncio.create_task(rig.stack.promote(match))
    await rig.backend.arrived.wait()
    again, _ = await look(rig, chain_of(64), 1e3)  # somebody loads it: that is no promise
    assert again.tokens == 48
    assert loop.time() == began
    rig.backend.gate.set()
    await loading
    rig.planner.release(lease.number)
    await rig.aclose()


# -- long prompts ----------------------------------------------------------------------------------


class Parts:
    """Counts what each gather moves; the second one waits, or fails."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.sizes: list[int] = []
        self.second = asyncio.Event()
        self.raises: Exception | None = None
        self.gather, rig.stager.gather = rig.stager.gather, self.count  # type: ignore[method-assign]

    async def count(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        self.sizes.append(len(copies))
        if len(self.sizes) == 2:
            if self.raises is not None:
                raise self.raises
            await self.second.wait()
        await self.gather(view, copies)


@in_virtual_time
async def test_a_long_prompt_is_gathered_in_parts_and_served_part_by_part() -> None:
    rig, chain = make_rig(pages=512), chain_of(300 * 16)
    parts = Parts(rig)
    storing = asyncio.create_task(store(rig, chain))
    await asyncio.sleep(1.0)
    assert rig.planner.match(chain).tokens == 16 * parts.sizes[0]  # others need not wait for all
    parts.second.set()
    stored = await storing
    assert len(stored.spans) == sum(parts.sizes) == 300
    assert max(parts.sizes) <= 36
    count = len(parts.sizes)
    assert rig.planner.match(chain).tokens == chain.num_tokens
    assert rig.backend.count("put") == 300
    again = await store(rig, chain)
    assert (len(again.spans), len(again.skipped), len(parts.sizes)) == (0, 300, count)
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.parametrize("how", ["cancelled", "raises"])
@in_virtual_time
async def test_what_ends_a_long_store_leaves_whole_chunks_and_holds_nothing(how: str) -> None:
    rig, chain = make_rig(pages=512), chain_of(300 * 16)
    rig.hold(chain_of(20 * 16))
    promised = len(rig.planner.promises)
    parts = Parts(rig)
    parts.raises = RuntimeError("device lost") if how == "raises" else None
    storing = asyncio.create_task(store(rig, chain))
    await asyncio.sleep(1.0)
    storing.cancel()
    await asyncio.wait({storing})
    reached = rig.planner.match(chain).tokens
    assert 16 * 20 < reached == 16 * (20 + parts.sizes[0])
    assert len(rig.planner.promises) == promised
    await rig.settled()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@in_virtual_time
async def test_the_prefix_of_a_long_store_stays_until_all_of_it_is_planned() -> None:
    rig, chain = make_rig(pages=256, write="never"), chain_of(400 * 16)
    rig.hold(chain_of(20 * 16))
    parts = Parts(rig)
    parts.second.set()
    stored = await store(rig, chain)
    assert stored.dropped
    assert rig.planner.match(chain).tokens == 256 * 16
    check_accounts(rig.planner, idle=True)
    await rig.aclose()
