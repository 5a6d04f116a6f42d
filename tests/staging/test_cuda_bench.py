"""Thresholds: chosen from figures, kept per kind of device; the bench that takes the figures."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import fake_cupy
import pytest
import torch
from click.testing import CliRunner
from gpu_engine import DeviceTensor
from gpu_sim import Gpu

from kvlayer.bench import gpu as bench_gpu
from kvlayer.cli.bench import bench
from kvlayer.layout import KVLayout, KVView
from kvlayer.staging.cuda import calibration
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.measure import Figures, choose, choose_slot

LINK, RUN_SECONDS, BATCH_SECONDS = 50e9, 0.5e-6, 20e-6
COUNTS = (2, 4, 8, 16, 32, 64, 128)


def figures(**other: object) -> Figures:
    """A PCIe 5 card as the model of docs/gpu.md has it."""

    def rate(nbytes: int, seconds: float) -> float:
        return nbytes / (nbytes / LINK + seconds)

    return replace(
        Figures(
            to_host=LINK,
            to_device=LINK,
            by_run={1 << n: rate(1 << n, RUN_SECONDS) for n in range(12, 21)},
            single_seconds={n: n * RUN_SECONDS for n in COUNTS},
            batch_seconds={n: BATCH_SECONDS / 10 + n * RUN_SECONDS / 10 for n in COUNTS},
            by_blocks={n: min(n, 128) * 10e9 for n in (8, 16, 32, 64, 128, 256)},
        ),
        **other,  # type: ignore[arg-type]
    )


def test_thresholds_follow_from_what_was_measured() -> None:
    found = choose(figures())
    assert found.blocks == 128  # 1280 GB/s, as 256 move
    assert found.direct_nbytes == 256 << 10  # half a microsecond is a tenth of 5.2
    assert found.batch_runs == 8
    assert found.gap_nbytes == 24 << 10  # what the link moves in half a microsecond


def test_what_never_wins_is_never_chosen() -> None:
    found = choose(
        figures(
            batch_seconds={},
            by_run={1 << n: 1e9 for n in range(12, 21)},
            by_blocks={4: 1e9, 8: 9e9},
        )
    )
    assert found.batch_runs == 1 << 30
    assert found.direct_nbytes == 2 << 20
    assert found.blocks == 8


def test_the_smallest_slot_that_is_as_fast_as_any_is_chosen() -> None:
    assert choose_slot({4 << 20: 64e-3, 16 << 20: 44.8e-3, 32 << 20: 44e-3}) == 16 << 20
    assert choose_slot({4 << 20: 64e-3, 16 << 20: 46e-3, 32 << 20: 44e-3, 64 << 20: 44e-3}) == (
        32 << 20
    )


def test_a_calibration_is_kept_for_its_kind_of_device(tmp_path: Path) -> None:
    wanted = Calibration(slot_nbytes=8 << 20, blocks=24)
    path = calibration.save("Fake GPU sm_90", wanted, tmp_path)
    assert path is not None and path.parent == tmp_path / "gpu"
    assert calibration.load("Fake GPU sm_90", tmp_path) == (wanted, True)
    assert calibration.load("Other GPU sm_80", tmp_path) == (Calibration(), False)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1}', '{"version": 9, "device": "Fake GPU sm_90"}', "\x00"],
)
def test_a_damaged_calibration_is_none_and_said(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = calibration.save("Fake GPU sm_90", Calibration(), tmp_path)
    assert path is not None
    path.write_text(text, encoding="utf-8")
    assert calibration.load("Fake GPU sm_90", tmp_path) == (Calibration(), False)
    assert "defaults are used" in caplog.text


def test_numbers_out_of_range_are_no_calibration(tmp_path: Path) -> None:
    path = calibration.save("Fake GPU sm_90", Calibration(), tmp_path)
    assert path is not None
    kept = json.loads(path.read_text(encoding="utf-8"))
    for name, value in (("slots", 0), ("blocks", True), ("slot_nbytes", 1.5), ("batch_runs", -1)):
        path.write_text(json.dumps({**kept, name: value}), encoding="utf-8")
        assert calibration.load("Fake GPU sm_90", tmp_path) == (Calibration(), False)


def untouched(layout: KVLayout, blocks: int) -> KVView:
    """Memory of the right shape that costs nothing as long as nobody touches it."""
    cache = torch.empty(2, blocks, 16, 8, 128, dtype=torch.bfloat16).as_subclass(DeviceTensor)
    return KVView.single([cache] * 32, torch.arange(blocks * 16))


def test_the_bench_prints_a_table_keeps_the_thresholds_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        bench_gpu, "_torch_view", lambda number, layout, blocks: untouched(layout, blocks)
    )
    report, gpu = tmp_path / "gpu.json", Gpu("count")
    with fake_cupy.install(gpu):
        done = CliRunner().invoke(
            bench, ["gpu", "--size", "64MiB", "--rounds", "1", "--json", str(report)]
        )
    assert done.exit_code == 0, done.output
    for name in ("copy.to_host", "copy.to_device", "gather", "store.canonical", "load.native"):
        assert f"gpu.{name}" in done.output
    rows = {row["name"]: row for row in json.loads(report.read_text())["results"]}
    assert rows["gpu.store.canonical"]["ceiling"] > 0
    kept, was_kept = calibration.load("Fake GPU sm_90")
    assert was_kept and asdict(kept) == json.loads(report.read_text())["calibration"]
    assert gpu.held == Counter()


def test_without_a_gpu_the_bench_says_what_lacks() -> None:
    with fake_cupy.install(Gpu("count", devices=0)):
        done = CliRunner().invoke(bench, ["gpu"])
    assert done.exit_code != 0
    assert "no CUDA driver or device" in f"{done.output}{done.exception}"
