"""CUDA staging without a GPU. Collected only when named: ``pytest tests/staging``.

Session ``kernels`` of nox installs what these tests need; anywhere else they skip and say what is
missing. In an everyday run of all tests they are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from emulator import Emulator, missing


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return None if named else True


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where emulators are built."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture(scope="session")
def emulator(emulator_folder: Path) -> Emulator:
    """The kernels as they are; with sanitizers where the process has preloaded them."""
    return Emulator(emulator_folder, sanitize="SANITIZED_KERNELS" in os.environ)


@pytest.fixture
def edited(emulator: Emulator, tmp_path: Path) -> Callable[[Callable[[str], str]], Emulator]:
    """An emulator whose kernels' sources went through a function first."""

    def make(edit: Callable[[str], str]) -> Emulator:
        return Emulator(tmp_path, edit=edit, runtime=emulator.runtime)

    return make
