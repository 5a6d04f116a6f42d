"""Which stager an engine's GPU will have, from the driver and CuPy's metadata."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kvlayer.doctor import gpu as module
from kvlayer.doctor.finding import Status
from kvlayer.doctor.machine import Machine

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Sep 11 2025\n"


def machine(root: Path, version: str | None) -> Machine:
    if version is not None:
        path = root / "proc/driver/nvidia/version"
        path.parent.mkdir(parents=True)
        path.write_text(DRIVER.format(version), encoding="utf-8")
    return Machine(root)


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = [SimpleNamespace(name=name, version="14.2.0") for name in names]
    monkeypatch.setattr(module, "distributions", lambda: found)


def test_a_machine_without_a_gpu_lacks_nothing(tmp_path, monkeypatch) -> None:
    installed(monkeypatch)
    assert module.gpu(machine(tmp_path, None)).status is Status.OK


@pytest.mark.parametrize(
    ("driver", "package"), [("580.82.07", "cupy-cuda13x"), ("550.54.15", "cupy-cuda12x")]
)
def test_a_gpu_without_cupy_is_a_warning_that_names_the_package(
    driver, package, tmp_path, monkeypatch
) -> None:
    installed(monkeypatch, "numpy", "cupy-chol")
    finding = module.gpu(machine(tmp_path, driver))
    assert finding.status is Status.WARN and package in finding.advice
    assert driver in finding.found


def test_a_gpu_with_cupy_is_fine(tmp_path, monkeypatch) -> None:
    installed(monkeypatch, "cupy-cuda13x")
    finding = module.gpu(machine(tmp_path, "580.82.07"))
    assert finding.status is Status.OK and "cupy-cuda13x 14.2.0" in finding.found
