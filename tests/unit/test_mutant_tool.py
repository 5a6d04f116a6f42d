"""The tool that plants bugs: tests that notice kill them, tests that say nothing are reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mutants import mirrors
from mutations import mutations_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "mutants.py"

SOURCE = '''"""A file with one rule."""

LIMIT = 3


def is_full(count: int) -> bool:
    """Whether there is room for no more."""
    return count >= LIMIT
'''
GOOD = """
from room import is_full

def test_it_is_full_from_three_on():
    assert [is_full(n) for n in (2, 3, 4)] == [False, True, True]
"""
WEAK = """
from room import is_full

def test_it_is_full():
    assert is_full(9)
"""
ELSEWHERE = "def test_nothing_of_it():\n    assert True\n"
RED = GOOD.replace("True, True", "True, False")
ENDLESS = """
from room import is_full

def test_it_fills():
    count = 0
    while not is_full(count):
        count += 1
"""


@pytest.fixture
def played(tmp_path: Path) -> Any:
    """``played(tests, *options)``: exit code, output and report of the tool on a small project."""

    def play(tests: str, *options: str) -> tuple[int, str, Any]:
        (tmp_path / "src").mkdir()
        (tmp_path / "tests").mkdir()
        (tmp_path / "src" / "room.py").write_text(SOURCE)
        (tmp_path / "tests" / "test_room.py").write_text(tests)
        command = [sys.executable, str(SCRIPT), "src/room.py", "--json=report.json", *options]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.stderr == ""
        assert (tmp_path / "src" / "room.py").read_text() == SOURCE
        return done.returncode, done.stdout, json.loads((tmp_path / "report.json").read_text())

    return play


def test_every_bug_is_noticed_by_tests_that_look(played: Any) -> None:
    code, said, report = played(GOOD)
    (row,) = report["files"]
    assert code == 0 and row["sites"] == row["killed"] == 3 and row["survivors"] == []
    assert row["tests"] == ["tests/test_room.py"]
    assert "100% of 3 mutants were noticed" in said


def test_a_bug_that_no_test_notices_is_named(played: Any) -> None:
    code, said, report = played(WEAK)
    (row,) = report["files"]
    assert code == 0 and row["killed"] == 1 and row["score"] == pytest.approx(1 / 3)
    survivor = "src/room.py:8: comparison: count >= LIMIT -> (count > LIMIT)"
    assert survivor in row["survivors"] and f"lived: {survivor}" in said


def test_a_bug_that_hangs_the_tests_is_told_apart(played: Any) -> None:
    code, _, report = played(ENDLESS, "--least-seconds=1")
    (row,) = report["files"]
    assert (
        code == 0 and "src/room.py:8: return: return count >= LIMIT -> return None" in row["hung"]
    )


def test_a_sample_is_the_seeds(played: Any) -> None:
    _, _, report = played(WEAK, "--most=1", "--seed=5")
    (row,) = report["files"]
    assert (row["sites"], row["killed"] + len(row["survivors"])) == (3, 1)
    assert report["seed"] == 5


def test_tests_that_never_load_the_file_are_reported(played: Any) -> None:
    code, said, report = played(ELSEWHERE)
    assert code == 1 and report["files"] == []
    assert "do not load it" in report["dead"]["src/room.py"] and "do not load it" in said


def test_tests_that_are_red_without_a_bug_are_reported(played: Any) -> None:
    code, said, report = played(RED)
    assert code == 1 and "not green without a mutant" in report["dead"]["src/room.py"]
    assert "test_it_is_full_from_three_on" in said  # with what pytest said


def test_a_file_without_tests_is_reported(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(SOURCE)
    command = [sys.executable, str(SCRIPT), "alone.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1 and "no test is named after it" in done.stdout


def names(source: str) -> list[str]:
    return [path.name for path in mirrors(ROOT / source, ROOT)]


def test_a_files_tests_are_those_named_after_it_else_its_folders() -> None:
    assert names("src/kvlayer/tier/guard/guard.py") == [
        "test_guard.py",
        "test_guard_breaker.py",
        "test_guard_closing.py",
    ]
    assert "test_slots.py" in names("src/kvlayer/staging/slots.py")
    assert "test_file_janitor.py" in names("src/kvlayer_backends/file/janitor.py")
    beside = names("src/kvlayer/tier/guard/lane_queue.py")
    assert "test_guard.py" in beside and "test_keys.py" not in beside


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", ["comparison: a < b -> (a <= b)"]),
        ("x = a < b is c", ["comparison: a < b is c -> (a <= b is c)",
                            "comparison: a < b is c -> (a < b is not c)"]),
        ("x = a and not b", ["boolean: a and not b -> (a or not b)", "boolean: not b -> (b)"]),
        ("x = 'é' * 2", ["arithmetic: 'é' * 2 -> ('é' // 2)", "constant: 2 -> 3"]),
        ("x = True", ["constant: True -> False"]),
        ("x += 1", ["arithmetic: x += 1 -> x -= 1", "deletion: x += 1 -> pass",
                    "constant: 1 -> 2"]),
        ("def f():\n    return x", ["return: return x -> return None"]),
        ("if ready(): go()", ["boolean: ready() -> (not (ready()))", "deletion: go() -> pass"]),
        ("self.x = y", ["deletion: self.x = y -> pass"]),
        ("raise E('1' * 3)", ["deletion: raise E('1' * 3) -> pass"]),
        # Texts, types, docstrings, logs and what must be true anyway are left alone.
        ("def f(a: X | Y) -> 3:\n    'doc'\n    assert a < 3\n    _log.info(f'{a < 3}')", []),
        ("if TYPE_CHECKING:\n    a = 1", []),
        ("def f():\n    return None", []),
    ],
)  # fmt: skip
def test_bugs_are_the_small_mistakes_of_people(source: str, expected: list[str]) -> None:
    found = mutations_of(source)
    assert [str(each).split(": ", 1)[1] for each in found] == expected
    for mutation in found:
        assert mutation.applied(source) != source
        compile(mutation.applied(source), "mutant", "exec")
