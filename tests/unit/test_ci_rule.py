"""In CI a skip is a failure, unless the test said beforehand that it may skip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hang import HANG

ROOT = Path(__file__).parents[2]

SUITE = """
import pytest

def test_passes(): ...

def test_skips():
    pytest.skip("something is absent")

@pytest.mark.may_skip("needs a GPU")
def test_may_skip():
    pytest.skip("no GPU")

@pytest.mark.xfail(reason="known")
def test_is_known_to_fail():
    assert False
"""

WHOLE_FILE = 'import pytest\npytest.importorskip("a_library_nobody_has")\n'


@pytest.fixture
def outcome(tmp_path):
    """Run a test file under the repository's rules and return pytest's last line."""
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = may_skip(reason): as above\n")

    def run(source: str, ci: str) -> str:
        (tmp_path / "test_it.py").write_text(source)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
            env={**os.environ, "CI": ci},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )
        return done.stdout

    return run


def test_outside_ci_a_skip_is_a_skip(outcome):
    assert "1 passed, 2 skipped, 1 xfailed" in outcome(SUITE, "")


def test_in_ci_a_skip_is_a_failure_unless_it_was_announced(outcome):
    text = outcome(SUITE, "true")
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed" in text
    assert "skipped where nothing may be missing: Skipped: something is absent" in text


def test_in_ci_a_file_that_skips_itself_is_a_failure(outcome):
    assert "1 skipped" in outcome(WHOLE_FILE, "")
    text = outcome(WHOLE_FILE, "true")
    assert "1 error" in text
    assert "a_library_nobody_has" in text
