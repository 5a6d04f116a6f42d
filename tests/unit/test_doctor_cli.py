"""``kvlayer doctor``: a table for people, JSON for machines, exit codes that mean something."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvlayer.cli.main import program
from kvlayer.doctor.examination import Examination
from kvlayer.doctor.finding import Check, Finding

CHECK = Check("disk", "it matters " + "because of many reasons " * 8)


@pytest.fixture
def doctor() -> Callable[..., Result]:
    return lambda *args: CliRunner().invoke(program, ["doctor", *args], prog_name="kvlayer")


def finds(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    monkeypatch.setattr(Examination, "run", lambda *_: iter(findings))


@pytest.mark.parametrize(
    ("findings", "code", "summary"),
    [
        ([CHECK.ok("good")], 0, "1 fine, 0 warnings; everything will work"),
        (
            [CHECK.ok("good"), CHECK.warn("slow", "buy"), CHECK.unknown("silent")],
            0,
            "1 fine, 1 warning, 1 unknown; everything will work",
        ),
        (
            [CHECK.warn("slow", "buy"), CHECK.bad("dead", "replace")],
            1,
            "0 fine, 1 warning, 1 that will not work",
        ),
    ],
)
def test_only_what_will_not_work_counts_for_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    doctor: Callable[..., Result],
    findings: list[Finding],
    code: int,
    summary: str,
) -> None:
    finds(monkeypatch, *findings)
    people, machines = doctor(), doctor("--json")
    assert (people.exit_code, machines.exit_code) == (code, code)
    assert people.stdout.splitlines()[-1] == summary
    report = json.loads(machines.stdout)
    assert report["ok"] == (code == 0)
    assert [each["status"] for each in report["findings"]] == [f.status for f in findings]


def test_people_are_told_why_and_what_to_do_about_what_is_not_fine(
    monkeypatch: pytest.MonkeyPatch, doctor: Callable[..., Result]
) -> None:
    finds(monkeypatch, CHECK.ok("good"), CHECK.warn("slow " * 30, "buy another"))
    lines = doctor().stdout.splitlines()
    assert lines[0] == "ok       disk           good"
    assert lines[1].startswith("warn     disk           slow slow")
    assert sum("why: it matters" in line for line in lines) == 1
    assert sum(line.strip() == "do:  buy another" for line in lines) == 1
    assert max(len(line) for line in lines) <= 100
    assert all(line.startswith(" " * 24) for line in lines[2:-2])


def test_machines_are_told_everything(
    monkeypatch: pytest.MonkeyPatch, doctor: Callable[..., Result]
) -> None:
    finds(monkeypatch, CHECK.warn("slow", "buy", read_bytes_per_second=1.5))
    (finding,) = json.loads(doctor("--json").stdout)["findings"]
    assert finding == {
        "check": "disk",
        "status": "warn",
        "found": "slow",
        "why": CHECK.why,
        "do": "buy",
        "detail": {"read_bytes_per_second": 1.5},
    }


@pytest.mark.may_skip("needs torch, which doctor asks for")
@pytest.mark.skipif(find_spec("torch") is None, reason="no torch")
def test_a_real_examination_reports_progress_beside_the_answer(
    doctor: Callable[..., Result], tmp_path: Path
) -> None:
    result = doctor("--json", "--dir", str(tmp_path), "--size", "4MiB", "--prefill-rate", "1")
    report = json.loads(result.stdout)
    assert result.exit_code == 0, result.stdout
    assert f"writing and reading 4 MiB in {tmp_path}" in result.stderr
    (disk,) = [each for each in report["findings"] if each["check"] == "disk"]
    assert disk["detail"]["measured_nbytes"] == 4 << 20
    assert disk["detail"]["prefill_tokens_per_second"] == 1.0


def test_a_wrong_configuration_is_an_answer(
    doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLAYER_TOKENS_PER_CHNK", "1")
    result = doctor("--size", "0")
    assert result.exit_code == 1
    assert "bad      configuration" in result.stdout
    assert "KVLAYER_TOKENS_PER_CHUNK" in result.stdout  # the nearest one there is
    assert "clock" in result.stdout  # the rest was looked at


def test_a_hard_wish_is_weighed_against_the_machine(
    doctor: Callable[..., Result], tmp_path: Path
) -> None:
    config = tmp_path / "kv.toml"
    config.write_text('[[tiers]]\nurl = "cpu://?capacity=900TiB"\n')
    result = doctor("--size", "0", "--config", str(config))
    assert result.exit_code == 1
    assert "bad      memory" in result.stdout
    assert "900 TiB" in result.stdout


@pytest.mark.parametrize(
    "args",
    [("--size", "many"), ("--prefill-rate", "0"), ("--bytes-per-token", "0"), ("--nonsense",)],
)
def test_a_wrong_command_line_exits_with_2(
    doctor: Callable[..., Result], args: tuple[str, ...]
) -> None:
    assert doctor(*args).exit_code == 2
