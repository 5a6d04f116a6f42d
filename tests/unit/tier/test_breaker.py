"""The breaker: one missed deadline opens it, a pause that doubles, one trial decides."""

from __future__ import annotations

import pytest

from kvlayer.tier.guard.breaker import Breaker, BreakerState


def test_one_missed_deadline_opens_it_and_five_errors_in_a_row_do() -> None:
    slow, broken = Breaker(), Breaker()
    assert slow.missed(0.0, "late")
    assert (slow.state, slow.reason) == (BreakerState.OPEN, "late")
    assert [broken.failed(0.0, "no") for _ in range(5)] == [False] * 4 + [True]
    assert not broken.is_closed


def test_errors_about_one_object_count_once() -> None:
    breaker = Breaker()
    assert not any(breaker.failed(0.0, "no", "one") for _ in range(100))
    assert breaker.failed_count == 1
    assert [breaker.failed(0.0, "no", key) for key in ("two", "one", "three", "four")] == [
        False
    ] * 4
    assert breaker.failed(0.0, "no", "five")


def test_a_success_forgets_which_objects_had_failed() -> None:
    breaker = Breaker()
    for key in range(4):
        breaker.failed(0.0, "no", key)
    breaker.succeeded(0.0)
    assert breaker.failed_count == 0
    assert not any(breaker.failed(0.0, "no", key) for key in range(4))


def test_a_success_between_errors_forgives_them() -> None:
    breaker = Breaker()
    for _ in range(20):
        for _ in range(4):
            breaker.failed(0.0, "no")
        breaker.succeeded(0.0)
    assert breaker.is_closed


def test_one_trial_at_a_time_and_not_before_the_pause_is_over() -> None:
    breaker = Breaker(pause=2.0)
    breaker.missed(10.0, "late")
    assert not breaker.try_now(11.9)
    assert breaker.try_now(12.0)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.try_now(13.0)


def test_every_failed_trial_doubles_the_pause_up_to_a_bound() -> None:
    breaker, now, pauses = Breaker(pause=1.0, max_pause=8.0), 0.0, []
    breaker.missed(now, "late")
    for _ in range(6):
        pauses.append(breaker.trial_at - now)
        now = breaker.trial_at
        assert breaker.try_now(now)
        assert breaker.failed(now, "still")
    assert pauses == [1, 2, 4, 8, 8, 8]


def test_a_tier_that_flaps_is_left_alone_ever_longer() -> None:
    """Successes in between do not help while it fails again before the next pause would be over."""
    breaker, now = Breaker(pause=1.0), 0.0
    for expected in (1, 2, 4):
        breaker.missed(now, "late")
        assert breaker.trial_at - now == expected
        now = breaker.trial_at
        assert breaker.try_now(now)
        assert breaker.passed(now)
        assert breaker.is_closed
        breaker.succeeded(now + 1.9 * expected)
    breaker.succeeded(now + 8.0)
    breaker.missed(now + 8.0, "late")
    assert breaker.trial_at - (now + 8.0) == 1


def test_a_success_closes_it_whatever_it_was_waiting_for() -> None:
    breaker = Breaker(pause=1.0)
    breaker.missed(0.0, "late")
    breaker.succeeded(0.1)
    assert (breaker.state, breaker.reason) == (BreakerState.CLOSED, "")
    breaker.missed(0.2, "late")
    assert breaker.trial_at == pytest.approx(0.2 + 2.0)
    assert breaker.try_now(3.0)
    breaker.succeeded(3.0)
    assert not breaker.passed(3.1)  # the trial's verdict comes too late to matter


def test_a_trial_that_was_called_off_may_be_made_again_at_once() -> None:
    breaker = Breaker(pause=1.0)
    breaker.missed(0.0, "late")
    assert breaker.is_due(1.0)
    assert breaker.try_now(1.0)
    assert not breaker.is_due(1.0)
    breaker.untried()
    assert breaker.state is BreakerState.OPEN
    assert breaker.try_now(1.0)
    assert breaker.failed(1.0, "no")
    assert breaker.trial_at == 3.0  # calling it off was no failure


def test_calls_from_before_it_opened_do_not_prolong_the_pause() -> None:
    breaker = Breaker(pause=1.0)
    breaker.missed(0.0, "first")
    for at in range(9):
        assert not breaker.missed(at / 10, "more")
        assert not breaker.failed(at / 10, "more")
    assert (breaker.trial_at, breaker.reason) == (1.0, "first")


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_the_pause_is_between_half_of_it_and_all_of_it(chance: float) -> None:
    breaker = Breaker(pause=4.0, jitter=lambda: chance)
    breaker.missed(0.0, "late")
    assert breaker.trial_at == 2.0 + 2.0 * chance
