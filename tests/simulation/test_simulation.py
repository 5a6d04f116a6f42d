"""Thousands of schedules of the whole tier stack, each from a seed that plays it again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scenarios import SCENARIOS, play_seed

from kvlayer.testing.faults import tally

MUST_HAPPEN = {
    "eviction_against_lookup": ["loaded", "dropped"],
    "dying_writer": ["loaded", "stored"],
    "flapping_tier": ["loaded", "short"],
    "cancellation": ["loaded", "cancelled at 1", "cancelled at 2", "cancelled at 3"],
    "lease_expiry": ["loaded", "dropped"],
    "janitor_hand_over": ["got", "died", "evicted"],
    "back_pressure": ["loaded", "dropped"],
    "two_planners": ["loaded", "damaged"],
    "rebinding": ["loaded", "stored", "rebound", "straddled", "stores cut", "loads cut"],
    "full_memory": ["loaded", "stored", "prefetched", "held every slot"],
    "sparse_states": [
        "at a state",
        "found",
        "half a set",
        "no place",
        "damaged",
        "vanished",
        "cancelled",
    ],
}
"""A scenario in which these never happen has proved nothing."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_seed_keeps_every_invariant(
    name: str, seeds: Callable[[int, int], Sequence[int]], arena: Path, figures: Any
) -> None:
    played = seeds(15, 2000)
    counts: Counter[str] = Counter()
    injected: Counter[str] = Counter()
    for seed in played:
        world = play_seed(name, seed, arena)
        counts += world.counts
        injected.update(tally(world.log))
    if len(played) > 1:
        assert not [what for what in MUST_HAPPEN[name] if not counts[what]], counts
    figures(
        f"simulation.{name}",
        seeds=len(played),
        faults=injected.total(),
        **{what.replace(" ", "_"): count for what, count in sorted(counts.items())},
    )


def test_the_same_seed_takes_the_same_steps(arena: Path) -> None:
    for name in SCENARIOS:
        traces: list[list[str]] = [[], []]
        for trace in traces:
            play_seed(name, 7, arena, trace)
        assert len(traces[0]) > 200
        assert traces[0] == traces[1], name
        other: list[str] = []
        play_seed(name, 8, arena, other)
        assert other != traces[0]


def test_another_process_takes_the_same_steps(arena: Path) -> None:
    """Whatever its hash seed and its addresses are: a seed of CI is a seed on a desk."""
    name = "flapping_tier"
    trace: list[str] = []
    play_seed(name, 3, arena, trace)
    told = subprocess.run(
        [sys.executable, __file__, name, "3", str(arena)],
        env={
            **os.environ,
            "PYTHONHASHSEED": "12345",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == _digest(trace)


def _digest(trace: list[str]) -> str:
    return hashlib.sha256("\n".join(trace).encode()).hexdigest()


if __name__ == "__main__":
    steps: list[str] = []
    play_seed(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), steps)
    print(_digest(steps))  # noqa: T201  # it is what the parent reads
