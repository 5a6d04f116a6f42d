"""The bench of sick tiers: who meets the sickness pays one deadline, who follows pays nothing."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from kvlayer.bench import sick
from kvlayer.bench.measure import Row
from kvlayer.testing.sim import run

pytestmark = pytest.mark.torch


def test_figures_stand_beside_what_they_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """In virtual time, in which nothing takes any but waiting: the figures are exact."""

    async def measured() -> list[Row]:
        clock = SimpleNamespace(perf_counter=asyncio.get_running_loop().time)
        monkeypatch.setattr(sick, "time", clock)
        return await sick.sick_rows(1, 5)

    rows = {row.name: row for row in run(measured())}
    assert list(rows) == [
        "tier.healthy",
        "tier.dead.first",
        "tier.dead.later",
        "tier.dead.recovery",
        "tier.slow.first",
        "tier.slow.later",
        "tier.slow.recovery",
        "tier.flapping.first",
        "tier.flapping.later",
        "tier.flapping.worst",
    ]
    assert {row.unit for row in rows.values()} == {"s"}
    for name, row in rows.items():
        assert row.ceiling is not None
        if name.endswith(("first", "worst")):
            assert row.value == pytest.approx(row.ceiling)  # one deadline
        elif name.endswith("recovery"):
            assert row.value <= 2 * row.ceiling
        else:
            assert row.value == 0.0
