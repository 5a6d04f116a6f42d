"""Rules for every test of the repository, the core's and the plugins'.

In CI (``CI`` is set) a skip is a failure: there everything a test needs is installed, so a skip
means that something which should be tested silently is not. A test that may skip even there says
so and why: ``@pytest.mark.may_skip("needs a GPU")``.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# Shared machines stall for longer than any deadline worth setting; slowness is measured elsewhere.
settings.register_profile("kvlayer", deadline=None)
# In CI the same examples every time: a red run must be red again when it is looked at.
settings.register_profile("ci", settings.get_profile("kvlayer"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "kvlayer")


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
