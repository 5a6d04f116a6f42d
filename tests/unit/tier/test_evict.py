"""The eviction policies, all against one simple model and each of recency against an exact one."""

from __future__ import annotations

import tracemalloc
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.keys import ObjectKey, Part
from kvlayer.registry import POLICIES
from kvlayer.testing.suites.policy import KnownObjects
from kvlayer.tier.arc import ARC
from kvlayer.tier.evict import LRU, PrefixLRU

NAMESPACE = "ab" * 32
PART = Part(0, (0, 4), (0, 8))
ALL = (LRU, PrefixLRU, ARC)


def key(number: int) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, "0", sha256(b"%d" % number).digest(), 16, PART)


KEYS = [key(n) for n in range(5)]

paths = st.lists(st.sampled_from(KEYS), max_size=4, unique=True)
one = st.sampled_from(KEYS)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["admit", "touch", "unpin"]), paths),
        st.tuples(st.sampled_from(["pin", "demote", "remove"]), one),
    ),
    max_size=40,
)
thorough = settings(max_examples=400)


def test_every_policy_is_installed_under_its_name() -> None:
    assert [POLICIES.load(policy.name) for policy in ALL] == list(ALL)


# -- every policy: tests/conformance has its suite, here are more and shrinking examples --------


@pytest.mark.parametrize("policy", ALL)
@given(steps=steps)
@thorough
def test_a_policy_names_what_is_there_and_not_pinned_and_what_was_demoted_first(
    policy: type[EvictionPolicy], steps: list[tuple[str, Any]]
) -> None:
    real, model = policy(), KnownObjects()
    for call, argument in steps:
        if call == "unpin":  # in what order a path is let go is each policy's own affair
            for k in argument:
                real.unpin([k])
        else:
            getattr(real, call)(argument)
        getattr(model, call)(argument)
        victim = real.victim()
        assert (victim in model.may_go()) if model.may_go() else (victim is None)
        if model.demoted:
            assert victim == model.demoted[0]
    left = model.resident - model.pinned.keys()
    while (victim := real.victim()) is not None:
        assert victim in left
        left.remove(victim)
        real.remove(victim)
    assert not left


@pytest.mark.parametrize("policy", [PrefixLRU, ARC])
@given(
    parents=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    uses=st.lists(st.tuples(st.integers(0, 29), st.booleans()), max_size=60),
)
def test_an_ancestor_is_never_evicted_before_its_descendant(
    policy: type[EvictionPolicy], parents: list[int], uses: list[tuple[int, bool]]
) -> None:
    parent = {n: at % n if n else None for n, at in enumerate(parents)}

    def path(node: int | None) -> list[ObjectKey]:
        return [] if node is None else [*path(parent[node]), key(node)]

    tested = policy()
    for node in parent:
        tested.admit(path(node))
    for use, is_store in uses:
        (tested.admit if is_store else tested.touch)(path(use % len(parent)))
    kept = {key(node): node for node in parent}
    while (victim := tested.victim()) is not None:
        gone = kept.pop(victim)
        assert all(parent[node] != gone for node in kept.values())
        tested.remove(victim)
    assert not kept


# -- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ALL)
def test_naming_a_victim_makes_no_copy_of_the_order(policy: type[EvictionPolicy]) -> None:
    tested = policy()
    tested.admit([key(n) for n in range(5_000)])
    tested.victim()
    tracemalloc.start()
    tested.victim()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000


# -- recency, exactly ---------------------------------------------------------------------------


class Naive:
    """Recency as plain lists, the next victim first: slow and obviously right."""

    def __init__(self, *, deepest_first: bool) -> None:
        self.step = -1 if deepest_first else 1
        self.order: list[ObjectKey] = []
        self.first: list[ObjectKey] = []
        self.pinned: dict[ObjectKey, str] = {}

    def admit(self, path: list[ObjectKey]) -> None:
        for k in path[:: self.step]:
            if k not in self.pinned:
                self._forget(k)
                self.order.append(k)
            elif self.pinned[k] == "unknown":
                self.pinned[k] = "known"

    def touch(self, path: list[ObjectKey]) -> None:
        for k in path[:: self.step]:
            if k in self.order + self.first:
                self.admit([k])

    def _forget(self, k: ObjectKey) -> None:
        self.order = [o for o in self.order if o != k]
        self.first = [o for o in self.first if o != k]

    def pin(self, k: ObjectKey) -> None:
        self.pinned.setdefault(k, "known" if k in self.order + self.first else "unknown")
        self._forget(k)

    def unpin(self, path: list[ObjectKey]) -> None:
        for k in path[:: self.step]:
            was = self.pinned.pop(k, None)
            if was == "known":
                self.order.append(k)
            elif was == "demoted":
                self.first.append(k)
            elif was is None:
                self.touch([k])

    def demote(self, k: ObjectKey) -> None:
        if k in self.order:
            self._forget(k)
            self.first.append(k)
        elif self.pinned.get(k) == "known":
            self.pinned[k] = "demoted"

    def remove(self, k: ObjectKey) -> None:
        self._forget(k)
        self.pinned.pop(k, None)

    def victim(self) -> ObjectKey | None:
        return next(iter(self.first + self.order), None)


@pytest.mark.parametrize(("policy", "deepest_first"), [(LRU, False), (PrefixLRU, True)])
@given(steps=steps)
@thorough
def test_a_policy_of_recency_names_the_victims_of_the_naive_model(
    policy: type[LRU], deepest_first: bool, steps: list[tuple[str, Any]]
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


def test_lru_uses_a_path_in_its_own_order() -> None:
    policy = LRU()
    policy.admit(KEYS[:3])
    assert policy.victim() == KEYS[0]
    policy.touch([KEYS[0], KEYS[1]])
    assert policy.victim() == KEYS[2]


def test_what_was_demoted_and_pinned_or_stored_again_is_in_one_place_only() -> None:
    policy = LRU()
    policy.admit(KEYS[:3])
    policy.demote(KEYS[0])
    policy.admit(KEYS[:1])
    assert policy.victim() == KEYS[1]
    policy.demote(KEYS[1])
    policy.pin(KEYS[1])
    assert policy.victim() == KEYS[2]
