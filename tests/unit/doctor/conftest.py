"""Machines that exist only as a few files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvlayer.doctor.machine import Machine, Space

GIB = 1 << 30

MEMINFO = """\
MemTotal:       16777216 kB
MemFree:         1048576 kB
MemAvailable:    8388608 kB
Active(anon):        100 kB
HugePages_Total:       7
CommitLimit:    10485760 kB
Committed_AS:    4194304 kB
"""

LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max locked memory         8388608              8388608              bytes
Max open files            20000                30000                files
"""


class Fake(Machine):
    """Files below a folder, and room in file systems as a test says."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.spaces: dict[str, Space] = {}

    def space(self, path: str) -> Space | None:
        return self.spaces.get(path)


Build = Callable[..., Fake]


@pytest.fixture
def machine(tmp_path: Path) -> Build:
    """Build a machine from files: ``machine({"/proc/meminfo": "..."})``."""
    root = tmp_path / "machine"
    root.mkdir()

    def build(files: dict[str, str] | None = None) -> Fake:
        for name, text in (files or {}).items():
            path = root / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return Fake(root)

    return build


@pytest.fixture
def usual(machine: Build) -> Fake:
    """A machine with 16 GiB, half of them available."""
    return machine({"/proc/meminfo": MEMINFO, "/proc/self/limits": LIMITS})
