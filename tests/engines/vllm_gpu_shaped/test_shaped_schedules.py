"""Traffics by seed on engines of many shapes: no row is read that is not the prefix's own.

Settings that the adapter refuses today are played with the refusal lifted (``shaped_faults.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from shaped_faults import WrongKVError
from shaped_play import Account, play
from shaped_setting import SETTINGS

SERVED = [each for each in SETTINGS.values() if each.loads == "async"]

COUNTED = ("steps", "reads", "loaded", "failed", "preempted", "aborted", "finished", "stuck")
COMMON = ("steps", "reads", "loaded", "aborted", "finished")
MANY = 50
"""Seeds in which everything has happened that is counted; of being stuck nobody promises it."""


@pytest.fixture
def played(configs: Any, dose: Any, figures: Any) -> Callable[..., list[Account]]:
    """``played(setting, ...)``: the accounts of some seeds, in a campaign of many."""

    def run(setting: Any, **how: Any) -> list[Account]:
        assert {field.name for field in fields(Account)} >= set(COUNTED)
        found = [play(configs(setting), seed, **how) for seed in range(dose(5, 170))]
        sums = {name: sum(getattr(each, name) for each in found) for name in COUNTED}
        wrong = sum(bool(each.faults) for each in found)
        figures(f"vllm-gpu.{setting}", seeds=len(found), wrong=wrong, **sums)
        return found

    return run


def check(accounts: list[Account]) -> None:
    """All of them right, and all that can go on has gone on."""
    wrong = {each.seed: each.faults[:3] for each in accounts if each.faults}
    if wrong:
        raise WrongKVError(f"{len(wrong)} of {len(accounts)} seeds, by seed: {wrong}")
    for name in (*COMMON, *(("failed", "preempted") if len(accounts) >= MANY else ())):
        assert sum(getattr(each, name) for each in accounts), f"no seed had any {name}"


@pytest.mark.parametrize("setting", SERVED, ids=str)
def test_no_wrong_row_is_read(setting: Any, played: Any) -> None:
    check(played(setting))
