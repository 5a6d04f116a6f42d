"""The simulator finds backends that break what memory is lent for, by a seed that replays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from full_memory import LIARS, play, playing
from world import Scenario
from world import play as play_world

from kvlayer.testing.invariants import Broken

BUDGET = 500  # seeds


@pytest.mark.parametrize("what", LIARS)
def test_a_backend_that_writes_where_or_when_it_may_not_is_found(
    what: str, arena: Path, figures: Any
) -> None:
    scenario = playing(LIARS[what])
    seeds = ((seed, _broken(scenario, seed, arena)) for seed in range(BUDGET))
    found = next(((seed, why) for seed, why in seeds if why), None)
    assert found is not None, f"a backend that writes {what}: not found by {BUDGET} seeds"
    seed, why = found
    assert _broken(scenario, seed, arena) == why
    assert _broken(play, seed, arena) is None  # and it was the backend
    figures(f"simulation.control.{what}", seed=seed, reason=why[:200])


def _broken(scenario: Scenario, seed: int, arena: Path) -> str | None:
    """The first invariant that a seed breaks."""
    try:
        play_world(scenario, seed, arena)
    except (Broken, BaseExceptionGroup) as exc:
        error: BaseException = exc
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        assert isinstance(error, Broken), error
        return str(error)
    return None
