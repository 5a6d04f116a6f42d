"""Every wait of the pipeline is needed: taken away alone, something is seen to go wrong.

The waits are not listed here. A clean run of each scenario shows which lines of the pipeline call
CUDA; then each is dropped, and each copy, launch and record is sent to every other stream. A mutant
that nobody catches is a line that could go.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_cupy import Mutant, Site
from gpu_scenarios import SCENARIOS, run

from kvlayer.staging.cuda.pinned import PinnedSlab
from kvlayer.staging.cuda.ring import Ring, Slot
from kvlayer.staging.cuda.runs import Parts
from kvlayer.staging.cuda.tables import Arena, Arenas

CATCHERS = ("lazy", "race")
DROPPED = ("wait", "synchronize", "record")
MOVED = ("copy", "launch", "record")


@pytest.fixture(scope="module", autouse=True)
def silent() -> Iterator[None]:
    """A scenario or a mutant that CUDA refuses says so; that is not what is looked at."""
    logger = logging.getLogger("kvlayer.staging.cuda.stager")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.fixture(scope="module")
def sites() -> dict[Site, list[str]]:
    """The pipeline's calls, and the scenarios that make them; every scenario is clean."""
    found: dict[Site, list[str]] = defaultdict(list)
    for name in SCENARIOS:
        for mode in CATCHERS:
            faults, calls = run(name, mode)
            assert faults == [], f"{name}, {mode}: unmutated"
            for site in calls.seen:
                if name not in found[site]:
                    found[site].append(name)
    return found


def mutants(sites: dict[Site, list[str]]) -> Iterator[Mutant]:
    for site in sorted(sites):
        if site.what in DROPPED:
            yield Mutant(site, None)
        if site.what in MOVED:
            yield from (Mutant(site, stream) for stream in range(3) if stream != site.stream)


def catcher(mutant: Mutant, names: list[str]) -> str | None:
    for name in names:
        for mode in CATCHERS:
            if run(name, mode, mutant=mutant)[0]:
                return f"{name}, {mode}"
    return None


def test_every_wait_record_and_stream_of_the_pipeline_is_needed(
    sites: dict[Site, list[str]], figures
) -> None:
    tried = list(mutants(sites))
    caught = {mutant: catcher(mutant, sites[mutant.site]) for mutant in tried}
    figures(
        "staging.mutants",
        sites=len(sites),
        mutants=len(tried),
        caught=sum(by is not None for by in caught.values()),
        waits=sum(m.stream is None and m.site.what != "record" for m in tried),
    )
    assert [m for m, by in caught.items() if by is None] == []
    # Both directions, the ring, straight loads, failures, two batches: or the list is not whole.
    assert len([m for m in tried if m.stream is None and m.site.what == "wait"]) >= 7
    assert len([m for m in tried if m.stream is None and m.site.what == "synchronize"]) >= 6
    assert len(tried) >= 50


def test_in_eager_order_no_dropped_wait_shows() -> None:
    """Why the other orders exist."""
    _, calls = run("store", "eager")
    waits = [site for site in calls.seen if site.what == "wait"]
    assert waits
    assert [run("store", "eager", mutant=Mutant(site, None))[0] for site in waits] == [[]] * 3


def caught_somewhere(names: tuple[str, ...], modes: tuple[str, ...] = CATCHERS) -> bool:
    return any(run(name, mode)[0] for name in names for mode in modes)


def test_a_ring_whose_slots_are_one_memory_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Ring.take

    def reused(ring: Ring, count: int) -> list[Slot]:
        for slot in ring._slots:
            slot.address = min(each.address for each in ring._slots)
        return take(ring, count)

    monkeypatch.setattr(Ring, "take", reused)
    # Unpatched memory is freed twice in the end; what counts is what happened before.
    monkeypatch.setattr(Ring, "close", lambda ring: None)
    assert caught_somewhere(("store",), ("race",)) and caught_somewhere(("load",), ("race",))


def test_tables_that_overwrite_each_other_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Arena.place

    def overwriting(arena: Arena, table: Any) -> object:
        arena.clear()
        return place(arena, table)

    monkeypatch.setattr(Arena, "place", overwriting)
    assert caught_somewhere(("load by layers",))  # a table for each layer group


def test_batches_that_share_their_memory_for_tables_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take = Arenas.take
    first: list[Arena] = []

    def shared(arenas: Arenas) -> Arena:
        if not first:
            first.append(take(arenas))
        first[0].clear()
        return first[0]

    monkeypatch.setattr(Arenas, "take", shared)
    assert caught_somewhere(("two at once",))


def test_copies_that_are_not_cut_between_registrations_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def whole(slab: PinnedSlab, addresses: Any, nbytes: Any) -> Parts:
        return Parts(np.arange(len(nbytes)), np.zeros_like(nbytes), nbytes)

    monkeypatch.setattr(PinnedSlab, "cut", whole)
    assert run("growing", "eager")[0]
