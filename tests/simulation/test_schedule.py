"""Threads look up and lease while the loop's thread plans, in schedules that a seed decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import pytest
from bugs import RACES
from scenarios import brief
from threads import play_threads

from kvlayer.testing.schedule import Deadlock, Schedule, TurnLock

BUDGET = 2000  # seeds; what a campaign plays


def test_what_is_leased_stays_whoever_plans(
    seeds: Callable[[int, int], Sequence[int]], figures: Any
) -> None:
    played, turns = seeds(20, 2000), 0
    for seed in played:
        try:
            turns += len(play_threads(seed))
        except Exception as exc:
            exc.add_note(
                "replay it: pytest tests/simulation/test_schedule.py "
                f"-k what_is_leased --seed {seed}"
            )
            raise
    figures("simulation.threads", seeds=len(played), turns=turns)


@pytest.mark.parametrize("name", RACES)
def test_a_planted_race_is_found_and_its_seed_replays(name: str, figures: Any) -> None:
    with RACES[name].planted():
        began = perf_counter()
        seed, reason = _find()
        seconds = perf_counter() - began
        with pytest.raises(Exception) as again:  # noqa: PT011  # the very same, whatever it is
            play_threads(seed)
    assert repr(again.value) == reason
    play_threads(seed)
    figures(f"simulation.race.{name}", seed=seed, seconds=round(seconds, 2), reason=brief(reason))


def _find() -> tuple[int, str]:
    for seed in range(BUDGET):
        try:
            play_threads(seed)
        except Exception as exc:  # noqa: BLE001  # a race may break anything
            return seed, repr(exc)
    pytest.fail(f"not found by {BUDGET} schedules")


def test_the_same_seed_takes_the_same_turns() -> None:
    turns = [play_threads(seed) for seed in (5, 5, 6)]
    assert len(turns[0]) > 10
    assert turns[0] == turns[1] != turns[2]


def test_a_deadlock_is_an_error_that_names_who_waits() -> None:
    def crossed(seed: int) -> None:
        schedule = Schedule(seed)
        one, other = schedule.lock(), schedule.lock()
        schedule.run(lambda: _both(one, other), lambda: _both(other, one))

    before = threading.active_count()
    deadlocks: list[str] = []
    for seed in range(20):
        try:
            crossed(seed)
        except Deadlock as found:
            deadlocks.append(str(found))
    assert 0 < len(deadlocks) < 20
    assert all("thread 0 waits for <TurnLock of thread 1>" in each for each in deadlocks)
    assert threading.active_count() == before


def _both(first: TurnLock, second: TurnLock) -> None:
    with first, second:
        pass


def test_the_error_of_a_thread_ends_the_others_and_is_raised() -> None:
    def fail() -> None:
        raise KeyError("of thread 1")

    schedule = Schedule(0)
    lock = schedule.lock()

    def forever() -> None:
        while True:
            with lock:
                schedule.switch()

    before = threading.active_count()
    with pytest.raises(KeyError, match="of thread 1"):
        schedule.run(forever, fail)
    assert threading.active_count() == before
