"""The scenarios by name, and how one seed of one is played so that it can be played again."""

from __future__ import annotations

import re
from pathlib import Path

import back_pressure
import cancellation
import dying_writer
import eviction_against_lookup
import flapping_tier
import full_memory
import janitor_hand_over
import lease_expiry
import rebinding
import sparse_states
import two_planners
from world import Scenario, World, play

__all__ = ["SCENARIOS", "FoundError", "brief", "play_seed"]

SCENARIOS: dict[str, Scenario] = {
    "eviction_against_lookup": eviction_against_lookup.play,
    "dying_writer": dying_writer.play,
    "flapping_tier": flapping_tier.play,
    "cancellation": cancellation.play,
    "lease_expiry": lease_expiry.play,
    "janitor_hand_over": janitor_hand_over.play,
    "back_pressure": back_pressure.play,
    "two_planners": two_planners.play,
    "full_memory": full_memory.play,
    "rebinding": rebinding.play,
    "sparse_states": sparse_states.play,
}


class FoundError(AssertionError):
    """A seed broke an invariant; ``reason`` says which, as the seed says it every time."""

    def __init__(self, name: str, seed: int, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self.seed = seed
        self.reason = f"{type(error).__name__}: {error}"
        super().__init__(
            f"seed {seed} of {name} breaks an invariant\n  {self.reason}\n"
            f"replay it: pytest tests/simulation/test_simulation.py -k {name} --seed {seed}"
        )


def brief(reason: str) -> str:
    """A reason for a row of figures: names of objects are cut to what tells them apart."""
    return re.sub(r"([0-9a-f]{8})[0-9a-f]{24,}", r"\1..", reason)[:200]


def play_seed(name: str, seed: int, arena: Path, trace: list[str] | None = None) -> World:
    """One seed of one scenario. Raises :class:`FoundError`."""
    try:
        return play(SCENARIOS[name], seed, arena, trace)
    except Exception as exc:
        raise FoundError(name, seed, exc) from exc
