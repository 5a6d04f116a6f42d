"""The pytest plugin: what does not apply is left out, and a backend may come from the command line.

Loaded into every run of pytest where kvlayer is installed, so it imports nothing until a suite is
collected.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from kvlayer.testing.suite import Suite

__all__ = ["kvlayer_run", "kvlayer_url"]

T = TypeVar("T")

_LEFT_OUT = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("kvlayer").addoption(
        "--kvlayer-backend",
        metavar="URL",
        help="the backend of every BackendSuite that names none; {directory} is a fresh folder",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give suites without a backend theirs, and leave out promises that do not apply."""
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    reasons: list[tuple[str, str]] = []
    for item in items:
        declared = getattr(getattr(item, "function", None), "promise", None)
        cls: type[Suite] | None = getattr(item, "cls", None)
        if declared is None or cls is None:
            kept.append(item)
            continue
        _place(cls, config.getoption("--kvlayer-backend"))
        why = _why_not(cls, declared)
        if why is None:
            kept.append(item)
        else:
            left_out.append(item)
            reasons.append((item.nodeid, why))
    config.stash[_LEFT_OUT] = reasons
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _place(cls: type[Suite], url: str | None) -> None:
    from kvlayer.testing.suites.place import BackendPlace

    is_nowhere = issubclass(cls, BackendPlace) and not cls.url and cls.build is BackendPlace.build
    if is_nowhere and url is not None:
        cls.url = url  # type: ignore[attr-defined]  # issubclass said so


def _why_not(cls: type[Suite], declared: Any) -> str | None:
    from kvlayer.errors import KVLayerError

    try:
        return cls().why_not(declared)
    except KVLayerError as exc:
        raise pytest.UsageError(f"{cls.__name__}: {exc}\nhint: {exc.hint}") from exc


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """With ``-v``: which promises were left out, and why."""
    reasons = config.stash.get(_LEFT_OUT, None)
    if reasons and config.get_verbosity() > 0:
        terminalreporter.section("promises that do not apply")
        for nodeid, why in reasons:
            terminalreporter.line(f"{nodeid}: {why}")


@pytest.fixture
def kvlayer_url(pytestconfig: pytest.Config, tmp_path: Path) -> str:
    """The URL of ``--kvlayer-backend``, ``{directory}`` being ``tmp_path``; by default files."""
    url: str = pytestconfig.getoption("--kvlayer-backend") or "file://{directory}"
    return url.replace("{directory}", str(tmp_path))


@pytest.fixture
def kvlayer_run() -> Callable[..., Any]:
    """``kvlayer_run(work, limit=60.0)`` runs a coroutine function on a loop of its own.

    Whatever the mode of an asyncio plugin. What takes longer than ``limit`` seconds fails with the
    stacks of what still waits.
    """
    from kvlayer.testing.bounded import run_bounded, seconds

    def run(work: Callable[[], Coroutine[Any, Any, T]], limit: float = 60.0) -> T:
        __tracebackhide__ = True
        return run_bounded(work, seconds(limit))

    return run
