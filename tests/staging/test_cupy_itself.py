"""What the build believes of CuPy, asked of CuPy: without a driver, as far as it goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvlayer.staging.kernels.build import OPTIONS, kernel_source

BUILD = """
from kvlayer.errors import UnsupportedError
from kvlayer.staging.kernels.build import Builder
try:
    Builder(0)
except UnsupportedError as error:
    print(error, "|", error.hint)
"""


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed: nox -s kernels has it")


def test_a_module_takes_what_the_builder_hands_to_it(cupy):
    """It is compiled only when a function is asked for."""
    module = cupy.RawModule(code=kernel_source("copy"), options=OPTIONS, backend="nvrtc")
    assert callable(module.get_function)


def test_a_cache_folder_that_cupy_cannot_make_is_named_as_the_reason(cupy, tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    done = subprocess.run(
        [sys.executable, "-c", BUILD],
        env={**os.environ, "CUPY_CACHE_DIR": str(file / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CuPy cannot be imported: [Errno 20] Not a directory")
    assert "CUPY_CACHE_DIR" in done.stdout.split("|")[1]
