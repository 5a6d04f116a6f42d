"""What a bare install of the core brings: little, and nothing that fights with an engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_NBYTES = 20_000_000

pytestmark = pytest.mark.packaging


def run(*args: str | Path) -> str:
    """Run without this environment's own path, and return what was printed."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        args, env=env, capture_output=True, text=True, timeout=300, check=False, cwd="/"
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def disk_nbytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir())


class Installed:
    """A fresh virtual environment with nothing but the core, and what that added to it."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder)
        self.bin = folder / "bin"
        before, size = self._distributions(), disk_nbytes(folder)
        run(self.bin / "python", "-m", "pip", "install", "--quiet", "--no-compile", ROOT)
        self.added = self._distributions() - before
        self.nbytes = disk_nbytes(folder) - size

    def _distributions(self) -> set[str]:
        listed = run(self.bin / "python", "-m", "pip", "list", "--format=json")
        return {each["name"].lower() for each in json.loads(listed)}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("bare") / "venv")


def test_a_bare_install_adds_less_than_20_mb(bare):
    assert 100_000 < bare.nbytes < LIMIT_NBYTES


def test_a_bare_install_pulls_its_five_dependencies_and_no_tensor_library(bare):
    assert bare.added == {"kvlayer-core", "aiofiles", "click", "msgpack", "tenacity", "xxhash"}


def test_a_bare_install_has_its_types_and_its_program(bare):
    code = (
        "import kvlayer, kvlayer_backends, pathlib;"
        "print(all((pathlib.Path(p.__file__).parent / 'py.typed').is_file()"
        " for p in (kvlayer, kvlayer_backends)))"
    )
    assert run(bare.bin / "python", "-c", code).strip() == "True"
    report = json.loads(run(bare.bin / "kvlayer", "info", "--json"))
    assert report["versions"]["kvlayer-core"] == version("kvlayer-core")
    assert "torch" not in report["versions"]


def test_every_public_name_resolves_without_any_tensor_library(bare):
    run(bare.bin / "python", "-W", "error", "-c", "from kvlayer import *")


def test_every_built_in_plugin_loads_without_any_tensor_library(bare):
    code = (
        "from kvlayer.config.registry import BACKENDS, COMMANDS, POLICIES\n"
        "for registry in (BACKENDS, POLICIES, COMMANDS):\n"
        "    for name in registry.names(): registry.load(name)\n"
    )
    run(bare.bin / "python", "-W", "error", "-c", code)


def test_doctor_of_a_bare_install_misses_the_engines_torch_and_nothing_else(bare):
    done = subprocess.run(
        [bare.bin / "kvlayer", "doctor", "--json", "--size", "0"],
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd="/",
    )
    bad = [each for each in json.loads(done.stdout)["findings"] if each["status"] == "bad"]
    assert (done.returncode, [each["check"] for each in bad]) == (1, ["torch"])
