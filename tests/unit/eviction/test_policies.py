"""The eviction policies, each against the same rules written with lists and nothing clever."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import calls, play

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.rows import Rows
from kvlayer.config.registry import POLICIES
from kvlayer.eviction.arc import ARC
from kvlayer.eviction.lfu import LFU
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.testing.suites.policy import PlayedPolicy

ALL = (LRU, PrefixLRU, ARC, LFU)

thorough = settings(max_examples=200)


# -- models --------------------------------------------------------------------------------------


class SlowLRU(EvictionPolicy):
    """The next victim first."""

    name = "slow"
    step = 1

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self.order: list[int] = []

    def admit(self, path: Sequence[int], /) -> None:
        self.order += [*path][:: self.step]

    def touch(self, path: Sequence[int], /) -> None:
        self.pin(path)
        self.admit(path)

    def refresh(self, path: Sequence[int], /) -> None:
        self.touch(path)

    def pin(self, path: Sequence[int], /) -> None:
        self.order = [row for row in self.order if row not in path]

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        self.admit(path)

    def remove(self, row: int, /, *, evicted: bool) -> None: ...

    def victim(self) -> int | None:
        return self.order[0] if self.order else None


class SlowPrefixLRU(SlowLRU):
    step = -1


class SlowLFU(SlowPrefixLRU):
    """The least of (value, time) over everything."""

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self.uses: dict[int, int] = {}
        self.values: dict[int, int] = {}
        self.age = 0

    def admit(self, path: Sequence[int], /) -> None:
        self.uses |= dict.fromkeys(path, 1)
        self.enter(path)

    def touch(self, path: Sequence[int], /) -> None:
        self.pin(path)
        self.unpin(path, used=True)

    def refresh(self, path: Sequence[int], /) -> None:
        self.pin(path)
        self.enter(path)

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        for row in path:
            self.uses[row] = min(self.uses[row] + used, 15)
        self.enter(path)

    def enter(self, path: Sequence[int]) -> None:
        self.values |= {row: self.age + self.uses[row] for row in path}
        super().admit(path)

    def remove(self, row: int, /, *, evicted: bool) -> None:
        if evicted:
            least = min([self.values[other] for other in [*self.order, row]])
            self.age = max(self.age, least)

    def victim(self) -> int | None:
        return min(self.order, key=self.values.__getitem__, default=None)


@pytest.mark.parametrize(("real", "model"), [(LRU, SlowLRU), (PrefixLRU, SlowPrefixLRU)])
@given(calls=calls)
@thorough
def test_a_policy_of_recency_names_the_victims_of_its_model(
    real: type[EvictionPolicy], model: type[EvictionPolicy], calls: list[tuple[Any, ...]]
) -> None:
    play(real, model, calls)


@given(calls=calls)
@thorough
def test_lfu_names_the_victims_of_its_model(calls: list[tuple[Any, ...]]) -> None:
    def same(real: Any, model: Any) -> None:
        assert real._age == model.age

    play(LFU, SlowLFU, calls, same)


# -- every policy: tests/conformance has its suite -----------------------------------------------


def test_every_policy_is_installed_under_its_name() -> None:
    assert [POLICIES.load(policy.name) for policy in ALL] == list(ALL)


@pytest.mark.parametrize("policy", [PrefixLRU, ARC, LFU])
@given(
    parents=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    uses=st.lists(st.tuples(st.integers(0, 29), st.booleans()), max_size=60),
    evictions=st.integers(0, 5),
)
def test_an_ancestor_is_never_evicted_before_its_descendant(
    policy: type[EvictionPolicy],
    parents: list[int],
    uses: list[tuple[int, bool]],
    evictions: int,
) -> None:
    if policy is ARC:
        evictions = 0  # it gives up an ancestor used often for a descendant used once lately
    parent = {n: at % n if n else None for n, at in enumerate(parents)}

    def path(node: int | None) -> list[int]:
        return [] if node is None else [*path(parent[node]), node]

    played = PlayedPolicy(policy)

    def evict() -> bool:
        gone = played.victim()
        if gone is None:
            return False
        assert all(parent[node] != gone for node in played.resident)
        played.lose(gone, evicted=True)
        return True

    for node in parent:
        played.store(path(node))
    for use, is_store in uses:
        if is_store:
            played.store(path(use % len(parent)))
        else:
            there = [node for node in path(use % len(parent)) if node in played.resident]
            played.use(there)
        for _ in range(evictions):
            evict()
    while evict():
        pass
    assert not played.resident


@pytest.mark.parametrize("policy", ALL)
def test_naming_a_victim_makes_no_copy_of_the_order(policy: type[EvictionPolicy]) -> None:
    played = PlayedPolicy(policy)
    played.store(range(5_000))
    tested = played.policy
    tested.victim()
    tracemalloc.start()
    tested.victim()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000


@pytest.mark.parametrize("policy", ALL)
def test_an_object_costs_a_policy_a_few_bytes_and_the_garbage_collector_nothing(
    policy: type[EvictionPolicy],
) -> None:
    count = 20_000
    rows = Rows()
    numbers = [rows.take(n, 4096) for n in range(count)]
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    tested = policy(rows)
    tested.admit(numbers)
    tested.touch(numbers)
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert nbytes < 32 * count
    assert len(gc.get_objects()) - before < 100


# -- what each is for ----------------------------------------------------------------------------


def test_lru_uses_a_path_in_its_own_order() -> None:
    played = PlayedPolicy(LRU)
    played.store([0, 1, 2])
    assert played.victim() == 0
    played.use([0, 1])
    assert played.victim() == 2


def order(played: PlayedPolicy) -> list[int]:
    """What goes, in this order, until nothing is left."""
    gone: list[int] = []
    while (name := played.victim()) is not None:
        played.lose(name, evicted=True)
        gone.append(name)
    return gone


def test_lfu_keeps_what_was_used_more_often_whenever_that_was() -> None:
    played = PlayedPolicy(LFU)
    played.store([0])
    played.use([0])
    for name in (1, 2, 3):
        played.store([name])
    assert order(played) == [1, 2, 3, 0]


def test_lfu_overtakes_what_was_popular_once() -> None:
    """Used three times and never again, it goes when three generations have gone before it."""
    played = PlayedPolicy(LFU)
    played.store([0])
    played.use([0])
    played.use([0])
    gone: list[int | None] = []
    for name in range(1, 6):
        played.store([name])
        gone.append(played.victim())
        played.lose(gone[-1] or 0, evicted=True)
    assert gone == [1, 2, 0, 3, 4]


def test_lfu_counts_no_more_uses_than_it_can_forget() -> None:
    played = PlayedPolicy(LFU)
    played.store([0])
    for _ in range(300):
        played.use([0])
    name = 1
    while 0 in played.resident:
        played.store([name])
        gone = played.victim()
        assert gone is not None
        played.lose(gone, evicted=True)
        name += 1
    assert name <= 18
