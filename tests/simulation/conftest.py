"""What every simulation starts from: its seeds, and a place for real files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def seeds(pytestconfig: pytest.Config, dose: Any) -> Callable[[int, int], Sequence[int]]:
    """``seeds(short, full)``: so many, from 0 on; or the one that ``--seed`` names."""
    only: int | None = pytestconfig.getoption("--seed")

    def choose(short: int, full: int) -> Sequence[int]:
        return range(dose(short, full)) if only is None else [only]

    return choose


@pytest.fixture
def arena(tmp_path: Path) -> Generator[Path]:
    """A directory for the files of scenarios: in memory where that can be, for the speed."""
    memory = Path("/dev/shm")  # noqa: S108  # the directory below it has a name nobody guesses
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="kvlayer-sim-") as directory:
        yield Path(directory)
