"""Rules for every test of the repository, the core's and the plugins'.

In CI (``CI`` is set) a skip is a failure: there everything a test needs is installed, so a skip
means that something which should be tested silently is not. A test that may skip even there says
so and why: ``@pytest.mark.may_skip("needs a GPU")``.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
from hypothesis import settings

# Shared machines stall for longer than any deadline worth setting; slowness is measured elsewhere.
settings.register_profile("kvlayer", deadline=None)
# In CI the same examples every time: a red run must be red again when it is looked at.
settings.register_profile("ci", settings.get_profile("kvlayer"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "kvlayer")

N = TypeVar("N", int, float)


class Dose(Protocol):
    """How much of something a test does."""

    def __call__(self, short: N, full: N) -> N:
        """``full`` in a campaign, else ``short``: seeds, kills, seconds."""
        ...


class Figures(Protocol):
    """Where a test writes what it counted."""

    def __call__(self, name: str, **values: float | str | bool) -> None:
        """Add a row to the campaign's report; ``name`` is ``part.what``."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="full doses in place of short ones")
    parser.addoption("--seed", type=int, help="play only this seed of each simulation")
    parser.addoption("--figures", type=Path, help="write the rows of figures to this JSON file")


_ROWS = pytest.StashKey[list[dict[str, float | str | bool]]]()
_LONG_SECONDS = 3600


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind it
        signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of tests inherit it
    counts = config.getoption("--campaign") or config.getoption("--figures")
    if counts and getattr(config.option, "numprocesses", None):  # of pytest-xdist
        raise pytest.UsageError(
            "--campaign, --figures: figures are counted in one process, found several\n"
            "nox -s campaign uses one; so does -n0"
        )
    limit = float(config.getini("faulthandler_timeout") or 0)
    if config.getoption("--campaign") and 0 < limit < _LONG_SECONDS:
        raise pytest.UsageError(
            f"--campaign: a test with its full dose takes longer than faulthandler_timeout, and "
            f"after {limit:.0f} seconds that ends the run\n"
            "nox -s campaign sets it; so does -o faulthandler_timeout=14400"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is left to a campaign is no part of another run, whose last line counts it."""
    if not config.getoption("--campaign"):
        left_out = [item for item in items if item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("campaign")]


@pytest.fixture(scope="session")
def dose(pytestconfig: pytest.Config) -> Dose:
    """How much to do: see :class:`Dose`."""
    full_wanted = bool(pytestconfig.getoption("--campaign"))

    def choose(short: N, full: N) -> N:
        return full if full_wanted else short

    return choose


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """Where to write what was counted: see :class:`Figures`."""

    def add(name: str, **values: float | str | bool) -> None:
        pytestconfig.stash[_ROWS].append({"name": name, **values})

    return add


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show the figures, and write them where ``--figures`` says."""
    rows = config.stash[_ROWS]
    if rows and config.getoption("--campaign"):
        terminalreporter.section("figures")
        for row in rows:
            values = ", ".join(f"{key} {value}" for key, value in row.items() if key != "name")
            terminalreporter.line(f"{row['name']}: {values}")
    path: Path | None = config.getoption("--figures")
    if path is not None:
        outcomes = {
            name: len([each for each in terminalreporter.stats.get(name, ()) if each.when])
            for name in ("passed", "failed", "skipped", "error")
        }
        skipped = [str(each.longrepr) for each in terminalreporter.stats.get("skipped", ())]
        failures = [
            f"{each.nodeid}: {_reason(each)}"
            for name in ("failed", "error")
            for each in terminalreporter.stats.get(name, ())
        ]
        found = {"rows": rows, "outcomes": outcomes, "skipped": skipped, "failures": failures}
        path.write_text(json.dumps(found, indent=2) + "\n")


def _reason(failed: pytest.TestReport | pytest.CollectReport) -> str:
    """The exception and what it says: of a simulation, the seed and how to play it again."""
    crash = getattr(failed.longrepr, "reprcrash", None)
    return str(failed.longrepr if crash is None else crash.message)


def _condemn(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = (
        f"skipped where nothing may be missing: {reason}\n"
        "install what it needs, or mark it may_skip with the reason it cannot be had"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected = hasattr(report, "wasxfail") or item.get_closest_marker("may_skip") is not None
    if report.skipped and os.environ.get("CI") and not expected:
        _condemn(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and os.environ.get("CI"):  # a whole file: there is no mark that excuses it
        _condemn(report)
    return report
