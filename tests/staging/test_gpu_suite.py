"""The suite for machines with a GPU, as far as a simulated one can carry it."""

from __future__ import annotations

import cases
import checks
import fake_cupy
import numpy as np
import pytest
from gpu_sim import Gpu
from on_device import ManagedMemory, OnDevice


@pytest.mark.parametrize("name", ["gather", "scatter"])
def test_the_checks_of_the_kernels_run_on_a_device_as_they_do_emulated(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "Memory", ManagedMemory)
    monkeypatch.setattr(checks, "Memory", ManagedMemory)
    gpu = Gpu("lazy")
    with fake_cupy.install(gpu):
        device = OnDevice()
        for seed in range(10):
            checks.CHECKS[name](device, np.random.default_rng(seed))
    assert gpu.counts["launches"] >= 5
    assert not gpu.held["device"]


def test_a_kernel_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "Memory", ManagedMemory)
    monkeypatch.setattr(checks, "Memory", ManagedMemory)
    monkeypatch.setattr(OnDevice, "function", lambda *_: lambda *_, **__: None)
    with fake_cupy.install(Gpu("lazy")):
        device = OnDevice()
        with pytest.raises(AssertionError, match="differs"):
            checks.CHECKS["gather"](device, np.random.default_rng(1))
