"""What every test of the core starts from, and which of them run where there is no torch."""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvlayer.config.source import PREFIX


@pytest.fixture(autouse=True)
def no_configuration_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own ``KVLAYER_`` variables must not decide what a test sees."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


# -- where only the core is installed (nox -s tests-core) ------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--core",
        action="store_true",
        help="collect only the files whose imports, and their helpers', are all installed",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """One rule: with ``--core``, a file that imports what is not installed is no part of the run.

    So is a folder whose conftest does. Imports inside functions count, too. Without ``--core`` a
    missing package is an error, as ever.
    """
    if not config.getoption("--core", False):
        return None
    file = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    if file.suffix != ".py" or not file.exists():
        return None
    helpers = [config.rootpath / folder for folder in config.getini("pythonpath")]
    return True if _missing(file, helpers) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The rest of the rule: what is marked as needing torch is left out where there is none."""
    if config.getoption("--core", False) and find_spec("torch") is None:
        left_out = [item for item in items if item.get_closest_marker("torch")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("torch")]


def _missing(file: Path, helpers: Sequence[Path]) -> set[str]:
    """Packages that ``file``, or a helper that it imports, would not find."""
    missing: set[str] = set()
    files, known = [file], {file}
    for each in files:  # it grows meanwhile
        for name in _imported(each):
            places = [folder / end for folder in helpers for end in (f"{name}.py", name)]
            helper = next((place for place in places if place.exists()), None)
            if helper is None:
                missing |= set() if _is_installed(name) else {name}
            elif helper not in known and helper.is_file():
                known.add(helper)
                files.append(helper)
    return missing


@cache
def _is_installed(name: str) -> bool:
    return find_spec(name) is not None


@cache
def _imported(file: Path) -> frozenset[str]:
    """Top-level packages of every import in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return frozenset(names)
