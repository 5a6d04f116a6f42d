"""The simulator finds bugs: each of eleven that are planted, by a seed that finds it every time."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from bugs import BUGS, UNCHECKED, UNPLACED
from scenarios import SCENARIOS, FoundError, brief, play_seed

BUDGET = 2000  # seeds; what a campaign plays of each scenario


def test_every_scenario_has_its_bug() -> None:
    assert BUGS.keys() == SCENARIOS.keys()


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found_and_its_seed_replays(name: str, arena: Path, figures: Any) -> None:
    with BUGS[name].planted():
        began = perf_counter()
        found = _find(name, arena)
        seconds = perf_counter() - began
        with pytest.raises(FoundError) as again:
            play_seed(name, found.seed, arena)
    assert again.value.reason == found.reason
    play_seed(name, found.seed, arena)  # and it was the bug
    figures(
        f"simulation.bug.{name}",
        seed=found.seed,  # the first that finds it; all before it were played, too
        seconds=round(seconds, 2),
        reason=brief(found.reason),
    )


def _find(name: str, arena: Path) -> FoundError:
    for seed in range(BUDGET):
        try:
            play_seed(name, seed, arena)
        except FoundError as found:
            return found
    pytest.fail(f"{BUGS[name].what}: not found by {BUDGET} seeds of {name}")


def test_kv_of_new_weights_under_a_name_of_old_ones_is_found(arena: Path) -> None:
    """Two walls keep it out: with one of them nothing is stored wrongly, without both it is."""
    with BUGS["rebinding"].planted(), UNCHECKED.planted():
        reasons = {_reason("rebinding", seed, arena) for seed in range(40)}
    assert any("wrong bytes" in reason for reason in reasons), reasons
    with UNCHECKED.planted():
        assert {_reason("rebinding", seed, arena) for seed in range(10)} == {""}


def test_a_load_into_a_view_that_has_no_place_for_its_state_is_found(arena: Path) -> None:
    with UNPLACED.planted():
        reasons = {_reason("sparse_states", seed, arena) for seed in range(40)}
    assert any("no place for its state" in reason for reason in reasons), reasons


def _reason(name: str, seed: int, arena: Path) -> str:
    """The invariant that a seed breaks; empty: none."""
    try:
        play_seed(name, seed, arena)
    except FoundError as found:
        return found.reason
    return ""
