"""The planner: what is usable, what is reserved, and nothing that stays held by mistake."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from stacks import (
    CHUNK,
    NAMESPACE,
    TAIL,
    Clock,
    chain_of,
    check_accounts,
    hybrid_layout,
    make_planner,
    probes,
    store,
    tail_probes,
)

from kvlayer._steps import finish
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.errors import CapacityError
from kvlayer.eviction.arc import ARC
from kvlayer.eviction.lfu import LFU
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.identity.keys import ChunkChain, ObjectKey, Part, Span
from kvlayer.results import Cause, OwnerStats
from kvlayer.tier.planner.demotion_step import DemotionTargets, PendingWrite, end_leaving
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import Planner, Reservation
from kvlayer.tier.planner.records import HostState, ObjectRecord

FULL = Part(0, (0, 2), (0, 2))
WINDOW = Part(1, (0, 1), (0, 2))
STATE = Part(2, (0, 1), None)


def key(chain: ChunkChain, index: int, part: Part = FULL) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, "0", chain.hashes[index], CHUNK, part)


def stops(match: Match) -> list[int]:
    return [span.stop for span in match.spans]


def records(planner: Planner, chain: ChunkChain, index: int) -> list[ObjectRecord]:
    chunk = planner.directory.chunk(NAMESPACE, chain.hashes[index], CHUNK, "0")
    return [] if chunk is None else list(chunk.objects)


# -- lookup -------------------------------------------------------------------------------------


def test_a_match_ends_before_the_first_gap() -> None:
    planner, chain = make_planner(), chain_of(64)
    store(planner, chain)
    assert stops(planner.match(chain)) == [16, 32, 48, 64]
    planner.evict(records(planner, chain, 2), Cause.CLEARED, "")
    assert stops(planner.match(chain)) == [16, 32]
    assert planner.match(chain_of(64, seed=1)).tokens == 0


def test_the_longest_tail_extends_a_match() -> None:
    planner = make_planner()
    store(planner, chain_of(24), tail=True)
    store(planner, chain_of(20), tail=True)
    assert planner.match(chain_of(100)).tokens == 24
    assert planner.match(chain_of(23)).tokens == 20
    assert planner.match(chain_of(19)).tokens == 16


def test_a_tail_is_found_at_the_first_missing_chunk() -> None:
    planner, chain = make_planner(), chain_of(64)
    store(planner, chain)
    store(planner, chain_of(40), tail=True)
    planner.evict(records(planner, chain, 2), Cause.CLEARED, "")
    assert planner.match(chain).tokens == 40


def test_a_hybrid_match_needs_the_window_and_the_state_at_its_end() -> None:
    planner, chain = make_planner(layout=hybrid_layout(20)), chain_of(64)
    store(planner, chain)
    match = planner.match(chain)
    assert match.tokens == 64
    parts = [[r.part for cover in covers for r in cover] for covers in match.covers]
    assert parts == [[FULL], [FULL], [FULL, WINDOW], [FULL, WINDOW, STATE]]
    gone = [r for r in records(planner, chain, 3) if r.part == STATE]
    planner.evict(gone, Cause.CLEARED, "")
    match = planner.match(chain)
    assert match.tokens == 48
    parts = [[r.part for cover in covers for r in cover] for covers in match.covers]
    assert parts == [[FULL], [FULL, WINDOW], [FULL, WINDOW, STATE]]


def test_a_tail_without_its_state_gives_way_to_a_shorter_one_that_has_it() -> None:
    planner = make_planner(layout=hybrid_layout(4))
    store(planner, chain_of(20), tail=True)
    store(planner, chain_of(24), tail=True)
    chain = chain_of(24)
    tail = chain.tails(1)[0]
    longest = planner.directory.chunk(NAMESPACE, tail.hash, tail.tokens, "0")
    assert longest is not None
    state = [found for found in longest.objects if found.part == STATE]
    planner.evict(state, Cause.CLEARED, "")
    assert planner.match(chain).tokens == 20


def test_a_model_of_states_alone_finds_a_tail_that_is_not_the_longest() -> None:
    layout = hybrid_layout()
    only_state = type(layout)(layout.groups[2:])
    planner = make_planner(layout=only_state)
    store(planner, chain_of(20), tail=True)
    assert planner.match(chain_of(28)).tokens == 20


def test_probes_are_what_the_directory_does_not_know_from_the_gap_on() -> None:
    planner, chain = make_planner(), chain_of(64)
    store(planner, chain)
    assert probes(planner, chain) == []
    planner.evict([r for i in (1, 3) for r in records(planner, chain, i)], Cause.CLEARED, "")
    assert probes(planner, chain) == [key(chain, 1), key(chain, 3)]
    assert probes(planner, chain_of(15)) == []


def test_a_hybrid_probe_asks_for_every_missing_part() -> None:
    planner, chain = make_planner(layout=hybrid_layout(20)), chain_of(32)
    assert probes(planner, chain) == [
        key(chain, i, part) for i in (0, 1) for part in (FULL, WINDOW, STATE)
    ]
    planner.note([key(chain, 0, FULL), key(chain, 1, FULL)], 1)
    assert probes(planner, chain) == [
        key(chain, i, part) for i in (0, 1) for part in (WINDOW, STATE)
    ]


def test_tail_probes_are_longest_first_at_the_first_missing_chunk() -> None:
    planner, chain = make_planner(), chain_of(64)
    store(planner, chain_of(16))
    keys = tail_probes(planner, chain)
    assert [k.end_hash for k in keys] == [tail.hash for tail in chain.tails(1)]
    assert len(keys) == 3


def test_nothing_is_asked_below_a_tail_that_is_there() -> None:
    planner, chain = make_planner(), chain_of(30)  # one chunk, then tails of 12, 8 and 4
    store(planner, chain_of(16))
    longest, middle, _ = chain.tails(1)
    planner.note([ObjectKey.of(NAMESPACE, "0", middle.hash, middle.tokens, FULL)], 1)
    assert [k.end_hash for k in tail_probes(planner, chain)] == [longest.hash]
    assert finish(planner.search(planner.match(chain), every=False).next(0))
    planner.note([ObjectKey.of(NAMESPACE, "0", longest.hash, longest.tokens, FULL)], 1)
    assert tail_probes(planner, chain) == []
    assert not finish(planner.search(planner.match(chain), every=False).next(0))


@pytest.mark.parametrize("count", [0, 3, 4, 15, 16, 18, 30, 32])
def test_a_match_of_all_that_has_a_name_is_final(count: int) -> None:
    planner, chain = make_planner(), chain_of(count)
    assert (finish(planner.search(planner.match(chain), every=False).next(0)) == []) == (
        count < TAIL
    )
    store(planner, chain, tail=True)
    match = planner.match(chain)
    assert match.tokens == chain.named_tokens == count // TAIL * TAIL
    assert not finish(planner.search(planner.match(chain), every=False).next(0))


def test_shards_of_other_ranks_are_probed_as_this_rank_cuts() -> None:
    planner, chain = make_planner(head_shards=2), chain_of(16)
    keys = probes(planner, chain)
    assert keys == [key(chain, 0, Part(0, (0, 2), (h, h + 1))) for h in (0, 1)]
    planner.note(keys[:1], 1)
    assert planner.match(chain).tokens == 0
    planner.note(keys[1:], 1)
    match = planner.match(chain)
    assert match.tokens == 16
    assert {r.key for r in match.path()} == set(keys)


@pytest.mark.parametrize(
    "part",
    [
        Part(0, (0, 9), (0, 2)),
        Part(0, (0, 2), (0, 9)),
        Part(0, (0, 2), None),
        Part(7, (0, 2), (0, 2)),
    ],
)
def test_a_part_the_model_does_not_have_is_not_believed(part: Part) -> None:
    """A key found on a disk may name anything; it must not reach the serving path."""
    planner, chain = make_planner(), chain_of(16)
    planner.note([key(chain, 0, part)], 1)
    assert planner.match(chain).tokens == 0
    assert len(planner.directory) == 0


def test_an_object_of_another_namespace_is_not_believed() -> None:
    planner, chain = make_planner(), chain_of(16)
    planner.note([ObjectKey.of("cd" * 32, "0", chain.hashes[0], CHUNK, FULL)], 1)
    assert planner.match(chain).tokens == 0


def claimed(planner: Planner, match: Match, lease: Lease) -> Match:
    """What a retrieve would load, let go of again."""
    now = planner.claim(match, lease)
    assert all(found.pins for found in now.path())
    planner.unpin(now.path())
    return now


def test_a_claimed_match_stays_whoever_releases_its_lease() -> None:
    planner, chain = make_planner(), chain_of(64)
    store(planner, chain)
    match = planner.match(chain)
    lease = planner.lease(match, owner="", seconds=5.0)
    claim = planner.claim(match, lease)
    assert planner.release(lease.number)
    assert planner.evict(claim.path(), Cause.CLEARED, "") == []
    planner.unpin(claim.path())
    assert len(planner.evict(claim.path(), Cause.CLEARED, "")) == 4
    check_accounts(planner, idle=True)


def test_an_expired_lease_leaves_what_is_still_usable() -> None:
    clock = Clock()
    planner, chain = make_planner(clock=clock), chain_of(64)
    store(planner, chain)
    match = planner.match(chain)
    lease = planner.lease(match, owner="", seconds=5.0)
    assert claimed(planner, match, lease) is match
    clock.now += 5.0
    planner.evict(records(planner, chain, 1), Cause.CLEARED, "")
    assert claimed(planner, match, lease) == match  # nothing expires by itself; this call did it
    planner.evict(records(planner, chain, 1), Cause.CLEARED, "")
    assert stops(claimed(planner, match, lease)) == [16]
    check_accounts(planner, idle=True)


def test_an_expired_hybrid_match_never_skips_what_its_end_needs() -> None:
    """More of the prompt was stored meanwhile: the match must not borrow its longer window."""
    clock = Clock()
    planner, chain = make_planner(layout=hybrid_layout(20), clock=clock), chain_of(96)
    store(planner, chain_of(48))
    match = planner.match(chain)
    assert match.tokens == 48
    lease = planner.lease(match, owner="", seconds=5.0)
    store(planner, chain, first_token=48)
    clock.now += 5.0
    again = claimed(planner, match, lease)
    assert again.tokens == 48
    parts = [[r.part for cover in covers for r in cover] for covers in again.covers]
    assert parts == [[FULL], [FULL, WINDOW], [FULL, WINDOW, STATE]]


# -- store --------------------------------------------------------------------------------------


def test_a_store_reserves_what_is_missing_and_skips_what_is_there() -> None:
    planner = make_planner()
    assert [s.stop for s in store(planner, chain_of(32)).spans] == [16, 32]
    todo = store(planner, chain_of(64))
    assert [s.stop for s in todo.spans] == [48, 64]
    assert [s.stop for s, _ in todo.skipped] == [16, 32]
    check_accounts(planner, idle=True)


def test_two_stores_of_the_same_content_at_once_reserve_one_slot() -> None:
    planner, chain = make_planner(), chain_of(32)
    first = planner.plan_store(chain, 0, tail=False, holds=_all)
    second = planner.plan_store(chain, 0, tail=False, holds=_all)
    assert len(first.gathers) == 2
    assert second.gathers == []
    assert second.skipped == []  # the first may fail yet
    assert [span for span, promise in second.joined] == [*chain.spans(2)]
    assert {promise for _, promise in second.joined} == {first.promise}
    assert planner.match(chain).tokens == 0
    planner.stored(first.gathers, ok=False)
    assert planner.match(chain).tokens == 0
    check_accounts(planner, idle=True)


def test_a_failed_gather_gives_everything_back() -> None:
    planner, chain = make_planner(layout=hybrid_layout()), chain_of(40)
    todo = planner.plan_store(chain, 0, tail=True, holds=_all)
    assert len(todo.gathers) == 9
    planner.stored(todo.gathers, ok=False)
    assert planner.host.extents.used == 0
    assert len(planner.directory) == 0
    check_accounts(planner, idle=True)


def test_when_host_memory_is_held_the_rest_of_the_prompt_is_dropped() -> None:
    planner, chain = make_planner(pages=3), chain_of(64)
    todo = planner.plan_store(chain, 0, tail=False, holds=_all)
    assert [s.stop for s in todo.spans] == [16, 32, 48]
    assert [s.stop for s in todo.dropped] == [64]
    planner.stored(todo.gathers, ok=True)
    planner.settle(chain, todo.gathers)
    assert planner.match(chain).tokens == 48
    check_accounts(planner, idle=True)


def test_a_span_that_fits_only_in_part_is_not_stored_at_all() -> None:
    planner, chain = make_planner(layout=hybrid_layout(), pages=5), chain_of(32)
    todo = planner.plan_store(chain, 0, tail=False, holds=_all)
    assert len(todo.gathers) == 3
    assert [s.stop for s in todo.dropped] == [32]
    check_accounts(planner)
    planner.stored(todo.gathers, ok=True)
    planner.settle(chain, todo.gathers)
    check_accounts(planner, idle=True)
    assert planner.host.extents.used == 3 * 4096


@pytest.mark.parametrize("first_token", [0, 32])
def test_a_store_never_evicts_the_beginning_of_its_own_prompt(first_token: int) -> None:
    """What it stores would be dead weight: no prefix leads to it any more."""
    planner, chain = make_planner(pages=3), chain_of(64)
    store(planner, chain_of(32))
    store(planner, chain_of(16, seed=1))
    todo = store(planner, chain, first_token=first_token)
    assert [s.stop for s in todo.spans] == [48]
    assert [s.stop for s in todo.dropped] == [64]
    assert planner.match(chain).tokens == 48
    assert planner.match(chain_of(16, seed=1)).tokens == 0
    check_accounts(planner, idle=True)


def test_chunks_before_the_view_are_left_alone() -> None:
    planner, chain = make_planner(), chain_of(64)
    todo = store(planner, chain, first_token=17)
    assert [s.start for s in todo.spans] == [32, 48]


def test_a_window_is_stored_only_where_the_engine_still_holds_it() -> None:
    planner, chain = make_planner(layout=hybrid_layout(20)), chain_of(64)

    def holds(group: int, span: Span) -> bool:
        return group == 1 and span.start >= 32

    todo = store(planner, chain, holds=holds)
    assert [r.record.part for r in todo.gathers] == [FULL, FULL, FULL, WINDOW, FULL, WINDOW]
    assert planner.match(chain).tokens == 0  # no state anywhere


def test_a_longer_tail_and_a_full_chunk_supersede_shorter_tails() -> None:
    planner = make_planner(pages=4)
    store(planner, chain_of(4), tail=True)
    store(planner, chain_of(16, seed=1))
    store(planner, chain_of(16, seed=2))
    store(planner, chain_of(8), tail=True)  # the older tail is now the cheapest thing to lose
    store(planner, chain_of(16, seed=3))
    assert planner.match(chain_of(4)).tokens == 0
    assert planner.match(chain_of(8)).tokens == 8
    assert planner.match(chain_of(16, seed=1)).tokens == 16
    store(planner, chain_of(16))  # now a chunk holds both, and takes the place of the other tail
    store(planner, chain_of(16, seed=4))
    assert planner.match(chain_of(8)).tokens == 0
    assert planner.match(chain_of(16)).tokens == 16


def test_a_superseded_tail_that_is_pinned_goes_first_once_it_is_let_go() -> None:
    planner = make_planner(pages=4)
    short = chain_of(4)
    store(planner, short, tail=True)
    lease = planner.lease(planner.match(short), owner="", seconds=9.0)
    store(planner, chain_of(16))
    assert planner.match(short).tokens == 4
    planner.release(lease.number)
    store(planner, chain_of(16, seed=1))
    store(planner, chain_of(16, seed=2))
    assert planner.match(short).tokens == 4
    store(planner, chain_of(16, seed=3))
    assert planner.match(short).tokens == 0


def test_a_prompt_that_is_stored_again_is_recent_again_from_its_end_to_its_beginning() -> None:
    planner = make_planner(pages=4)
    store(planner, chain_of(48))
    store(planner, chain_of(16, seed=1))
    store(planner, chain_of(48))
    store(planner, chain_of(16, seed=2))
    assert planner.match(chain_of(16, seed=1)).tokens == 0
    store(planner, chain_of(16, seed=3))
    assert planner.match(chain_of(48)).tokens == 32


def test_a_lease_that_is_never_released_does_not_stop_the_cache() -> None:
    clock = Clock()
    planner = make_planner(pages=4, clock=clock)
    store(planner, chain_of(64))
    planner.lease(planner.match(chain_of(64)), owner="dead", seconds=30.0)
    blocked = planner.plan_store(chain_of(64, seed=1), 0, tail=False, holds=_all)
    assert blocked.gathers == []
    planner.settle(chain_of(64, seed=1), [])
    assert planner.leases.owners() == {"dead": OwnerStats(1, 4 * 4096)}
    clock.now += 30.0
    assert len(store(planner, chain_of(64, seed=1)).gathers) == 4
    assert planner.leases.owners() == {}
    check_accounts(planner, idle=True)


def test_a_load_finds_the_room_of_a_lease_that_ran_out() -> None:
    clock = Clock()
    planner, wanted = make_planner(pages=4, clock=clock), chain_of(16, seed=1)
    store(planner, chain_of(64))
    planner.note([key(wanted, 0)], 1)
    (record,) = planner.match(wanted).path()
    planner.lease(planner.match(chain_of(64)), owner="dead", seconds=30.0)
    assert planner.plan_fetch(wanted.span(0), record, []) is None
    clock.now += 30.0
    slot = planner.plan_fetch(wanted.span(0), record, [])
    assert slot is not None
    planner.fetched(slot, 1, ok=True)
    check_accounts(planner, idle=True)


@pytest.mark.parametrize("policy", [PrefixLRU, LRU, ARC, LFU])
def test_a_tail_that_was_superseded_goes_first_under_every_policy(
    policy: type[EvictionPolicy],
) -> None:
    for is_leased in (False, True):
        planner = make_planner(pages=6, policy=policy)
        short = chain_of(20)
        store(planner, short, tail=True)
        for _ in range(3):  # used often: it would be the last to go
            match = planner.match(short)
            planner.release(planner.lease(match, owner="", seconds=9.0).number)
        lease = planner.lease(planner.match(short), owner="", seconds=9.0)
        if not is_leased:
            planner.release(lease.number)
        store(planner, chain_of(28), tail=True)
        planner.release(lease.number)
        for seed in range(1, 4):
            store(planner, chain_of(16, seed=seed))
        assert planner.match(short).tokens == 20
        store(planner, chain_of(16, seed=4))
        assert planner.match(short).tokens == 16
        assert planner.match(chain_of(28)).tokens == 28


def test_eviction_is_remembered_with_its_policy() -> None:
    planner, chain = make_planner(pages=1), chain_of(16)
    store(planner, chain)
    store(planner, chain_of(16, seed=1))
    loss = planner.journal.loss(chain, chain.span(0))
    assert loss is not None
    assert (loss.cause, loss.tier) == (Cause.EVICTED, "tier-0")
    assert "prefix-lru" in loss.detail


def test_host_memory_smaller_than_a_chunk_is_refused() -> None:
    with pytest.raises(CapacityError):
        make_planner(layout=hybrid_layout(), pages=2)
    make_planner(layout=hybrid_layout(), pages=3)


# -- lower tiers --------------------------------------------------------------------------------


def down(planner: Planner, chain: ChunkChain, tier: int = 1) -> list[ObjectRecord]:
    """A prompt that is on a lower tier only."""
    todo = store(planner, chain)
    for slot in todo.gathers:
        assert planner.plan_spill(slot.span, slot.record, tier) is not None
        planner.spilled(slot.record, tier, ok=True)
    found = [slot.record for slot in todo.gathers]
    planner.evict(found, Cause.CLEARED, "")
    return found


def test_a_spill_holds_its_object_until_it_ends() -> None:
    planner, chain = make_planner(pages=1), chain_of(16)
    (slot,) = store(planner, chain).gathers
    piece = planner.plan_spill(slot.span, slot.record, 1)
    assert piece is not None
    assert piece.offset == slot.record.offset
    assert planner.plan_spill(slot.span, slot.record, 1) is None  # on its way already
    assert store(planner, chain_of(16, seed=1)).dropped  # the only slot is held
    assert planner.evict([slot.record], Cause.CLEARED, "") == []
    planner.spilled(slot.record, 1, ok=False)
    assert slot.record.tiers == 0
    check_accounts(planner, idle=True)
    assert not store(planner, chain_of(16, seed=1)).dropped


def test_what_is_below_stays_known_when_the_host_gives_it_up() -> None:
    planner, chain = make_planner(), chain_of(32)
    found = down(planner, chain)
    assert [r.tier for r in found] == [1, 1]
    assert planner.match(chain).tokens == 32
    assert planner.plan_spill(chain.span(0), found[0], 1) is None
    assert planner.journal.loss(chain, chain.span(0)) is None
    check_accounts(planner, idle=True)


@pytest.mark.parametrize("ok", [True, False])
def test_a_fetch_leaves_no_pin_however_it_ends(ok: bool) -> None:
    planner, chain = make_planner(), chain_of(16)
    (found,) = down(planner, chain)
    slot = planner.plan_fetch(chain.span(0), found, [])
    assert slot is not None
    assert [found.host] == [HostState.FILLING]
    planner.fetched(slot, 1, ok=ok)
    assert found.host is (HostState.READY if ok else HostState.ABSENT)
    assert found.tiers == 2
    check_accounts(planner, idle=True)


def test_a_store_of_what_a_fetch_brings_up_waits_for_nothing_and_reserves_nothing() -> None:
    planner, chain = make_planner(), chain_of(16)
    (found,) = down(planner, chain)
    slot = planner.plan_fetch(chain.span(0), found, [])
    assert slot is not None
    todo = planner.plan_store(chain, 0, tail=False, holds=_all)
    assert todo.gathers == []
    assert todo.skipped == [(chain.span(0), (found,))]
    planner.stored(todo.gathers, ok=True)
    planner.settle(chain, todo.gathers)
    planner.fetched(slot, 1, ok=False)
    check_accounts(planner, idle=True)


def test_no_room_for_a_fetch_leaves_the_object_where_it_is() -> None:
    planner, chain = make_planner(pages=1), chain_of(16)
    (found,) = down(planner, chain)
    held = store(planner, chain_of(16, seed=1)).gathers[0].record
    planner.pin([held])
    evicted: list[ObjectRecord] = []
    assert planner.plan_fetch(chain.span(0), found, evicted) is None
    assert evicted == []
    assert found.tier == 1
    planner.unpin([held])
    assert planner.plan_fetch(chain.span(0), found, evicted) is not None
    assert evicted == [held]


def test_a_copy_that_is_missing_below_is_no_longer_offered_and_explained() -> None:
    planner, chain = make_planner(), chain_of(16)
    (found,) = down(planner, chain)
    planner.pin([found])
    planner.missing(found, 1, Cause.CORRUPT, "flipped")
    assert planner.match(chain).tokens == 0
    planner.unpin([found])
    assert len(planner.directory) == 0
    loss = planner.journal.loss(chain, chain.span(0))
    assert loss is not None
    assert (loss.cause, loss.tier, loss.detail) == (Cause.CORRUPT, "tier-1", "flipped")


def test_an_object_that_vanished_from_one_tier_is_served_from_another() -> None:
    planner, chain = make_planner(tiers=3), chain_of(16)
    (found,) = down(planner, chain, 1)
    planner.note([found.key], 2)
    planner.vanished([found.key, key(chain_of(16, seed=9), 0)], 1, "evicted from below")
    assert found.tier == 2
    assert planner.match(chain).tokens == 16
    assert planner.journal.loss(chain, chain.span(0)) is None
    planner.vanished([found.key], 2, "evicted from below")
    assert len(planner.directory) == 0
    assert planner.journal.loss(chain, chain.span(0)) is not None


def test_a_record_made_anew_is_not_touched_by_the_pins_on_the_old_one() -> None:
    """Another thread matched, the loop evicted and stored again, then the thread leased."""
    planner, chain = make_planner(), chain_of(16)
    store(planner, chain)
    match = planner.match(chain)
    planner.evict(match.path(), Cause.CLEARED, "")
    lease = planner.lease(match, owner="", seconds=9.0)
    new = store(planner, chain).gathers[0].record
    assert new is not match.path()[0]
    check_accounts(planner, idle=True)
    assert planner.release(lease.number)
    assert planner.match(chain).path() == [new]
    check_accounts(planner, idle=True)


def test_lookups_from_another_thread_never_see_half_a_change() -> None:
    planner = make_planner(layout=hybrid_layout(20), pages=40)
    chain, stop = chain_of(64), threading.Event()
    trouble: list[BaseException] = []

    def look() -> None:
        try:
            while not stop.is_set():
                match = planner.match(chain)
                lease = planner.lease(match, owner="thread", seconds=1e9)
                assert match.tokens in (0, 16, 32, 48, 64)
                probes(planner, chain)
                tail_probes(planner, chain)
                planner.release(lease.number)
        except BaseException as error:  # noqa: BLE001  # carried to the test's thread
            trouble.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for turn in range(300):
            store(planner, chain)
            store(planner, chain_of(64, seed=turn), tail=True)
            planner.evict(records(planner, chain, turn % 4), Cause.CLEARED, "")
    finally:
        stop.set()
        thread.join()
    assert trouble == []
    check_accounts(planner, idle=True)


def _all(_group: int, _span: object) -> bool:
    return True


class PlannerMachine(RuleBasedStateMachine):
    """Stores, fetches, spills, leases, losses and time in any order; nothing ever leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.planner = make_planner(
            layout=hybrid_layout(20), pages=14, tiers=3, clock=self.clock, head_shards=2
        )
        self.chains = [chain_of(40), chain_of(56), chain_of(40, seed=1), chain_of(20, seed=2)]
        self.stores: list[list[Reservation]] = []
        self.fetches: list[Reservation] = []
        self.spills: list[tuple[ObjectRecord, int]] = []
        self.leases: list[tuple[Match, Lease]] = []
        self.pins: list[list[ObjectRecord]] = []
        self.leaving: list[list[PendingWrite]] = []

    @rule(n=st.integers(0, 3), first=st.sampled_from([0, 16, 20]), tail=st.booleans())
    def begin_store(self, n: int, first: int, tail: bool) -> None:
        def holds(group: int, span: Span) -> bool:
            return (group + span.start // 16 + n) % 3 != 0

        todo = self.planner.plan_store(self.chains[n], first, tail=tail, holds=holds)
        assert all(slot.record.host is HostState.FILLING for slot in todo.gathers)
        assert not set(todo.dropped) & set(todo.spans)
        self.stores.append(todo.gathers)

    @rule(ok=st.booleans(), choice=st.randoms(use_true_random=False), n=st.integers(0, 3))
    def end_store(self, ok: bool, choice: random.Random, n: int) -> None:
        if self.stores:
            slots = self.stores.pop(choice.randrange(len(self.stores)))
            self.planner.stored(slots, ok=ok)
            if ok:
                self.planner.settle(self.chains[n], slots)

    @rule(n=st.integers(0, 3))
    def begin_fetch(self, n: int) -> None:
        match = self.planner.match(self.chains[n])
        self.planner.pin(match.path())  # or room for one could come from another
        for span, covers in zip(match.spans, match.covers, strict=True):
            for found in (one for cover in covers for one in cover):
                if found.host is HostState.ABSENT:
                    slot = self.planner.plan_fetch(span, found, [])
                    if slot is not None:
                        self.fetches.append(slot)
        self.planner.unpin(match.path())

    @rule(ok=st.booleans(), choice=st.randoms(use_true_random=False))
    def end_fetch(self, ok: bool, choice: random.Random) -> None:
        if self.fetches:
            self.planner.fetched(self.fetches.pop(choice.randrange(len(self.fetches))), 1, ok=ok)

    @rule(n=st.integers(0, 3), tier=st.integers(1, 2))
    def begin_spill(self, n: int, tier: int) -> None:
        match = self.planner.match(self.chains[n])
        for span, covers in zip(match.spans, match.covers, strict=True):
            for found in (one for cover in covers for one in cover):
                piece = self.planner.plan_spill(span, found, tier)
                if piece is not None:
                    assert found.host is HostState.READY
                    assert piece.offset == found.offset
                    self.spills.append((found, tier))

    @rule(ok=st.booleans(), choice=st.randoms(use_true_random=False))
    def end_spill(self, ok: bool, choice: random.Random) -> None:
        if self.spills:
            found, tier = self.spills.pop(choice.randrange(len(self.spills)))
            self.planner.spilled(found, tier, ok=ok)
            assert (found.tiers >> tier & 1) == ok

    @rule(
        pages=st.integers(0, 14),
        demote=st.sampled_from([0, 2, 4, 6]),
        others=st.sampled_from([0, 2]),
        whole_only=st.sampled_from([0, 4]),
        at_once=st.integers(1, 3),
    )
    def begin_leaving(
        self, pages: int, demote: int, others: int, whole_only: int, at_once: int
    ) -> None:
        outlets = DemotionTargets(demote, others, whole_only, 16)
        step = self.planner.plan_leaving(pages * 4096, outlets, at_once)
        assert all(found.tiers and found.host is HostState.ABSENT for found in step.dropped)
        assert all(found.pins == found.held == 1 for found, _ in step.writes)
        assert all(wanted and not found.tiers & wanted for found, wanted in step.writes)
        self.leaving.append(step.writes)

    @rule(choice=st.randoms(use_true_random=False))
    def end_leaving(self, choice: random.Random) -> None:
        if self.leaving:
            ways = self.leaving.pop(choice.randrange(len(self.leaving)))
            gone = end_leaving(self.planner.host, ways)
            assert all(found.tiers and found.host is HostState.ABSENT for found in gone)

    @rule(n=st.integers(0, 3), seconds=st.integers(0, 3))
    def take_lease(self, n: int, seconds: int) -> None:
        match = self.planner.match(self.chains[n])
        lease = self.planner.lease(match, owner="", seconds=float(seconds))
        self.leases.append((match, lease))

    @rule(choice=st.randoms(use_true_random=False))
    def use_lease(self, choice: random.Random) -> None:
        if self.leases:
            match, lease = choice.choice(self.leases)
            now = claimed(self.planner, match, lease)
            assert now.tokens <= match.tokens
            self.is_sound(now)

    @rule(choice=st.randoms(use_true_random=False))
    def end_lease(self, choice: random.Random) -> None:
        if self.leases:
            _, lease = self.leases.pop(choice.randrange(len(self.leases)))
            self.planner.release(lease.number)
            assert not self.planner.release(lease.number)

    @rule(n=st.integers(0, 3))
    def pin(self, n: int) -> None:
        path = self.planner.match(self.chains[n]).path()
        self.planner.pin(path)
        self.pins.append(path)

    @rule()
    def unpin(self) -> None:
        if self.pins:
            self.planner.unpin(self.pins.pop(0))

    @rule(seconds=st.integers(0, 4))
    def pass_time(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule(n=st.integers(0, 3), tier=st.integers(1, 2), how=st.sampled_from(["miss", "vanish"]))
    def lose(self, n: int, tier: int, how: str) -> None:
        for found in self.planner.match(self.chains[n]).path():
            if found.tiers >> tier & 1:
                if how == "miss":
                    self.planner.missing(found, tier, Cause.CORRUPT, "")
                else:
                    self.planner.vanished([found.key], tier, "")

    @rule(n=st.integers(0, 3), tier=st.integers(1, 2))
    def learn(self, n: int, tier: int) -> None:
        keys = probes(self.planner, self.chains[n]) + tail_probes(self.planner, self.chains[n])
        assert len(set(keys)) == len(keys)
        self.planner.note(keys[::2], tier)

    @rule(n=st.integers(0, 3))
    def evict(self, n: int) -> None:
        self.planner.evict(self.planner.match(self.chains[n]).path(), Cause.CLEARED, "")

    def is_sound(self, match: Match) -> None:
        """Everything the end of the match needs is served from somewhere."""
        directory = self.planner.directory
        for g, layout in enumerate(self.planner.layout.groups):
            window = layout.group.window_tokens
            first = 0 if window is None else max(0, match.tokens - window)
            for span, covers in zip(match.spans, match.covers, strict=True):
                if span.stop > first:
                    assert covers[g], (g, span)
                    if all(found.is_ready for found in covers[g]):
                        assert (
                            directory.covers(NAMESPACE, span.hash, span.tokens, "0")[g] is not None
                        )
                    else:  # its tier lost it while it was on its way up
                        assert all(found.is_ready or found.pins for found in covers[g])

    @invariant()
    def matches_are_sound(self) -> None:
        for chain in self.chains:
            self.is_sound(self.planner.match(chain))

    @invariant()
    def accounts_are_exact(self) -> None:
        check_accounts(self.planner)

    @invariant()
    def leased_and_pinned_bytes_stay(self) -> None:
        for match, lease in self.leases:
            if self.planner.leases.holds(lease.number):
                assert all(found.pins for found in match.path())

    def teardown(self) -> None:
        for slots in self.stores:
            self.planner.stored(slots, ok=False)
        for slot in self.fetches:
            self.planner.fetched(slot, 1, ok=False)
        for found, tier in self.spills:
            self.planner.spilled(found, tier, ok=False)
        for path in self.pins:
            self.planner.unpin(path)
        for ways in self.leaving:
            end_leaving(self.planner.host, ways)
        self.planner.leases.clear()
        check_accounts(self.planner, idle=True)
        self.planner.evict(list(self.planner.directory.objects()), Cause.CLEARED, "")
        assert self.planner.host.extents.used == 0
        assert self.planner.host.pinned_nbytes == 0
        assert all(found.tiers for found in self.planner.directory.objects())


PlannerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPlannerMachine: Any = PlannerMachine.TestCase


def test_what_is_withdrawn_while_a_tier_is_listed_does_not_come_back_with_the_list() -> None:
    planner, chain = make_planner(), chain_of(32)
    keys = probes(planner, chain)
    planner.listing(1, NAMESPACE, started=True)
    planner.note(keys, 1)
    damaged = planner.match(chain).covers[1][0][0]
    planner.missing(damaged, 1, Cause.CORRUPT, "flipped")
    planner.note(keys, 1)  # the listing had read the name before the object was put aside
    assert planner.match(chain).tokens == 16
    planner.vanished(keys[:1], 1, "evicted")
    planner.note(keys, 1)
    assert planner.match(chain).tokens == 0
    planner.listing(1, NAMESPACE, started=False)
    planner.note(keys, 1)  # whatever is said from now on was seen from now on
    assert planner.match(chain).tokens == 32


class Moody(PrefixLRU):
    """Somebody's policy with a bug in it."""

    def victim(self) -> int | None:
        raise ZeroDivisionError


def test_a_policy_that_raises_is_replaced_and_room_is_made() -> None:
    planner = make_planner(pages=4, policy=Moody)
    store(planner, chain_of(32))
    store(planner, chain_of(64, seed=1))  # two chunks fit, the third needs a victim
    check_accounts(planner, idle=True)
    assert planner.host.order.replaced == 1
    assert planner.match(chain_of(32)).tokens == 0
    assert planner.match(chain_of(64, seed=1)).tokens == 64
    loss = planner.journal.loss(chain_of(32), chain_of(32).span(0))
    assert loss is not None
    assert loss.detail == "evicted from tier-0 by prefix-lru"


def test_an_engine_that_cannot_say_what_it_holds_leaves_nothing_reserved() -> None:
    def broken(_group: int, span: Span) -> bool:
        if span.start:
            raise ZeroDivisionError
        return True

    planner = make_planner(layout=hybrid_layout())
    with pytest.raises(ZeroDivisionError):
        store(planner, chain_of(64), holds=broken)
    check_accounts(planner, idle=True)
    assert len(planner.host) == 0
