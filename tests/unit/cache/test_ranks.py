"""A planner and ranks that share its slab and speak in messages, here without other processes."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import config, group, layout, tokens
from engine import Engine, same
from fleet import Fleet, fleet
from hang import HANG
from stacks import check_accounts, hybrid_layout

from kvlayer import Cache, KVLayout, KVView, Portal
from kvlayer.api.rank_worker import RankWorker
from kvlayer.errors import ArgumentError, ClosedError, LayoutError, MessageError, UnsupportedError
from kvlayer.layout import HND, MLA_BLOCKS, NHD, AttentionKind, KVGroup
from kvlayer.results import Cause
from kvlayer.tier.messages import Completion, Greeting, Missed, Order, Task, Verb
from kvlayer.tier.ranks.rank_team import RankTeam, RemoteView

LATENT = KVGroup(AttentionKind.MLA, (0, 1, 2), "bfloat16", head_size=8)


def shard(lo: int, hi: int, **how: Any) -> KVLayout:
    return KVLayout.single(group(), NHD, tokens_per_block=4, heads=(lo, hi), **how)


TWO = [shard(0, 1), shard(1, 2)]
FLEETS: dict[str, tuple[KVLayout, list[KVLayout]]] = {
    "one rank": (layout(), [layout()]),
    "two ranks": (layout(), TWO),
    "two stages": (layout(), [shard(0, 2, layers=(0, 1)), shard(0, 2, layers=(1, 3))]),
    "two layouts": (
        layout(),
        [shard(0, 1), KVLayout.single(group(), HND, tokens_per_block=8, heads=(1, 2))],
    ),
    "replicated": (
        KVLayout.single(LATENT, MLA_BLOCKS, tokens_per_block=4),
        [KVLayout.single(LATENT, MLA_BLOCKS, tokens_per_block=4)] * 2,
    ),
    "window and state": (hybrid_layout(), [hybrid_layout()]),
}


async def clear_host(cache: Cache) -> None:
    await cache.control.clear("cpu")


async def settled(cache: Cache) -> None:
    """Every account is exact and nothing is held."""
    check_accounts(cache.stack.planner, idle=True)
    assert not cache.stack.planner.leases


@pytest.fixture
def two() -> Iterator[Fleet]:
    with fleet(config(), layout(), TWO) as ranks:
        yield ranks


def bits(ranks: Fleet, slots: Any) -> list[torch.Tensor]:
    return [plane for engine in ranks.engines for plane in engine.read(slots)]


# -- moves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FLEETS)
def test_what_ranks_store_comes_back_into_other_tensors_bit_for_bit(
    tmp_path: Path, kind: str
) -> None:
    union, shares = FLEETS[kind]
    with fleet(config(tmp_path, host="512KiB"), union, shares) as ranks:
        here = torch.arange(8, 8 + 78)
        if kind == "replicated":  # as replicas are
            ranks.engines = [ranks.engines[0], *ranks.engines[:1]]
        report = ranks.store(tokens(78), here)
        assert (report.stored, report.failed, report.dropped) == (5, (), 0)
        before = bits(ranks, here)
        ranks.portal.call(clear_host)  # what comes back comes from disk
        ranks.fresh(50)
        there = torch.arange(0, 78)
        assert ranks.load(tokens(78), there).tokens == 78
        after = bits(ranks, there)
        if kind == "window and state":  # the window's start is not loaded
            whole = len(hybrid_layout().groups[0].group.layers) * 2
            assert same([p[78 - 20 :] for p in before], [p[78 - 20 :] for p in after])
            before, after = before[:whole], after[:whole]
        assert same(before, after)
        assert {order.view for order in ranks.orders} == {"store", "load"}
        assert {order.rank for order in ranks.orders} == set(range(len(shares)))
        ranks.portal.call(settled)


def test_an_engine_of_one_rank_reads_what_two_ranks_wrote_and_back(tmp_path: Path) -> None:
    slots = torch.arange(64)
    with fleet(config(tmp_path, head_shards=2), layout(), TWO) as ranks:
        ranks.store(tokens(64), slots)
        halves = [engine.read(slots) for engine in ranks.engines]
    single = Engine(layout(), 32, 9)
    with Portal.open(config(tmp_path, head_shards=2), layout()) as portal:
        with portal.lookup(tokens(64)) as lookup:
            assert lookup.wait(HANG).tokens == 64
            portal.call(Cache.retrieve, lookup.hit, single.view(slots))
        assert same(single.read(slots, heads=(0, 1)), halves[0])
        assert same(single.read(slots, heads=(1, 2)), halves[1])
        portal.call(Cache.store, tokens(64, 1), single.view(slots))
    with fleet(config(tmp_path, head_shards=2), layout(), TWO) as ranks:
        ranks.fresh(70)
        assert ranks.load(tokens(64, 1), slots).tokens == 64
        assert same(ranks.engines[1].read(slots), single.read(slots, heads=(1, 2)))


def test_a_view_that_covers_a_part_gets_that_part(two: Fleet) -> None:
    two.store(tokens(48), torch.arange(48))
    kept = bits(two, torch.arange(20, 40))
    two.fresh(60)
    untouched = bits(two, torch.arange(20, 128))
    with two.portal.lookup(tokens(48)) as lookup:
        view = two.view("part", torch.arange(20))
        job = two.portal.submit(Cache.retrieve, lookup.hit, view, first_token=20)
        assert two.drive(job).tokens == 40
    assert {(order.start, order.stop) for order in two.orders[-2:]} == {(20, 40)}
    assert same(bits(two, torch.arange(20)), kept)
    assert same(bits(two, torch.arange(20, 128)), untouched)


def test_a_long_move_is_several_orders(two: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlayer.tier.ranks.rank_team.MAX_PIECES", 2)
    assert two.store(tokens(78), torch.arange(78)).stored == 5
    assert [len(order.pieces) for order in two.orders] == [2, 2, 1, 2, 2, 1]
    assert len({order.number for order in two.orders}) == 6
    before = bits(two, torch.arange(78))
    two.fresh(80)
    assert two.load(tokens(78), torch.arange(78)).tokens == 78
    assert same(bits(two, torch.arange(78)), before)


# -- failures -------------------------------------------------------------------------------------


def failing(rank: int, first_token: int, fleet: Fleet) -> Any:
    """Completions in which ``rank`` failed to move one chunk."""

    def spoil(completion: Completion) -> Completion:
        if completion.rank != rank:
            return completion
        missed = [
            Missed(place, Cause.RANK_DOWN, "no luck")
            for place, piece in enumerate(fleet.orders[-1].pieces)
            if piece.first_token == first_token
        ]
        return completion._replace(missed=tuple(missed))

    return spoil


def test_one_ranks_failure_to_gather_ends_what_is_stored_for_all(two: Fleet) -> None:
    two.spoil = failing(1, 32, two)
    report = two.store(tokens(64), torch.arange(64))
    assert report.stored == 2
    assert [(f.span.start, f.cause, f.detail) for f in report.failed] == [
        (32, Cause.RANK_DOWN, "no luck"),
        (48, Cause.RANK_DOWN, "no luck"),
    ]
    with two.portal.lookup(tokens(64)) as lookup:
        assert lookup.hit.tokens == 32
    two.portal.call(settled)
    two.spoil = lambda completion: completion
    assert two.store(tokens(64), torch.arange(64)).stored == 2  # and it can be stored anew
    with two.portal.lookup(tokens(64)) as lookup:
        assert lookup.hit.tokens == 64


def test_one_ranks_failure_to_scatter_shortens_everybodys_prefix(two: Fleet) -> None:
    two.store(tokens(64), torch.arange(64))
    before = [plane[:16] for plane in bits(two, torch.arange(64))]
    two.fresh(60)
    two.spoil = failing(0, 16, two)
    report = two.load(tokens(64), torch.arange(64))
    assert report.tokens == 16
    assert [(f.span.start, f.cause) for f in report.failed] == [(16, Cause.RANK_DOWN)]
    assert same([plane[:16] for plane in bits(two, torch.arange(64))], before)
    two.portal.call(settled)


def test_a_rank_that_dies_in_mid_gather_gives_its_memory_back(two: Fleet) -> None:
    job = two.portal.submit(Cache.store, tokens(64), two.view("store", torch.arange(64)))
    orders = {order.rank: order for order in _taken(two, 2)}
    two.ranks.complete(two.answer(orders[0]))
    assert not job.done()
    two.ranks.lost(1, "killed")
    report = job.wait(HANG)
    assert report.stored == 0
    assert {(f.cause, f.detail) for f in report.failed} == {(Cause.RANK_DOWN, "killed")}
    with two.portal.lookup(tokens(64)) as lookup:
        assert lookup.hit.tokens == 0
    assert two.portal.cache.stack.planner.host.extents.used == 0
    two.portal.call(settled)
    two.ranks.complete(two.answer(orders[1]))  # it was only slow: too late
    # Until it is back it is asked for nothing, and nobody waits for it.
    assert two.store(tokens(64), torch.arange(64)).stored == 0
    assert not two.orders
    two.ranks.joined(1)
    assert two.store(tokens(64), torch.arange(64)).stored == 4


def _taken(ranks: Fleet, count: int) -> list[Order]:
    taken: list[Order] = []
    while len(taken) < count:
        taken += ranks.ranks.take(10)
    return taken


@pytest.mark.parametrize("fail", ["view", "device"])
def test_what_goes_wrong_in_a_rank_is_in_its_completion(two: Fleet, fail: str) -> None:
    if fail == "view":
        two.slots["store"] = torch.arange(63)
    else:
        two.engines[1].caches[0][2] = "no tensor"
    view = RemoteView.of("store", range(64))
    two.slots.setdefault("store", torch.arange(64))
    report = two.drive(two.portal.submit(Cache.store, tokens(64), view))
    assert report.stored == 0 and len(report.failed) == 4
    assert "rank" in report.failed[0].detail
    two.portal.call(settled)


# -- giving up ------------------------------------------------------------------------------------


def test_a_cancelled_store_takes_back_what_nobody_took(two: Fleet) -> None:
    job = two.portal.submit(Cache.store, tokens(64), two.view("store", torch.arange(64)))
    two.portal.call(_begun, two.ranks)
    assert job.cancel()
    wait([job], HANG)
    two.portal.call(_idle, two.portal)
    assert two.ranks.take() == []
    assert two.portal.cache.stack.planner.host.extents.used == 0


async def _begun(cache: Cache, ranks: RankTeam) -> None:
    while len(ranks._outbox) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)  # planning takes turns of the loop
    assert cache.stack.planner.host.extents.used


async def _idle(cache: Cache, portal: Portal) -> None:
    others = [task for task in portal._tasks.values() if task is not asyncio.current_task()]
    if others:
        await asyncio.wait(others)
    check_accounts(cache.stack.planner, idle=True)


def test_a_cancelled_store_keeps_the_slots_until_the_ranks_let_go(two: Fleet) -> None:
    job = two.portal.submit(Cache.store, tokens(64), two.view("store", torch.arange(64)))
    orders = _taken(two, 2)
    assert job.cancel()
    host = two.portal.cache.stack.planner.host
    used = host.extents.used
    assert used == host.pinned_nbytes > 0
    for order in orders:
        two.portal.call(Cache.recovered)  # the loop has had its turns
        assert host.extents.used == used
        two.ranks.complete(two.answer(order))
    two.portal.call(_idle, two.portal)
    assert host.extents.used == 0


def test_rebinding_waits_until_the_ranks_have_let_go_of_their_tensors(two: Fleet) -> None:
    """Orders that nobody took are taken back; what a rank copies may not change under it."""
    new = dataclasses.replace(two.portal.cache.namespace, weights="sha256:" + "cd" * 32)
    changed: list[int] = []

    async def change() -> None:
        changed.append(two.portal.cache.stack.planner.host.extents.used)

    job = two.portal.submit(Cache.store, tokens(64), two.view("store", torch.arange(64)))
    orders = _taken(two, 2)
    rebinding = two.portal.submit(Cache.rebind, new, change)
    for order in orders:
        two.portal.call(Cache.recovered)  # the loop has had its turns
        assert not rebinding.done() and changed == []
        two.ranks.complete(two.answer(order))
    rebinding.wait(HANG)
    assert changed == [0]
    report = job.wait(HANG)
    assert (report.stored, [f.cause for f in report.failed]) == (0, [Cause.REBOUND] * 4)
    assert two.store(tokens(64), torch.arange(64)).stored == 4
    assert {piece.key.namespace for order in two.orders[-2:] for piece in order.pieces} == {
        new.digest
    }
    two.portal.call(settled)


@pytest.mark.parametrize("abandon", [False, True])
def test_closing_waits_for_no_rank(abandon: bool) -> None:
    with fleet(config(), layout(), TWO) as ranks:
        store = ranks.portal.submit(Cache.store, tokens(64), ranks.view("a", torch.arange(64)))
        (first, second) = _taken(ranks, 2)
        closing = threading.Thread(target=ranks.portal.close, kwargs={"abandon": abandon})
        closing.start()
        closing.join(HANG)
        assert not closing.is_alive()
        assert store.cancelled()
        for late in (first, second):
            ranks.ranks.complete(ranks.answer(late))  # its memory is still there for it
        with pytest.raises(ClosedError):
            ranks.ranks.greeting()


def test_a_loop_that_dies_waits_for_no_rank() -> None:
    async def leave(_: Cache) -> None:
        asyncio.get_running_loop().stop()

    ranks = RankTeam(TWO)
    portal = Portal.open(config(), layout(), ranks=ranks)
    store = portal.submit(Cache.store, tokens(64), RemoteView.of("a", range(64)))
    assert len(ranks.take(10)) == 2
    portal.submit(leave)
    portal._thread.join(HANG)
    with pytest.raises(RuntimeError, match="loop stopped"):
        portal.close()
    assert store.done()


def test_no_slot_is_handed_out_again_while_a_rank_may_still_write_to_it(two: Fleet) -> None:
    job = two.portal.submit(Cache.store, tokens(64), two.view("store", torch.arange(64)))
    _taken(two, 2)
    two.portal.cache.parts.part_from_ranks()
    assert job.wait(HANG).stored == 0
    report = two.portal.call(Cache.store, tokens(64), two.view("store", torch.arange(64)))
    assert (report.stored, report.dropped) == (0, 4)


# -- messages that are wrong ----------------------------------------------------------------------


def _order(ranks: Fleet) -> Order:
    """An order for rank 0 as it should be."""
    ranks.portal.submit(Cache.store, tokens(64), ranks.view("store", torch.arange(64)))
    return next(order for order in _taken(ranks, 2) if order.rank == 0)


def _piece(order: Order, **change: Any) -> Order:
    return order._replace(pieces=(order.pieces[0]._replace(**change), *order.pieces[1:]))


def test_an_order_that_is_not_right_is_refused_and_moves_nothing(two: Fleet) -> None:
    good = _order(two)
    key = good.pieces[0].key
    wrong: dict[str, Order] = {
        "rank": good._replace(rank=1),
        "window": good._replace(start=64, stop=0),
        "slot past the end": _piece(good, offset=1 << 30),
        "slot between pages": _piece(good, offset=512),
        "size": _piece(good, nbytes=8192),
        "tokens": _piece(good, num_tokens=0),
        "another rank's heads": _piece(good, key=type(key)(key.replace("h0-1", "h1-2"))),
        "no such group": _piece(good, key=type(key)(key.replace("/g0.", "/g7."))),
        "no such layers": _piece(good, key=type(key)(key.replace("l0-3", "l0-9"))),
        "another form": _piece(good, key=type(key)(key.replace("canonical", "native:x"))),
    }
    slab = two.portal.cache.stack.objects.slab
    before = bytes(slab.view(0, slab.nbytes))
    worker, view = two.workers[0], two.engines[0].view(torch.arange(64))
    for what, order in wrong.items():
        with pytest.raises(MessageError, match=r".") as caught:
            worker.call(RankWorker.carry_out, order.to_bytes(), view)
        assert str(caught.value), what
    for packed in (b"", b"order", good.to_bytes()[:-1], Completion(1, 0, 0).to_bytes()):
        with pytest.raises(MessageError):
            worker.call(RankWorker.carry_out, packed, view)
    assert bytes(slab.view(0, slab.nbytes)) == before
    answer = Completion.from_bytes(worker.call(RankWorker.carry_out, good.to_bytes(), view))
    assert answer == Completion(good.number, 0, len(good.pieces))


def test_an_answer_that_is_none_is_refused_and_the_order_stays_open(two: Fleet) -> None:
    good = _order(two)
    count = len(good.pieces)
    for wrong in (
        Completion(good.number + 99, 0, count),
        Completion(good.number, 1, count),
        Completion(good.number, 0, count - 1),
        Completion(good.number, 0, count + 1),
        Completion(good.number, 0, count, (Missed(count, Cause.RANK_DOWN, ""),)),
    ):
        with pytest.raises(MessageError):
            two.ranks.complete(wrong.to_bytes())
    with pytest.raises(MessageError):
        two.ranks.complete(good.to_bytes())
    two.ranks.complete(two.answer(good))
    two.ranks.complete(two.answer(good))  # twice is too late, not wrong
    two.ranks.lost(1, "the test is over")


def test_an_answer_to_an_order_that_nobody_took_yet_is_refused(two: Fleet) -> None:
    """Else the order would be carried out when its slots are somebody else's."""
    taken = _order(two)
    two.portal.submit(Cache.store, tokens(64, seed=2), two.view("store", torch.arange(64)))
    early = Completion(taken.number + len(two.ranks), taken.rank, len(taken.pieces)).to_bytes()
    said = ""
    while "not sent to anybody" not in said:  # until there is such an order
        with pytest.raises(MessageError) as caught:
            two.ranks.complete(early)
        said = str(caught.value)
    assert _taken(two, 2)[0].number == taken.number + len(two.ranks)
    two.ranks.complete(early)
    for rank in range(len(two.ranks)):
        two.ranks.lost(rank, "the test is over")


@pytest.mark.parametrize("rank", [-1, 2, "0", True, 0.0, None, [0]])
def test_a_rank_that_there_is_not_is_refused_instead_of_being_waited_for(
    two: Fleet, rank: Any
) -> None:
    for tell in (two.ranks.joined, lambda rank: two.ranks.lost(rank, "gone")):
        with pytest.raises(ArgumentError, match="rank must be a whole number"):
            tell(rank)


@pytest.mark.parametrize("seconds", [float("nan"), "1", True, [1]])
def test_a_time_to_wait_for_orders_that_is_none_is_refused(two: Fleet, seconds: Any) -> None:
    with pytest.raises(ArgumentError, match="seconds must be a number"):
        two.ranks.take(seconds)


@pytest.mark.parametrize("layouts", [None, 7, "layouts", [None], [[layout()]]])
def test_a_team_is_of_layouts(layouts: Any) -> None:
    with pytest.raises(ArgumentError):
        RankTeam(layouts)


@pytest.mark.parametrize("read", [Completion.from_bytes, Task.from_bytes, Greeting.from_bytes])
def test_memory_that_holds_no_bytes_is_no_message(read: Any) -> None:
    with pytest.raises(MessageError):
        read(array("i", [1, 2, 3]))


def test_a_rank_that_the_planner_takes_for_another_does_not_join(two: Fleet) -> None:
    greeting = two.ranks.greeting()
    for number, held in ((1, TWO[0]), (2, TWO[0]), (0, layout()), (0, hybrid_layout())):
        with pytest.raises(MessageError) as caught:
            RankWorker.start(greeting, held, number)
        assert caught.value.hint
    other = dataclasses.replace(group(), dtype="float16")  # of the same size in memory
    with pytest.raises(MessageError, match="float16"):
        RankWorker.start(greeting, KVLayout.single(other, NHD, tokens_per_block=4, heads=(0, 1)), 0)
    gone = Greeting.from_bytes(greeting)
    gone = gone._replace(slab=gone.slab._replace(inode=1))
    with pytest.raises(UnsupportedError):
        RankWorker.start(gone.to_bytes(), TWO[0], 0)


def test_a_rank_joins_by_a_descriptor_where_the_planner_cannot_be_seen(two: Fleet) -> None:
    greeting = Greeting.from_bytes(two.ranks.greeting())
    slab = two.portal.cache.stack.objects.slab
    hidden = greeting._replace(slab=greeting.slab._replace(pid=1 << 22)).to_bytes()
    with RankWorker.start(hidden, TWO[0], 0, slab_fd=slab.fd) as rank:
        order = _order(two)
        view = two.engines[0].view(torch.arange(64))
        answer = Completion.from_bytes(rank.call(RankWorker.carry_out, order.to_bytes(), view))
    assert answer == Completion(order.number, 0, len(order.pieces))
    assert any(slab.view(order.pieces[0].offset, 64))
    two.ranks.lost(1, "the test is over")


def test_views_and_caches_that_do_not_go_together_are_refused(two: Fleet) -> None:
    local = Engine(layout(), 32).view(torch.arange(64))
    assert isinstance(local, KVView)
    with pytest.raises(LayoutError, match="RemoteView"):
        two.portal.call(Cache.store, tokens(64), local)
    with Portal.open(config(), layout()) as portal, pytest.raises(LayoutError):
        portal.call(Cache.store, tokens(64), RemoteView.of("a", range(64)))


def test_ranks_that_do_not_make_up_the_layout_cannot_be_planned_for() -> None:
    before = set(threading.enumerate())
    with pytest.raises(LayoutError) as caught:
        Portal.open(config(), layout(), ranks=RankTeam(TWO[:1]))
    assert "h0-1" in str(caught.value) and caught.value.hint
    assert set(threading.enumerate()) <= before


def test_a_rank_gathers_only_what_it_holds_all_of(two: Fleet) -> None:
    """It may be asked to scatter what it needs a part of, as other fleets have cut it."""
    good = _order(two)
    key = good.pieces[0].key
    whole = _piece(good, key=type(key)(key.replace("h0-1", "h0-2")))
    for verb, ok in ((Verb.GATHER, False), (Verb.SCATTER, True)):
        order = whole._replace(verb=verb, pieces=whole.pieces[:1])
        answer = Completion.from_bytes(two.answer(order))
        assert answer.asked == 1 and bool(answer.missed) is not ok
    for rank in (0, 1):
        two.ranks.lost(rank, "the test is over")
