"""Distributions that exist only as metadata and a module in a temporary folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hang import HANG

Ship = Callable[..., Path]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The folder fake distributions are installed into."""
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def ship(site: Path) -> Ship:
    """Install a distribution: its name, its entry points by group, its modules' sources."""

    def install(name: str, groups: dict[str, dict[str, str]], **modules: str) -> Path:
        info = site / f"{name.replace('-', '_')}-1.2.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
        lines: list[str] = []
        for group, entries in groups.items():
            lines.append(f"[{group}]")
            lines += [f"{key} = {target}" for key, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        return info

    return install


@pytest.fixture
def run(site: Path) -> Run:
    """Run Python in a process that sees the fake distributions: ``run("-c", "...")``."""

    def start(*args: str, **extra: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *args],
            env={**os.environ, "PYTHONPATH": path, **extra},
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )

    return start
