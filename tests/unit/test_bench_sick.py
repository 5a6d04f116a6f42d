"""The bench of sick tiers: who meets the sickness pays one deadline, who follows pays nothing."""

from __future__ import annotations

import asyncio

from kvlayer.bench.measure import Row
from kvlayer.bench.sick import sick_rows


def test_figures_stand_beside_what_they_may_cost() -> None:
    rows = {row.name: row for row in asyncio.run(sick_rows(1, 5))}
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
    for name, row in rows.items():
        assert row.unit == "s" and row.ceiling
        if name.endswith(("first", "worst")):
            assert row.value >= row.ceiling  # it did wait, so the figure means something
        elif name.endswith("later"):
            assert row.value < row_of_first(name, rows) / 2


def row_of_first(name: str, rows: dict[str, Row]) -> float:
    """What the first request of the same sickness took."""
    return rows[name.replace("later", "first")].value
