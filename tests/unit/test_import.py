"""Importing kvlayer is cheap, imports no tensor library, and yields every public name."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvlayer

HEAVY = ("torch", "numpy", "cupy", "transformers", "vllm", "sglang")
MOST_MODULES = 60  # a millisecond or two each

EVERY_MODULE = """
import importlib, pkgutil, kvlayer, kvlayer_backends
for package in (kvlayer, kvlayer_backends):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__") and not module.name.startswith("kvlayer.testing"):
            importlib.import_module(module.name)
"""


def python(code: str) -> str:
    """Run ``code`` in a fresh interpreter that sees what this one sees."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_after(code: str) -> list[str]:
    listed = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(python(listed).splitlines()[-1])
    return [name for name in HEAVY if name in loaded]


def test_import_kvlayer_imports_few_modules():
    count = (
        "import sys; before = {*sys.modules}; import kvlayer; print(len({*sys.modules} - before))"
    )
    assert 0 < int(python(count)) <= MOST_MODULES


def test_import_kvlayer_imports_none_of_its_modules():
    code = "import kvlayer, sys; print([m for m in sys.modules if m.startswith('kvlayer')])"
    assert python(code).strip() == "['kvlayer']"


@pytest.mark.parametrize(
    "code",
    ["import kvlayer", "from kvlayer import *", EVERY_MODULE],
    ids=["import", "every-name", "every-module"],
)
def test_no_tensor_library_is_imported(code):
    assert heavy_after(code) == []


def test_the_tensor_libraries_that_must_not_be_imported_are_there_to_be_imported():
    assert "numpy" in heavy_after("import numpy")


@pytest.mark.parametrize("name", kvlayer.__all__)
def test_every_public_name_resolves(name):
    assert getattr(kvlayer, name) is not None
    assert name in dir(kvlayer)


def test_a_public_name_is_the_object_of_its_module():
    from kvlayer.config.model import CacheConfig

    assert kvlayer.CacheConfig is CacheConfig


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Cash'"):
        _ = kvlayer.Cash


def test_type_checkers_see_the_names_that_exist_at_run_time():
    source = Path(kvlayer.__file__).read_text(encoding="utf-8")
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {(node.module, each.name) for node in imports for each in node.names}
    assert seen == {(home, name) for name, home in kvlayer._HOME_OF.items()}
    assert {name for _, name in seen} | {"__version__"} == set(kvlayer.__all__)


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert kvlayer.__version__ == version("kvlayer-core")


PURE = re.compile(r"\bPure\b(?! but)|No I/O\.")


def test_every_file_that_calls_itself_pure_is_under_the_contract():
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    (contract,) = (
        each
        for each in settings["tool"]["importlinter"]["contracts"]
        if each["name"].startswith("Decisions are sans-IO")
    )
    held = contract["source_modules"]
    for path in [*root.glob("src/**/*.py")]:
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        if PURE.search(said):
            module = ".".join(path.relative_to(root / "src").with_suffix("").parts)
            assert any(f"{module}.".startswith(f"{each}.") for each in held), module


PLANNER = {"planner.py", "tables.py", "lookup_planner.py", "survey.py"}


def test_only_the_planner_takes_the_planners_lock() -> None:
    root = Path(kvlayer.__file__).parent
    taking = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"planner\.lock\b|with self\.lock\b", path.read_text())
        and path.relative_to(root).parts[0] != "testing"
    }
    assert taking == {f"tier/planner/{name}" for name in PLANNER}
