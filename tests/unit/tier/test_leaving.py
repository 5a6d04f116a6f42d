"""What leaves host memory: in the policy's order, and never what nobody else has or takes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from stacks import chain_of, check_accounts, make_planner, store

from kvlayer.identity.keys import ChunkChain
from kvlayer.tier.planner.demotion_step import (
    DemotionStep,
    DemotionTargets,
    end_leaving,
    plan_leaving,
)
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import ObjectRecord

PAGE = 4096


def full(pages: int = 8, *, tiers: int = 3) -> tuple[Planner, list[ObjectRecord]]:
    """A host full of one-page prompts, and their objects in the order in which they go."""
    planner = make_planner(pages=pages, tiers=tiers)
    records: list[ObjectRecord] = []
    for seed in range(pages):
        records += store_one(planner, chain_of(16, seed=seed))
    return planner, records


def store_one(planner: Planner, chain: ChunkChain, *, tail: bool = False) -> list[ObjectRecord]:
    return [slot.record for slot in store(planner, chain, tail=tail).gathers]


def lower(planner: Planner, records: Sequence[ObjectRecord], tier: int = 1) -> None:
    planner.note([found.key for found in records], tier)


def leave(
    planner: Planner, pages: float, outlets: DemotionTargets, at_once: int = 100
) -> DemotionStep:
    return plan_leaving(planner.host, int(pages * PAGE), outlets, at_once, 0.0)


@pytest.mark.parametrize(
    ("tiers", "tokens", "wanted"),
    [
        (0, 16, 0b0110),  # nobody has it: both that are written now
        (0b0010, 16, 0b0100),
        (0b1000, 16, 0b0110),  # another tier has it: these are to have it all the same
        (0b0110, 16, 0),
        (0, 4, 0b0010),  # a tail, which tier 2 does not take
        (0b0010, 4, 0),
    ],
)
def test_tiers_that_are_written_only_now_get_what_they_lack(
    tiers: int, tokens: int, wanted: int
) -> None:
    planner = make_planner(tiers=5)
    (found,) = store_one(planner, chain_of(tokens), tail=True)
    found.tiers = tiers
    assert DemotionTargets(0b0110, 0b1000, 0b0100, 16).wanted(found) == wanted


@pytest.mark.parametrize(
    ("tiers", "tokens", "wanted"), [(0, 16, 0b0110), (0b0010, 16, 0), (0, 4, 0b0010)]
)
def test_a_tier_that_failed_when_it_was_stored_is_asked_again(
    tiers: int, tokens: int, wanted: int
) -> None:
    planner = make_planner(tiers=3)
    (found,) = store_one(planner, chain_of(tokens), tail=True)
    found.tiers = tiers
    assert DemotionTargets(0, 0b0110, 0b0100, 16).wanted(found) == wanted


def test_what_lower_tiers_have_is_dropped_in_the_policys_order_down_to_the_mark() -> None:
    planner, records = full()
    lower(planner, records)
    step = leave(planner, 5, DemotionTargets(others=0b10))
    assert step.dropped == records[:3]
    assert step.writes == []
    assert planner.host.extents.used == 5 * PAGE
    assert leave(planner, 5, DemotionTargets(others=0b10)) == DemotionStep()
    assert all(planner.match(chain_of(16, seed=n)).tokens == 16 for n in range(8))
    check_accounts(planner, idle=True)


def test_what_they_lack_is_held_and_dropped_once_it_is_there() -> None:
    planner, records = full()
    step = leave(planner, 5, DemotionTargets(demote=0b10))
    assert step.dropped == []
    assert step.writes == [(found, 0b10) for found in records[:3]]
    assert planner.host.extents.used == 8 * PAGE
    assert (
        leave(planner, 5, DemotionTargets(demote=0b10)) == DemotionStep()
    )  # they are on their way
    lower(planner, records[:2])
    assert end_leaving(planner.host, step.writes) == records[:2]
    assert planner.host.extents.used == 6 * PAGE
    check_accounts(planner, idle=True)
    assert planner.host.victim(0.0) is records[2]  # what could not be written is where it was


def test_only_so_much_is_written_at_once() -> None:
    planner, records = full()
    lower(planner, records[:2])
    step = leave(planner, 0, DemotionTargets(demote=0b10), at_once=3)
    assert step.dropped == records[:2]
    assert [found for found, _ in step.writes] == records[2:5]
    assert end_leaving(planner.host, step.writes) == []
    check_accounts(planner, idle=True)


def test_what_no_tier_takes_stays_and_counts_as_if_it_were_gone() -> None:
    """Or everything used more lately would have to go in its place."""
    planner, records = full()
    lower(planner, records[3:])
    step = leave(planner, 4, DemotionTargets())
    assert step.dropped == records[3:4]
    assert planner.host.extents.used == 7 * PAGE
    check_accounts(planner, idle=True)
    assert leave(planner, 4, DemotionTargets()).dropped == []
    (new,) = store_one(planner, chain_of(32, seed=9))[:1]  # a store that needs the room takes it
    assert [found.host.name for found in records[:2]] == ["ABSENT", "READY"]
    assert new.is_ready


def test_what_is_leased_is_passed_over() -> None:
    planner, records = full()
    lower(planner, records)
    lease = planner.lease(planner.match(chain_of(16)), owner="", seconds=9.0)
    assert leave(planner, 6, DemotionTargets()).dropped == records[1:3]
    planner.release(lease.number)
    check_accounts(planner, idle=True)


@pytest.mark.parametrize("is_over", [False, True])
def test_what_a_request_used_while_it_was_written_stays(is_over: bool) -> None:
    planner, records = full()
    step = leave(planner, 7, DemotionTargets(demote=0b10))
    lower(planner, records[:1])
    lease = planner.lease(planner.match(chain_of(16)), owner="", seconds=9.0)
    if is_over:
        planner.release(lease.number)
    assert end_leaving(planner.host, step.writes) == []
    planner.release(lease.number)
    check_accounts(planner, idle=True)
    assert planner.host.victim(0.0) is records[1]  # it is the most recent now


def test_what_another_move_still_holds_stays_until_that_has_ended() -> None:
    planner, records = full()
    step = leave(planner, 7, DemotionTargets(demote=0b10))
    lower(planner, records[:1])
    assert planner.plan_spill(chain_of(16).span(0), records[0], 2) is not None
    assert end_leaving(planner.host, step.writes) == []
    assert leave(planner, 7, DemotionTargets(demote=0b10)) == DemotionStep()
    planner.spilled(records[0], 2, ok=True)
    assert leave(planner, 7, DemotionTargets(demote=0b10)).dropped == records[:1]
    check_accounts(planner, idle=True)


def test_one_step_looks_at_a_bounded_number_of_objects() -> None:
    planner, records = full(pages=600, tiers=2)
    lower(planner, records)
    steps = [leave(planner, 0, DemotionTargets()).dropped for _ in range(4)]
    assert [len(dropped) for dropped in steps] == [256, 256, 88, 0]
    planner, records = full(pages=600, tiers=2)
    assert leave(planner, 0, DemotionTargets()) == DemotionStep()
    assert planner.host.victim(0.0) is records[0]
    check_accounts(planner, idle=True)


def test_a_superseded_tail_is_the_first_to_be_written() -> None:
    planner = make_planner(pages=8)
    (tail,) = store_one(planner, chain_of(4), tail=True)
    for seed in range(1, 6):
        store(planner, chain_of(16, seed=seed))
    planner.release(planner.lease(planner.match(chain_of(4)), owner="", seconds=9.0).number)
    store(planner, chain_of(16))
    assert leave(planner, 6, DemotionTargets(demote=0b10)).writes == [(tail, 0b10)]
