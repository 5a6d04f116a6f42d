"""Estimates: latency and bandwidth are found, noise is borne, old knowledge is forgotten."""

from __future__ import annotations

import random

import pytest

from kvlayer._steps import finish
from kvlayer.tier.guard.estimate import Estimate, Rate
from kvlayer.tier.planner import plan

MIB = 1 << 20


def test_what_is_unknown_costs_nothing() -> None:
    assert Estimate().seconds(1 << 30, 0.0) == 0.0
    assert Estimate().bandwidth is None
    assert Rate().tokens_per_second is None


def test_latency_and_bandwidth_are_found_from_loads_of_different_sizes() -> None:
    estimate, rng = Estimate(), random.Random(1)
    for at in range(40):
        nbytes = rng.randrange(1, 64) * MIB
        estimate.observe(nbytes, (0.020 + nbytes / 500e6) * rng.uniform(0.97, 1.03), float(at))
    assert estimate.latency == pytest.approx(0.020, abs=0.008)
    assert estimate.bandwidth == pytest.approx(500e6, rel=0.1)
    assert estimate.seconds(32 * MIB, 40.0) == pytest.approx(0.020 + 32 * MIB / 500e6, rel=0.1)


def test_loads_of_one_size_give_a_line_through_the_origin() -> None:
    estimate = Estimate()
    for at in range(5):
        estimate.observe(8 * MIB, 0.016 + at * 1e-9, float(at))
    assert estimate.latency == 0.0
    assert estimate.seconds(8 * MIB, 5.0) == pytest.approx(0.016, rel=1e-3)


def test_larger_loads_that_were_faster_do_not_make_a_negative_time() -> None:
    estimate = Estimate()
    estimate.observe(1 * MIB, 1.0, 0.0)
    estimate.observe(64 * MIB, 0.1, 1.0)
    for nbytes in (1, MIB, 1 << 40):
        assert estimate.seconds(nbytes, 1.0) > 0
    assert estimate.latency >= 0


def test_a_tier_that_became_slow_is_believed_after_a_few_loads() -> None:
    estimate = Estimate()
    for at in range(50):
        estimate.observe(8 * MIB, 0.01, at / 10)
    for at in range(20):
        estimate.observe(8 * MIB, 1.0, 5 + at / 10)
    assert estimate.seconds(8 * MIB, 7.0) > 0.8


def test_what_was_learnt_over_a_minute_ago_is_forgotten() -> None:
    estimate = Estimate()
    estimate.observe(MIB, 100.0, 0.0)
    assert estimate.seconds(MIB, 60.0) == 100.0
    assert estimate.seconds(MIB, 60.1) == 0.0
    estimate.observe(MIB, 0.1, 100.0)
    assert estimate.seconds(MIB, 100.0) == pytest.approx(0.1)


def test_the_prefill_rate_follows_what_the_engine_reports() -> None:
    rate = Rate(1000.0)
    assert rate.tokens_per_second == 1000.0
    for _ in range(60):
        rate.observe(4096, 2.0)
    assert rate.tokens_per_second == pytest.approx(2048, rel=0.01)
    rate.observe(0, 1.0)
    rate.observe(5, 0.0)
    assert rate.tokens_per_second == pytest.approx(2048, rel=0.01)


def worthwhile(stops, needs, seconds, rate):  # type: ignore[no-untyped-def]
    return plan.worthwhile(finish(plan.savings(stops, needs, seconds, rate)))


def linear(bandwidth: dict[int, float], latency: float = 0.0):  # type: ignore[no-untyped-def]
    return lambda tier, nbytes: latency + nbytes / bandwidth[tier] if nbytes else 0.0


def test_a_hit_ends_where_loading_is_slower_than_recomputing() -> None:
    stops = [256, 512, 768, 1024]
    slow = [{}, {}, {1: 100}, {1: 100}]
    assert worthwhile(stops, slow, linear({1: 1.0}), 1000.0) == 2
    assert worthwhile(stops, slow, linear({1: 1e6}), 1000.0) == 4


def test_host_memory_behind_a_slow_chunk_is_reached_when_it_is_worth_it() -> None:
    needs = [{1: 100}, {}, {}, {}]
    stops = [256, 512, 768, 1024]
    # loading takes 0.5 s; the chunk itself is worth 0.256 s, all four 1.024 s
    assert worthwhile(stops, needs, linear({1: 200.0}), 1000.0) == 4
    assert worthwhile(stops[:1], needs[:1], linear({1: 200.0}), 1000.0) == 0


def test_latency_is_paid_once_and_needs_enough_tokens() -> None:
    one = linear({1: 1e9}, latency=0.5)
    assert worthwhile([256], [{1: 1}], one, 1000.0) == 0
    assert worthwhile([256, 512, 768], [{1: 1}] * 3, one, 1000.0) == 3


def test_tiers_load_side_by_side() -> None:
    times = linear({1: 100.0, 2: 100.0})
    both = [{1: 40}, {2: 40}]
    assert worthwhile([256, 512], both, times, 1000.0) == 2
    assert worthwhile([256, 512], [{1: 40}, {1: 40}], times, 1000.0) == 0


def test_the_choice_is_the_best_of_all() -> None:
    rng = random.Random(2)
    for _ in range(300):
        count = rng.randrange(1, 9)
        stops = [256 * (i + 1) for i in range(count)]
        needs = [{t: rng.randrange(100) for t in (1, 2) if rng.random() < 0.5} for _ in stops]
        times = linear({1: rng.uniform(50, 500), 2: rng.uniform(50, 500)}, rng.uniform(0, 0.3))

        def saved(n: int, stops=stops, needs=needs, times=times) -> float:  # type: ignore[no-untyped-def]
            total = {t: sum(need.get(t, 0) for need in needs[:n]) for t in (1, 2)}
            load = max((times(t, b) for t, b in total.items() if b), default=0.0)
            return (stops[n - 1] / 1000.0 if n else 0.0) - load

        chosen = worthwhile(stops, needs, times, 1000.0)
        assert saved(chosen) == pytest.approx(max(saved(n) for n in range(count + 1)))
