"""What a campaign reports: machine, version, each part's seconds, figures and outcome."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from campaign import Part, report

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "campaign.py"

TESTS = """
import pytest

def test_counts(dose, figures):
    figures("part.counted", seeds=dose(1, 100), lost=0)

def test_outcome():
    {outcome}
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the rules of this one, and none of its tests."""
    (tmp_path / "conftest.py").write_text((ROOT / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, outcome in (
        ("good", "pass"),
        ("bad", "raise ZeroDivisionError"),
        ("skips", "pytest.skip('no such device')"),
        ("dies", "import os; os._exit(7)"),
    ):
        (tmp_path / f"test_{name}.py").write_text(TESTS.format(outcome=outcome))
    return tmp_path


def campaign(clone: Path, *names: str) -> tuple[int, dict[str, Any], str]:
    runs = [f"--run={name}=test_{name}.py" for name in names]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json=report.json", *runs, "-p", "no:cacheprovider"],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, json.loads((clone / "report.json").read_text()), done.stdout


def test_a_report_has_the_promised_shape_and_one_bad_part_fails_it_alone(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    code, found, shown = campaign(clone, "bad", "dies", "good", "skips")
    assert code == found["exit_code"] == 1
    assert set(found) == {
        "format",
        "version",
        "revision",
        "machine",
        "arguments",
        "started",
        "seconds",
        "exit_code",
        "parts",
    }
    assert (found["format"], found["machine"]["python"]) == (1, sys.version.split()[0])
    bad, dies, good, skips = found["parts"]
    assert set(good) == {
        *("name", "paths", "exit_code", "seconds"),
        *("outcomes", "skipped", "failures", "rows"),
    }
    assert good["rows"] == [{"name": "part.counted", "seeds": 100, "lost": 0}]
    assert good["outcomes"] == {"passed": 2, "failed": 0, "skipped": 0, "error": 0}
    assert (bad["exit_code"], bad["outcomes"]["failed"]) == (1, 1)
    assert bad["failures"] == ["test_bad.py::test_outcome: ZeroDivisionError"]
    assert found["arguments"] == ["-p", "no:cacheprovider"]
    assert "\nFAILED test_bad.py::test_outcome: ZeroDivisionError\n" in shown
    assert "\npart.counted: seeds 100, lost 0\n" in shown
    assert (dies["exit_code"], dies["outcomes"]) == (7, {})
    assert skips["outcomes"]["skipped"] == 1 and "no such device" in skips["skipped"][0]
    assert found["seconds"] == pytest.approx(sum(p["seconds"] for p in found["parts"]), abs=0.11)
    lines = [line.split()[:2] for line in shown.splitlines()[-4:]]
    assert lines == [["bad", "FAILED"], ["dies", "FAILED"], ["good", "ok"], ["skips", "ok"]]


def test_full_doses_are_refused_where_a_limit_would_end_the_run(clone: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--campaign", "-o", "faulthandler_timeout=120"]
    done = subprocess.run(
        [*command, "test_good.py"], cwd=clone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert "nox -s campaign sets it" in done.stderr


@pytest.mark.parametrize("asked", ["--campaign", "--figures=figures.json"])
def test_figures_are_refused_where_several_processes_would_count_them(
    asked: str, clone: Path
) -> None:
    command = [sys.executable, "-m", "pytest", asked, "-o", "faulthandler_timeout=0"]
    pytest.importorskip("xdist")
    done = subprocess.run(
        [*command, "-n2", "test_good.py"], cwd=clone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 4
    assert "figures are counted in one process" in done.stderr


def test_a_campaign_of_good_parts_succeeds() -> None:
    part = Part("good", [], exit_code=0, outcomes={"passed": 1})
    assert report([part], "")["exit_code"] == 0
    empty = Part("empty", [], exit_code=0, outcomes={"passed": 0})
    assert report([part, empty], "")["exit_code"] == 1, "nothing was tested"


def paths_of(parts: str) -> list[str]:
    """What a table of noxfile.py names."""
    source = (ROOT / "noxfile.py").read_text()
    first = source.index(f"{parts} = {{")
    return [word for word in source[first : source.index("}\n", first)].split('"') if "/" in word]


def test_every_part_for_a_gpu_has_tests_that_are_marked() -> None:
    paths = paths_of("VLLM_GPU_PARTS")
    assert len(paths) >= 5
    for path in paths:  # the conftest of tests/gpu marks all of its own
        is_marked = "pytest.mark.any_device" in (ROOT / path).read_text()
        assert is_marked or Path(path).is_relative_to("tests/gpu"), path


def test_every_part_of_the_campaign_has_tests() -> None:
    paths = paths_of("CAMPAIGN")
    assert len(paths) >= 3
    assert all((ROOT / path).exists() for path in paths), paths


def test_every_test_with_a_full_dose_is_in_a_part() -> None:
    """A device's own (``nox -s gpu``) are no part of it: a campaign needs none."""
    tests = (path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
    dosed = [
        path
        for path in tests
        if re.search(r"\bdose\(", (ROOT / path).read_text())
        and not path.is_relative_to("tests/gpu")
        and path.name != Path(__file__).name  # its doses are those of a clone
    ]
    assert len(dosed) > 10
    parts = paths_of("CAMPAIGN")
    assert [path for path in dosed if not any(path.is_relative_to(part) for part in parts)] == []
