"""examples/05_vllm runs as its README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "examples" / "05_vllm"


def test_two_processes_and_a_restart() -> None:
    assert "python examples/05_vllm/main.py" in (FOLDER / "README.md").read_text()
    ran = subprocess.run(
        [sys.executable, str(FOLDER / "main.py")], stdout=subprocess.PIPE, text=True, check=True
    )
    assert ran.stdout.splitlines() == [
        "first process: 0 of 1500 prompt tokens were not computed",
        "second process: 1472 of 1500 prompt tokens were not computed",
        "the same answer",
    ]
