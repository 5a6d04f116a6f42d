"""Situations that are constructed and not merely random: no wrong byte, no hang, nothing held.

``KVLAYER_SEED`` is the first of the seeds that follow each other; a failure names its own, which
``--seed`` plays again, and tells what was constructed.
"""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from descriptors import descriptors
from situation import play
from warped import WARPS

SEED = int(os.environ.get("KVLAYER_SEED", "1"))  # read here: tests see no such variable


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_constructed_situation_costs_misses_and_nothing_else(
    tmp_path: Path, dose: Any, figures: Any, pytestconfig: pytest.Config
) -> None:
    only = pytestconfig.getoption("--seed")
    seeds = range(SEED, SEED + dose(12, 3000)) if only is None else [only]
    counts: Counter[str] = Counter()
    kinds: set[str] = set()
    play(seeds[0], tmp_path / "first")  # what is imported late is there from here on
    gc.collect()
    files = descriptors()
    for seed in seeds:
        situation = play(seed, tmp_path / str(seed))
        counts += situation.counts
        kinds |= {each.split()[0] for each in situation.said} | {
            each.fault for each in situation.log
        }
        gc.collect()
        assert descriptors() == files, f"seed {seed} leaves descriptors open: {situation.said}"
    if len(seeds) > 1:
        assert counts["tokens loaded"] and counts["constructed"]
    if len(seeds) > 500:
        assert {what.__name__ for what in WARPS} <= kinds
    figures("situations.all", first_seed=seeds[0], seeds=len(seeds), kinds=len(kinds), **counts)


def unchecked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kvlayer.tier.transfer.coding.check_segment", lambda *_: None)


def kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kvlayer.tier.planner.lease.LeaseTable.release", lambda *_: True)
    patch.setattr("kvlayer.tier.planner.lease.LeaseTable.is_due", lambda *_: False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("plant", "words"),
    [(unchecked, "wrong bytes"), (kept, "leases are left|still pinned|hangs")],
)
def test_a_planted_bug_is_found(tmp_path: Path, plant: Any, words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        for seed in range(1, 40):
            try:
                play(seed, tmp_path / str(seed))
            except AssertionError as error:
                said = f"{error} {error.__cause__}"
                assert re.search(words, said), said
                return
    pytest.fail("no seed finds it")
