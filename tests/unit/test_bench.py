"""``kvlayer bench`` prints figures with ceilings taken in the same run. Their size is no test."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from kvlayer.bench.measure import Row
from kvlayer.cli.bench import bench

ROWS = {
    "hash.int32",
    "hash.int64",
    "hash.list",
    "lookup.32k.1k",
    "host.store.native",
    "host.store.canonical",
    "host.retrieve.native",
    "host.retrieve.canonical",
}


def test_every_row_has_its_ceiling_and_the_file_holds_what_was_shown(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    ran = CliRunner().invoke(bench, ["--size", "32MiB", "--rounds", "1", "--json", str(path)])
    assert ran.exit_code == 0, ran.output
    report = json.loads(path.read_text())
    results = {row["name"]: row for row in report["results"]}
    assert set(results) == ROWS
    for name, row in results.items():
        assert row["value"] > 0
        assert name in ran.output
        if name != "lookup.32k.1k":  # a lookup has no physical ceiling
            assert row["ceiling"] > 0
            assert row["ratio"] == row["value"] / row["ceiling"]


def test_a_ratio_is_one_at_the_ceiling_whichever_way_is_better() -> None:
    assert Row("rate", 8.0, "B/s", 10.0).ratio == 0.8
    assert Row("time", 10.0, "s", 8.0).ratio == 0.8
    assert Row("alone", 10.0, "s").ratio is None
