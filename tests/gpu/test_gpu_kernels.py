"""Every kernel on the device, against the same oracles as the emulated ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import cases
import checks
import numpy as np
import pytest
from on_device import ManagedMemory, OnDevice


@pytest.fixture
def on_device(device: int, monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    """The checks' memory and launches are the device's."""
    monkeypatch.setattr(cases, "Memory", ManagedMemory)
    monkeypatch.setattr(checks, "Memory", ManagedMemory)
    return OnDevice(device)


@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_kernel_equals_its_oracle_over_random_layouts(name: str, on_device, dose) -> None:
    for seed in range(int(os.environ.get("GPU_SUITE_CASES", dose(100, 5000)))):
        checks.CHECKS[name](on_device, np.random.default_rng(seed))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
@pytest.mark.may_skip("compute-sanitizer comes with the CUDA toolkit")
def test_a_sanitizer_finds_nothing(tool: str, device: int) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [
            *(program, "--tool", tool, "--error-exitcode", "9"),
            *(sys.executable, "-m", "pytest", "-q", __file__, "-k", "oracle"),
        ],
        env={**os.environ, "GPU_SUITE_CASES": "3"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
