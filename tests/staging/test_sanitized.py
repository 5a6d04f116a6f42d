"""The same promises with the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

A process must have the sanitizers' library from its start, so the tests run in another one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import sanitizer_libraries

HERE = Path(__file__).parent
STRAY = """
KV_KERNEL stray(u64 to, u32 which) {
    KV_SHARED u32 few[4];
    if (which == 0) *(volatile u8*)(to + 64) = 1;  // not through kv_store, which looks first
    if (which == 1) kv_store<u32>(to, 1 << (31 + which));
    if (which == 2) few[threadIdx.x] = 1;
}
"""
RUN_STRAY = f"""
import sys, tempfile
from pathlib import Path
from emulator import Emulator, Memory
emulator = Emulator(
    Path(tempfile.mkdtemp()), sanitize=True, edit=lambda source: source + {STRAY!r}
)
memory = Memory(emulator, 64)
emulator.function("copy", "stray")((1,), (32,), (memory.address, int(sys.argv[1])))
"""


@pytest.fixture
def environment() -> dict[str, str]:
    """Of processes that load an emulator with sanitizers."""
    return {
        **os.environ,
        "SANITIZED_KERNELS": "1",
        "LD_PRELOAD": sanitizer_libraries(),
        "ASAN_OPTIONS": "detect_leaks=0",  # an interpreter frees nothing at its end
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def test_the_kernels_are_clean_under_sanitizers(emulator_folder, environment):
    tests = HERE / "test_kernels.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, "AddressSanitizer: heap-buffer-overflow"),
        (1, "runtime error: shift exponent 32 is too large"),
        (2, "runtime error: index 4 out of bounds"),
    ],
)
def test_the_sanitizers_are_awake(emulator_folder, environment, which, message):
    done = subprocess.run(
        [sys.executable, "-c", RUN_STRAY, str(which)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
