"""Whatever order a device chooses among those that streams and events allow: right bytes."""

from __future__ import annotations

import pytest
from gpu_scenarios import SCENARIOS, run

SHORT, FULL = 20, 1000


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_schedule_moves_the_same_bytes(name: str, dose, figures) -> None:
    seeds = dose(SHORT, FULL)
    wrong = {seed: faults for seed in range(seeds) if (faults := run(name, "random", seed)[0])}
    assert wrong == {}
    figures("staging.schedules", scenario=name, schedules=seeds)


def test_there_are_at_least_two_hundred_schedules_in_every_run() -> None:
    assert len(SCENARIOS) * SHORT >= 200


@pytest.mark.parametrize("mode", ["eager", "lazy", "race"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_as_early_and_as_late_as_can_be_the_bytes_are_right(name: str, mode: str) -> None:
    assert run(name, mode)[0] == []
