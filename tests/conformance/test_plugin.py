"""The pytest plugin, in runs of pytest of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUITE = """
from kvlayer.testing import BackendSuite

class TestGiven(BackendSuite):
    large_nbytes = 1 << 20
    many_objects = 50
    many_keys = 100
"""


def pytest_of(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_given.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
    )


def test_a_backend_from_the_command_line_is_looked_at(tmp_path: Path) -> None:
    done = pytest_of(
        tmp_path, SUITE, "-v", "-k", "miss_is or restart", "--kvlayer-backend", "cpu://"
    )
    assert "1 passed" in done.stdout, done.stdout
    assert "objects do not outlive the process (Capability.PERSISTENT)" in done.stdout
    assert "skipped" not in done.stdout


def test_a_suite_without_a_backend_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    done = pytest_of(tmp_path, SUITE)
    assert done.returncode == 4, done.stdout
    assert "TestGiven has no backend to look at" in done.stderr
    assert "--kvlayer-backend" in done.stderr


def test_a_broken_promise_is_a_failed_test_that_quotes_the_contract(tmp_path: Path) -> None:
    source = """
from kvlayer.config.registry import BACKENDS
from kvlayer.testing import BackendSuite
from kvlayer_backends.cpu import CpuBackend

class Liar(CpuBackend):
    async def contains(self, keys, /):
        return [None for _ in keys]

class TestLiar(BackendSuite):
    backends = BACKENDS.extended({"liar": Liar})
    url = "liar://"
"""
    done = pytest_of(tmp_path, source, "-k", "exact_size")
    assert "1 failed" in done.stdout, done.stdout
    assert "expected contains() to be [4096, " in done.stdout
    assert (
        'the contract: "Encoded size in bytes of each object, None for one that is absent."'
        in done.stdout
    )
    # The promise's own lines, and nothing of the kit's threads and loops before them.
    assert ">       expect(found, [count * PAGE for count in pages]" in done.stdout
    assert "bounded.py" not in done.stdout


def test_an_exception_is_shown_from_the_promise_down_to_the_backend(tmp_path: Path) -> None:
    source = """
from kvlayer.config.registry import BACKENDS
from kvlayer.testing import BackendSuite
from kvlayer_backends.cpu import CpuBackend

class Liar(CpuBackend):
    async def contains(self, keys, /):
        return len(keys) / 0

class TestLiar(BackendSuite):
    backends = BACKENDS.extended({"liar": Liar})
    url = "liar://"
"""
    done = pytest_of(tmp_path, source, "-k", "exact_size")
    assert "ZeroDivisionError" in done.stdout
    assert ">       return len(keys) / 0" in done.stdout
    assert "clearing up after it failed: ZeroDivisionError" in done.stdout
    assert "bounded.py" not in done.stdout


def test_promises_run_whatever_an_asyncio_plugin_would_do(tmp_path: Path) -> None:
    url = "file://{directory}"
    done = pytest_of(
        tmp_path, SUITE, "-k", "a_restart", "--kvlayer-backend", url, "--asyncio-mode=auto"
    )
    assert "2 passed" in done.stdout, done.stdout


def test_the_fixtures_run_coroutines_and_report_hangs(tmp_path: Path) -> None:
    source = """
import asyncio
import pytest
from kvlayer.config.registry import open_backend
from kvlayer.testing.promise import Hung

def test_a_coroutine_runs(kvlayer_run, kvlayer_url):
    async def work():
        async with open_backend(kvlayer_url) as backend:
            return await backend.contains([])
    assert kvlayer_run(work) == []

def test_a_hang_is_reported(kvlayer_run):
    async def work():
        await asyncio.Event().wait()
    with pytest.raises(Hung, match="await asyncio.Event"):
        kvlayer_run(work, 0.2)
"""
    done = pytest_of(tmp_path, source)
    assert "2 passed" in done.stdout, done.stdout


def test_the_plugin_imports_nothing_until_a_suite_is_collected(tmp_path: Path) -> None:
    source = """
import sys

def test_nothing_is_imported():
    found = [name for name in sys.modules if name.startswith("kvlayer.")]
    assert sorted(found) == ["kvlayer.testing", "kvlayer.testing.plugin"]
"""
    done = pytest_of(tmp_path, source)
    assert "1 passed" in done.stdout, done.stdout
