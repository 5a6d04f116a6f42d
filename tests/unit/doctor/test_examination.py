"""All checks together: on this machine, and on one that says nothing about itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hang import HANG

from kvlayer.doctor import place
from kvlayer.doctor.configured import Place
from kvlayer.doctor.examination import Examination
from kvlayer.doctor.finding import Finding, Status
from kvlayer.doctor.machine import Machine

if TYPE_CHECKING:
    from conftest import Build  # type: ignore[import-not-found]

CHECKS = {
    *("python", "cpus", "configuration", "memory", "cgroup-memory", "overcommit", "slab"),
    *("dev-shm", "memlock", "descriptors", "plugins", "torch", "gpu", "engines"),
    *("file-system", "directory", "o-direct", "hard-links", "flock", "file-times"),
    *("space", "releases", "inodes", "disk", "clock"),
}


def run(examination: Examination) -> tuple[list[Finding], list[str]]:
    said: list[str] = []
    return list(examination.run(said.append)), said


def test_every_check_is_made_and_says_what_why_and_what_to_do(tmp_path: Path) -> None:
    found, said = run(
        Examination(machine=Machine(), directories=[str(tmp_path)], probe_nbytes=4 << 20)
    )
    assert {finding.check for finding in found} == CHECKS
    for finding in found:
        assert finding.found and finding.why
        assert bool(finding.advice) == (finding.status in (Status.WARN, Status.BAD))
        json.dumps(finding.as_dict())
    assert len(said) == 2  # plugins and one disk take longer than a moment
    assert str(tmp_path) in said[1]
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_says_nothing_is_unknown_and_no_crash(
    machine: Build, tmp_path: Path
) -> None:
    found, _ = run(
        Examination(machine=machine(), directories=[str(tmp_path)], probe_nbytes=4 << 20)
    )
    assert {finding.check for finding in found} == CHECKS
    unknown = {finding.check for finding in found if finding.status is Status.UNKNOWN}
    assert unknown == {
        *("cpus", "memory", "cgroup-memory", "overcommit", "dev-shm", "memlock", "descriptors"),
        *("file-system", "space"),
    }


def test_places_of_the_configuration_and_of_the_caller_are_both_looked_at(tmp_path: Path) -> None:
    config = tmp_path / "kv.toml"
    config.write_text(
        'tokens_per_chunk = 64\n[[tiers]]\nurl = "cpu://?capacity=2GiB"\n'
        f'[[tiers]]\nurl = "file://{tmp_path}/a?capacity=1GiB&threads=100"\n'
    )
    found, said = run(
        Examination(machine=Machine(), config=config, directories=[f"{tmp_path}/b"], probe_nbytes=0)
    )
    paths = [f.detail["path"] for f in found if f.check == "directory"]
    assert paths == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert "disk" not in {finding.check for finding in found}  # a probe of 0 bytes
    assert len(said) == 1
    by_check = {finding.check: finding for finding in found}
    assert by_check["memory"].detail["host_nbytes"] == 2 << 30
    assert by_check["descriptors"].detail["need"] == 64 + 16 + 100 + 16 + 8
    sizes = {f.detail["object_nbytes"] for f in found if "object_nbytes" in f.detail}
    assert sizes <= {64 * 131_072}


def test_a_relative_directory_is_taken_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _ = run(Examination(machine=Machine(), directories=["kv"], probe_nbytes=0))
    (directory,) = [finding for finding in found if finding.check == "directory"]
    assert directory.detail["path"] == f"{tmp_path}/kv"


def test_the_page_lists_every_check_and_no_other() -> None:
    page = (Path(__file__).parents[3] / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", page.split("## What is looked at")[1], re.MULTILINE)
    assert sorted(rows) == sorted(CHECKS)


def test_a_directory_that_does_not_answer_is_one_finding_and_the_rest_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, other = tmp_path / "frozen", tmp_path / "other"
    frozen.mkdir()
    other.mkdir()
    thawed, real = threading.Event(), place._direct

    def hangs(asked: Place, scratch: str) -> Finding:
        if asked.path == str(frozen):
            thawed.wait(HANG)
        return real(asked, scratch)

    monkeypatch.setattr(place, "_direct", hangs)
    examination = Examination(
        machine=Machine(), directories=[str(frozen)], probe_nbytes=0, patience_seconds=0.01
    )
    silent = [each for each in run(examination)[0] if "does not answer" in each.found]
    patient = replace(examination, directories=[str(other)], patience_seconds=HANG)
    found, _ = run(patient)
    thawed.set()
    assert [(each.status, each.detail["path"]) for each in silent] == [(Status.BAD, str(frozen))]
    assert {finding.check for finding in found} == CHECKS - {"disk"}


def test_the_interpreter_ends_beside_a_disk_that_never_answers(tmp_path: Path) -> None:
    program = (
        "import os, sys, threading\n"
        "from kvlayer.runtime import threads\n"
        "from kvlayer.doctor.configured import Place\n"
        "from kvlayer.doctor.examination import Examination\n"
        "from kvlayer.doctor.machine import Machine\n"
        "threads._EXIT_SECONDS = 0.01\n"
        "os.pwritev = lambda *_: threading.Event().wait()\n"
        "looked = Examination(machine=Machine(), directories=sys.argv[1:], patience_seconds=2)\n"
        "print(*[each.found for each in looked.run(lambda _: None)], sep='\\n')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "does not answer" in ended.stdout
