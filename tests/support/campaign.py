"""Runs the parts of a campaign one after the other and reports on them, for ``nox -s campaign``.

Each part is a pytest run of its own with full doses (``--campaign``), so that one that crashes or
hangs costs itself alone. The report is written anew after each part, and says of every part that
was asked for whether it ran.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Part", "main", "report", "table"]

FORMAT = 1
"""Of the report; a field less or other is a new one."""
_NOT_RUN = -1
_SECONDS = 4 * 3600


@dataclass(slots=True)
class Part:
    """One part: where its tests are, and once it has run what came of them."""

    name: str
    paths: list[str]
    exit_code: int = _NOT_RUN
    """pytest's own: 0 when every test passed."""
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict[str, int])
    """Tests by outcome: passed, failed, skipped."""
    skipped: list[str] = field(default_factory=list[str])
    """What was not tested, and why."""
    failures: list[str] = field(default_factory=list[str])
    """Each test that failed, and what it said."""
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """The figures of its tests."""

    @property
    def is_good(self) -> bool:
        return self.exit_code == 0 and self.outcomes.get("passed", 0) > 0


def report(parts: Sequence[Part], started: str, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The campaign as JSON: machine, versions, parts, and the exit code of the whole."""
    from kvlayer._version import version
    from kvlayer.bench.machine import describe

    machine = describe()
    for of_measurements in ("torch", "torch_threads"):
        machine.pop(of_measurements)  # what this process has imported, which measures nothing
    return {
        "format": FORMAT,
        "version": version(),
        "revision": _revision(),
        "machine": machine,
        "arguments": list(arguments),
        "started": started,
        "seconds": round(sum(part.seconds for part in parts), 1),
        "exit_code": 0 if all(part.is_good for part in parts) else 1,
        "parts": [asdict(part) for part in parts],
    }


def table(parts: Sequence[Part]) -> list[str]:
    """A line for each part."""
    lines = [f"{'part':16}{'result':>10}{'seconds':>10}{'passed':>8}{'failed':>8}{'skipped':>9}"]
    for part in parts:
        result = "ok" if part.is_good else "not run" if part.exit_code == _NOT_RUN else "FAILED"
        counts = [part.outcomes.get(name, 0) for name in ("passed", "failed", "skipped")]
        lines.append(
            f"{part.name:16}{result:>10}{part.seconds:>10.1f}"
            f"{counts[0]:>8}{counts[1]:>8}{counts[2]:>9}"
        )
    return lines


def findings(part: Part) -> list[str]:
    """What a part found: a line for each row of figures, and for each test that failed."""
    rows = [
        f"{row['name']}: " + ", ".join(f"{k} {v}" for k, v in row.items() if k != "name")
        for row in part.rows
    ]
    return rows + [f"FAILED {failure}" for failure in part.failures]


def run(part: Part, arguments: Sequence[str]) -> None:
    """Run a part's tests; what they print is shown as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder, "figures.json")
        command = [sys.executable, "-m", "pytest", "--campaign", f"--figures={figures}"]
        command += ["-o", f"faulthandler_timeout={_SECONDS}"]  # of a test, whose dose is full
        began = time.monotonic()
        part.exit_code = subprocess.run([*command, *part.paths, *arguments], check=False).returncode
        part.seconds = round(time.monotonic() - began, 1)
        if figures.exists():  # pytest died before it could write them
            found: Mapping[str, Any] = json.loads(figures.read_text())
            part.rows, part.outcomes = found["rows"], found["outcomes"]
            part.skipped, part.failures = found["skipped"], found["failures"]


def _revision() -> str | None:
    """The commit that was tested; None outside a clone."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="campaign", allow_abbrev=False)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--run", action="append", required=True, metavar="PART=PATH[,PATH]")
    chosen, rest = parser.parse_known_args(arguments)
    parts = []
    for each in chosen.run:
        name, _, paths = each.partition("=")
        parts.append(Part(name, paths.split(",")))
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for part in parts:
        run(part, rest)
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(report(parts, started, rest), indent=2) + "\n")
    found = [line for part in parts for line in findings(part)]
    sys.stdout.write("\n".join(["", *found, "", *table(parts), ""]))
    return int(report(parts, started)["exit_code"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
