"""Whether an engine's GPU is served by CUDA staging, or by torch. Nothing is imported for it."""

from __future__ import annotations

import re
from importlib.metadata import distributions

from kvlayer.doctor.finding import Check, Finding
from kvlayer.doctor.machine import Machine

__all__ = ["gpu"]

_CHECK = Check(
    "gpu",
    "KV of an engine on an NVIDIA GPU moves at the speed of its link through CuPy; without it, "
    "torch moves it, more slowly",
)


def gpu(machine: Machine) -> Finding:
    """The NVIDIA driver against CuPy."""
    driver = machine.text("/proc/driver/nvidia/version")
    if driver is None:
        return _CHECK.ok("there is no NVIDIA driver: torch moves KV", driver=None)
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", driver)
    found = match[1] if match else "of unknown version"
    cupy = next(
        (
            f"{each.name} {each.version}"
            for each in distributions()
            if each.name == "cupy" or each.name.startswith("cupy-cuda")
        ),
        None,
    )
    if cupy is None:
        wanted = "cupy-cuda13x" if match and int(found.split(".")[0]) >= 580 else "cupy-cuda12x"
        return _CHECK.warn(
            f"NVIDIA driver {found}, and no CuPy: torch moves KV",
            f"pip install {wanted}; then `kvlayer bench gpu`",
            driver=found,
            cupy=None,
        )
    return _CHECK.ok(f"NVIDIA driver {found} and {cupy}", driver=found, cupy=cupy)
