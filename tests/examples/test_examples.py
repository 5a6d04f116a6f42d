"""Every example runs as its README says, without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[2]
SAYS = {
    "01_quickstart": "320 of 323 tokens need no prefill",
    "02_tiers": "found 896 tokens: {'cpu': 0, 'file': 896}",
    "03_custom_backend": "loaded from dict://, bit for bit",
    "04_portal": "b: 256 tokens loaded, {'cpu': 0, 'file': 256}",
    "06_simulator": "20 schedules: every answer right, and in time",
}


ELSEWHERE = {"05_vllm"}  # needs an engine: tests/engines/vllm/test_vllm_example.py


def test_every_example_is_tested() -> None:
    found = {path.parent.name for path in (ROOT / "examples").glob("*/main.py")}
    assert found == set(SAYS) | ELSEWHERE


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs_and_says_what_its_readme_promises(name: str) -> None:
    folder = ROOT / "examples" / name
    assert f"python examples/{name}/main.py" in (folder / "README.md").read_text()
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(folder / "main.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert SAYS[name] in ran.stdout
