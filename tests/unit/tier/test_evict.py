"""The built-in eviction policies, against a naive model and against the clock."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.keys import ObjectKey, Part
from kvlayer.tier.evict import LRU, PrefixLRU

NAMESPACE = "ab" * 32
PART = Part(0, (0, 4), (0, 8))


def key(number: int) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, "0", sha256(b"%d" % number).digest(), PART)


KEYS = [key(n) for n in range(8)]


class Naive:
    """A policy as a plain list, the next victim first: slow and obviously right."""

    def __init__(self, *, deepest_first: bool) -> None:
        self.step = -1 if deepest_first else 1
        self.order: list[ObjectKey] = []
        self.pinned: dict[ObjectKey, bool] = {}

    def admit(self, path: list[ObjectKey]) -> None:
        for k in path[:: self.step]:
            if k not in self.pinned:
                self.order = [*(o for o in self.order if o != k), k]

    def touch(self, path: list[ObjectKey]) -> None:
        for k in path[:: self.step]:
            if k in self.order:
                self.admit([k])

    def pin(self, k: ObjectKey) -> None:
        self.order = [o for o in self.order if o != k]
        self.pinned.setdefault(k, False)

    def unpin(self, path: list[ObjectKey]) -> None:
        for k in path[:: self.step]:
            if k in self.pinned:
                demoted = self.pinned.pop(k)
                self.order = [k, *self.order] if demoted else [*self.order, k]
            else:
                self.touch([k])

    def demote(self, k: ObjectKey) -> None:
        if k in self.order:
            self.order = [k, *(o for o in self.order if o != k)]
        elif k in self.pinned:
            self.pinned[k] = True

    def remove(self, k: ObjectKey) -> None:
        self.order = [o for o in self.order if o != k]
        self.pinned.pop(k, None)

    def victim(self) -> ObjectKey | None:
        return self.order[0] if self.order else None


paths = st.lists(st.sampled_from(KEYS), max_size=4, unique=True)
one = st.sampled_from(KEYS)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["admit", "touch", "unpin"]), paths),
        st.tuples(st.sampled_from(["pin", "demote", "remove"]), one),
    ),
    max_size=40,
)


@pytest.mark.parametrize(("policy", "deepest_first"), [(LRU, False), (PrefixLRU, True)])
@given(steps=steps)
@settings(deadline=None)
def test_a_policy_names_the_victims_of_the_naive_model(
    policy: type[LRU], deepest_first: bool, steps: list[tuple[str, object]]
) -> None:
    real, model = policy(), Naive(deepest_first=deepest_first)
    for call, argument in steps:
        getattr(real, call)(argument)
        getattr(model, call)(argument)
        assert real.victim() == model.victim()
    while (victim := model.victim()) is not None:
        assert real.victim() == victim
        real.remove(victim)
        model.remove(victim)
    assert real.victim() is None


@given(
    parents=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    uses=st.lists(st.integers(0, 29), max_size=60),
)
@settings(deadline=None)
def test_prefix_lru_never_evicts_an_ancestor_before_its_descendant(
    parents: list[int], uses: list[int]
) -> None:
    parent = {n: at % n if n else None for n, at in enumerate(parents)}

    def path(node: int | None) -> list[ObjectKey]:
        return [] if node is None else [*path(parent[node]), key(node)]

    policy = PrefixLRU()
    for node in parent:
        policy.admit(path(node))
    for use in uses:
        policy.touch(path(use % len(parent)))
    kept = {key(node): node for node in parent}
    while (victim := policy.victim()) is not None:
        gone = kept.pop(victim)
        assert all(parent[node] != gone for node in kept.values())
        policy.remove(victim)
    assert not kept


def test_lru_uses_a_path_in_its_own_order() -> None:
    policy = LRU()
    policy.admit(KEYS[:3])
    assert policy.victim() == KEYS[0]
    policy.touch([KEYS[0], KEYS[1]])
    assert policy.victim() == KEYS[2]


def test_a_demoted_object_goes_first_also_when_it_was_pinned() -> None:
    policy = PrefixLRU()
    policy.admit(KEYS[:3])
    policy.pin(KEYS[0])
    policy.demote(KEYS[0])
    assert policy.victim() == KEYS[2]
    policy.unpin([KEYS[0]])
    assert policy.victim() == KEYS[0]


def test_a_removed_pin_does_not_come_back() -> None:
    policy = PrefixLRU()
    policy.admit(KEYS[:1])
    policy.pin(KEYS[0])
    policy.remove(KEYS[0])
    policy.unpin([KEYS[0]])
    assert policy.victim() is None


def _seconds(work: Callable[[], object], repeat: int) -> float:
    best = float("inf")
    for _ in range(5):
        start = perf_counter()
        for _ in range(repeat):
            work()
        best = min(best, perf_counter() - start)
    return best / repeat


@pytest.mark.parametrize("policy", [LRU, PrefixLRU])
def test_twenty_thousand_pins_cost_a_victim_nothing(policy: type[LRU]) -> None:
    crowded, empty = policy(), policy()
    pins = [key(n) for n in range(20_000)]
    crowded.admit(pins)
    for pinned in pins:  # the oldest entries: what a scan for an unpinned one would wade through
        crowded.pin(pinned)
    late = [key(n) for n in range(20_000, 20_010)]
    crowded.admit(late)
    empty.admit(late)

    def churn(target: LRU) -> None:
        victim = target.victim()
        assert victim is not None
        target.remove(victim)
        target.admit([victim])

    quiet, busy = _seconds(lambda: churn(empty), 200), _seconds(lambda: churn(crowded), 200)
    assert busy < 20 * quiet, f"{busy * 1e6:.1f} us against {quiet * 1e6:.1f} us"
