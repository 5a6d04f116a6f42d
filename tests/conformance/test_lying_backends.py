"""Every liar fails exactly the promise it breaks, and every promise has a liar that breaks it."""

from __future__ import annotations

from typing import Any

import lying_batches
import lying_cancelling
import lying_keeping
import lying_lifetime
import lying_objects
import pytest
from honest import HonestBackend
from liars import LIARS, HonestSuite, found_in

from kvlayer.abc.backend import Backend, Capability
from kvlayer.config.registry import BACKENDS
from kvlayer.testing.memory import MemoryBackend
from kvlayer.testing.promise import Need, Promise
from kvlayer.testing.suite import Outcome

CHAPTERS = (lying_objects, lying_batches, lying_cancelling, lying_keeping, lying_lifetime)
"""Imported for their liars, which enter themselves in ``LIARS``."""


class HonestWithoutAList(HonestBackend):
    capabilities = HonestBackend.capabilities - {Capability.LIST}
    list = Backend.list


class Listless(HonestSuite):
    backends = BACKENDS.extended({"honest": HonestWithoutAList})


def test_two_honest_backends_keep_every_promise() -> None:
    with_list, without = [list(suite.run()) for suite in (HonestSuite(), Listless())]
    assert [(v.promise.name, v.found) for v in (*with_list, *without) if not v.is_good] == []
    kept = {v.promise.name for v in (*with_list, *without) if v.outcome is Outcome.KEPT}
    assert kept == {promise.name for promise in HonestSuite.promises()}


def test_the_simulators_memory_keeps_every_promise_but_those_it_excepts() -> None:
    class Memory(HonestSuite):
        url = small_url = ""

        def build(self) -> Backend:
            return MemoryBackend()

        def why_not(self, promise: Promise, /) -> str | None:
            return (
                str(Need.TRUNCATE) if Need.TRUNCATE in promise.needs else super().why_not(promise)
            )

    verdicts = list(Memory().run())
    assert {v.promise.name for v in verdicts if not v.is_good} == {
        "a listing says when an object was last used",
        "a closed backend says so",
    }
    assert sum(v.outcome is Outcome.KEPT for v in verdicts) > 30


@pytest.mark.parametrize("liar", LIARS, ids=lambda liar: liar.__name__)
def test_a_liar_fails_exactly_the_promise_it_breaks(liar: type[HonestBackend]) -> None:
    name, outcome = LIARS[liar]
    assert found_in(liar) == {name: outcome}


def test_every_promise_has_a_liar(figures: Any) -> None:
    assert {liar.__module__ for liar in LIARS} == {chapter.__name__ for chapter in CHAPTERS}
    promises = {promise.name for promise in HonestSuite.promises()}
    assert {name for name, _ in LIARS.values()} == promises
    figures("conformance.liars", promises=len(promises), liars=len(LIARS))
