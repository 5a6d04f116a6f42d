"""The rig finds what it must find: one precaution less, and a row is wrong within 100 seeds."""

from __future__ import annotations

from typing import Any

import pytest
from shaped_play import play
from shaped_setting import SETTINGS

SEEDS = 100


def found_at(configs: Any, figures: Any, name: str, setting: str, **how: Any) -> int | None:
    """The first seed that shows it."""
    for seed in range(SEEDS):
        if play(configs(SETTINGS[setting]), seed, **how).faults:
            figures(f"vllm-gpu.control.{name}", setting=setting, seed=seed)
            return seed
    return None


@pytest.mark.parametrize(
    ("fault", "setting"),
    [
        ("in flight counts", "two steps"),
        ("found counts", "two steps"),
        ("found counts", "three steps"),
        ("last step counts", "two steps"),
        ("last step counts", "three steps"),
        ("blocks not held", "one step, async loads"),
        ("blocks not held", "one step, a window"),
        ("blocks not held", "one step, zeroed blocks"),
        ("blocks not held", "one step, a worker elsewhere"),
        ("blocks not held", "two steps"),
        ("blocks not held", "two steps, a window"),
        ("blocks not held", "three steps"),
        ("blocks not held", "two tensor ranks"),
        ("blocks not held", "one step, states"),
        ("states not held", "one step, states"),
        ("states not held", "two steps, states"),
        ("states not held", "three steps, states, a window"),
        ("in flight counts", "two steps, states"),
        ("half a set", "one step, states"),
        ("half a set", "two steps, states"),
        ("loads in the step", "one step, states"),
        ("heads by turns", "four tensor ranks"),
        ("copies follow nothing", "a GPU, checked"),
        ("copies follow nothing", "two GPU ranks, checked"),
        ("copies follow too little", "a GPU, checked"),
        ("copies follow too little", "two GPU ranks, checked"),
    ],
)
def test_a_precaution_that_is_taken_away_is_missed(
    fault: str, setting: str, configs: Any, figures: Any
) -> None:
    seed = found_at(configs, figures, fault, setting, fault=fault)
    assert seed is not None, f"{SEEDS} seeds on {setting!r} found nothing wrong with: {fault}"
