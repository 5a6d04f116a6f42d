"""Retention: the wish a request may state, what is no wish, and whom it puts before whom."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from kvlayer import KVLayerError, Retention, Scope
from kvlayer.identity.keys import ChunkChain
from kvlayer.retention import RANKS


@pytest.mark.parametrize("priority", [4, -4, True, 1.0, "1", None, 10**30])
def test_what_is_no_priority_is_refused(priority: Any) -> None:
    with pytest.raises(
        KVLayerError, match="a priority must be a whole number of at least -3"
    ) as refused:
        Retention(priority=priority)
    assert refused.value.hint


@pytest.mark.parametrize("until", [float("nan"), float("inf"), -1.0, 10**400, 1.7e12, True, ""])
def test_what_is_no_time_is_refused(until: Any) -> None:
    with pytest.raises(KVLayerError, match="keep_until must be a finite number") as refused:
        Retention(keep_until=until)
    assert refused.value.hint


def test_what_is_no_retention_is_refused_by_the_scope() -> None:
    wrong: Any = 2
    with pytest.raises(KVLayerError, match="a scope's retention must be a Retention, found a int"):
        Scope(retention=wrong)


def test_a_retention_is_in_no_name() -> None:
    tokens = list(range(64))
    plain = Scope.private("alice")
    kept = replace(plain, retention=Retention(2, 1e9))
    first, second = (
        ChunkChain(tokens, scope, tokens_per_chunk=16, tokens_per_tail=4) for scope in (plain, kept)
    )
    assert first.hashes == second.hashes


def test_priorities_order_objects_and_to_be_kept_comes_before_them_all() -> None:
    ranks = [Retention(p, until).rank(100.0) for until in (0.0, 101.0) for p in range(-3, 4)]
    assert ranks == list(range(RANKS))


def test_a_time_that_has_come_leaves_the_priority_alone() -> None:
    for priority, until in itertools.product((-3, 0, 3), (100.0, 99.0)):
        assert Retention(priority, until).rank(100.0) == Retention(priority).rank(100.0)
