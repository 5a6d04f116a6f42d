"""What no hit can use goes first: states without attention, attention that leads to no state."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from stacks import (
    CHUNK,
    NAMESPACE,
    chain_of,
    check_accounts,
    make_planner,
    plain_layout,
    states_layout,
)
from stacks import store as store_all

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.eviction.arc import ARC
from kvlayer.eviction.lfu import LFU
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.identity.keys import ChunkChain
from kvlayer.layout import KVLayout
from kvlayer.results import Cause
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState, ObjectRecord

FULL, STATE, OTHER = 0, 1, 2
LAYOUT = states_layout()
"""A page of attention for each chunk; two pages of states where there are states."""


def store(planner: Planner, chain: ChunkChain, states: Iterable[int]) -> None:
    """Store a prompt that has states at the ends of these chunks."""
    at = {(index + 1) * CHUNK for index in states}
    store_all(planner, chain, holds=lambda _, span: span.stop in at)  # type: ignore[attr-defined]


def records(planner: Planner, chain: ChunkChain, index: int, *groups: int) -> list[ObjectRecord]:
    chunk = planner.directory.chunk(NAMESPACE, chain.hashes[index], CHUNK, "0")
    assert chunk is not None
    return [found for found in chunk.objects if found.part.group in groups]


def leaving(planner: Planner) -> list[tuple[int, int]]:
    """Group and end of what goes, in this order, until nothing is left."""
    gone: list[tuple[int, int]] = []
    while (victim := planner.host.victim(0.0)) is not None:
        gone.append((victim.part.group, victim.chunk.start + victim.tokens))
        planner.host.drop(victim, evicted=True)
    check_accounts(planner)
    return gone


def test_attention_behind_the_last_state_of_a_prompt_goes_first_its_end_before_its_start() -> None:
    planner, old, new = make_planner(layout=LAYOUT), chain_of(32), chain_of(96, seed=1)
    store(planner, old, [1])
    store(planner, new, [2])
    gone = leaving(planner)
    assert gone[:3] == [(FULL, 96), (FULL, 80), (FULL, 64)]
    assert {end for _, end in gone[3:7]} == {16, 32}  # then what was used longest ago


def test_attention_that_others_go_on_from_stays_until_they_are_gone() -> None:
    planner, long = make_planner(layout=LAYOUT), chain_of(96)
    store(planner, long, [5])
    store(planner, chain_of(48), [])  # leads to no state, but its attention leads on
    assert planner.match(long).tokens == 96
    before = leaving(planner)[0]
    assert before != (FULL, 48)


def test_a_state_goes_with_the_attention_of_its_span() -> None:
    planner, old, new = make_planner(layout=LAYOUT), chain_of(32), chain_of(64, seed=1)
    store(planner, old, [1])
    store(planner, new, [3])
    planner.evict(records(planner, new, 3, FULL), Cause.CLEARED, "")
    gone = leaving(planner)
    assert sorted(gone[:2]) == [(STATE, 64), (OTHER, 64)]


def test_the_states_beside_one_that_is_gone_go_and_then_the_attention_that_led_there() -> None:
    planner, old, new = make_planner(layout=LAYOUT), chain_of(32), chain_of(64, seed=1)
    store(planner, old, [0, 1])
    store(planner, new, [1, 3])
    planner.evict(records(planner, new, 3, STATE), Cause.CLEARED, "")
    gone = leaving(planner)
    assert gone[:3] == [(OTHER, 64), (FULL, 64), (FULL, 48)]
    assert gone[3] != (FULL, 32)  # a state is there


@pytest.mark.parametrize("group", [FULL, STATE])
def test_what_a_lower_tier_holds_as_well_ends_nothing(group: int) -> None:
    planner, old, new = make_planner(layout=LAYOUT), chain_of(32), chain_of(64, seed=1)
    store(planner, old, [1])
    store(planner, new, [3])
    (found,) = records(planner, new, 3, group)
    planner.directory.add_tier(found, 1)
    planner.evict([found], Cause.CLEARED, "")
    assert planner.match(new).tokens == 64
    assert {end for _, end in leaving(planner)[:2]} <= {16, 32}


def test_a_state_that_comes_later_makes_an_end_of_use_again() -> None:
    planner, old, new = make_planner(layout=LAYOUT), chain_of(32), chain_of(64, seed=1)
    store(planner, old, [1])
    store(planner, new, [])
    store(planner, new, [3])
    assert {end for _, end in leaving(planner)[:2]} <= {16, 32}


def test_what_is_leased_stays_and_goes_first_afterwards() -> None:
    planner, old, new = make_planner(layout=LAYOUT), chain_of(32), chain_of(64, seed=1)
    store(planner, old, [1])
    store(planner, new, [3])
    held = records(planner, new, 3, STATE, OTHER)
    planner.pin(held)
    planner.evict(records(planner, new, 3, FULL), Cause.CLEARED, "")
    victim = planner.host.victim(0.0)
    assert victim is not None and victim not in held
    planner.unpin(held)  # a use: it is of no use all the same, but that is not known any more
    check_accounts(planner)


def test_a_model_without_states_pays_nothing() -> None:
    assert make_planner(layout=plain_layout()).host.dead_ends is None
    assert make_planner(layout=KVLayout(LAYOUT.groups[1:])).host.dead_ends is None
    assert make_planner(layout=LAYOUT).host.dead_ends is not None


@pytest.mark.parametrize("policy", [PrefixLRU, LRU, LFU, ARC])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_remembered_is_what_is_there(policy: type[EvictionPolicy], seed: int) -> None:
    """Through stores into memory that is too small, and removals, with any policy."""
    chance = random.Random(seed)
    planner = make_planner(layout=LAYOUT, pages=chance.choice([9, 20, 40]), policy=policy)
    for _ in range(40):
        chain = chain_of(CHUNK * chance.randint(1, 6), seed=chance.randrange(4))
        if chance.random() < 0.7:
            store(planner, chain, chance.sample(range(6), 2))
        else:
            for index in range(len(chain)):
                chunk = planner.directory.chunk(NAMESPACE, chain.hashes[index], CHUNK, "0")
                some = [] if chunk is None else [o for o in chunk.objects if chance.random() < 0.3]
                planner.evict(some, Cause.CLEARED, "")
        counted: dict[tuple[str, bytes], int] = {}
        for found in planner.directory.active():
            if found.part.group == FULL and found.host is HostState.READY:
                before = found.namespace, found.chunk.parent
                counted[before] = counted.get(before, 0) + 1
        assert planner.host.dead_ends is not None
        assert planner.host.dead_ends._after == counted
        check_accounts(planner)
    leaving(planner)
    assert not planner.host.dead_ends._after


@pytest.mark.parametrize("policy", [PrefixLRU, LRU, LFU, ARC])
def test_memory_that_is_too_small_keeps_what_hits_can_use(policy: type[EvictionPolicy]) -> None:
    """Of ten prompts that lead to a state and ten that do not, those that do stay."""
    planner = make_planner(layout=LAYOUT, pages=10 * 6 + 4, policy=policy)
    useful = [chain_of(64, seed=seed) for seed in range(10)]
    for seed, chain in enumerate(useful):
        store(planner, chain, [3])
        store(planner, chain_of(64, seed=100 + seed), [])
    assert all(planner.match(chain).tokens == 64 for chain in useful)
