"""``kvlayer demo`` end to end with a small model, and what it says when a promise is broken."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvlayer_transformers.demo import demo, play
from kvlayer_transformers.demo.acts.crash import Crash
from kvlayer_transformers.demo.acts.damage import Damage, Damages
from kvlayer_transformers.demo.acts.speed import Speed
from kvlayer_transformers.demo.asking import Answer
from kvlayer_transformers.demo.console import Console
from kvlayer_transformers.demo.report import Report

ASKED = {"prompt_tokens", "cold_ttft_s", "warm_ttft_s", "restart_ttft_s", "outputs_identical",
         "corrupt_cause", "truncated_cause"}  # fmt: skip


@pytest.fixture(scope="module")
def played(
    tiny_gguf: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Path]:
    """All three acts, processes and all, with a random model."""
    place = tmp_path_factory.mktemp("demo")
    return play.play(place / "kv", source=tiny_gguf[0], folder=place / "model"), place


def test_every_promise_is_kept(played: tuple[Report, Path]) -> None:
    assert played[0].broken() == []


def test_the_figures_are_complete_and_are_json(played: tuple[Report, Path]) -> None:
    figures = json.loads(json.dumps(played[0].figures()))
    assert figures.keys() >= ASKED
    assert figures["outputs_identical"] is True
    assert (figures["corrupt_cause"], figures["truncated_cause"]) == ("corrupt", "truncated")
    assert figures["prompt_tokens"] > figures["document_tokens"] == 2560


def test_the_process_was_killed_in_the_middle_of_a_store(played: tuple[Report, Path]) -> None:
    crash = played[0].crash
    assert crash.signal == "SIGKILL"
    assert 0 < crash.written < crash.expected


def test_answers_are_not_one_token_over_and_over(played: tuple[Report, Path]) -> None:
    speed = played[0].speed
    assert all(len(set(answer.ids)) > 4 for answer in speed.cold)
    assert len({tuple(answer.ids) for answer in speed.cold}) == len(speed.cold)


def test_damaged_objects_are_kept_as_evidence(played: tuple[Report, Path]) -> None:
    assert len(list((played[1] / "kv" / "v2" / "quarantine").iterdir())) >= 2


def test_the_table_and_what_explain_says_are_shown(played: tuple[Report, Path]) -> None:
    text = played[0].text()
    for word in ("cold", "host memory", "SIGKILL", "byte flipped", "corrupt", "truncated"):
        assert word in text
    assert "NOT KEPT" not in text


def example_answer(
    loaded: int = 0, ids: tuple[int, ...] = (4, 5, 6), seconds: float = 8.0
) -> Answer:
    return Answer("Why?", "Because.", list(ids), seconds, 2570, loaded)


@pytest.fixture
def report() -> Report:
    """A run in which every promise was kept."""
    cold, warm = example_answer(), example_answer(2560, seconds=0.5)
    corrupt = Damage("one byte", "corrupt", "512 of 2560", example_answer(512))
    truncated = Damage("cut", "truncated", "1024 of 2560", example_answer(1024))
    crash = Crash("SIGKILL", 3, 6, 1, cold, [warm], example_answer(512))
    damages = Damages(corrupt, truncated, 2560, "2560 of 2560")
    return Report(Speed([cold], [warm], 1), crash, damages, 2560, 1536)


def run(report: Report, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(play, "play", lambda _: report)
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # put back what the command sets
    return CliRunner().invoke(demo, list(arguments))


def test_kept_promises_exit_with_zero(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(report, monkeypatch)
    assert result.exit_code == 0
    assert "NOT KEPT" not in result.output


other = example_answer(2560, ids=(4, 5, 7))
BREAKAGES: dict[str, Callable[[Report], Report]] = {
    "another answer when warm": lambda r: dataclasses.replace(
        r, speed=dataclasses.replace(r.speed, warm=[other])
    ),
    "another answer after the kill": lambda r: dataclasses.replace(
        r, crash=dataclasses.replace(r.crash, first=[other])
    ),
    "another answer about the second document": lambda r: dataclasses.replace(
        r, crash=dataclasses.replace(r.crash, second=other)
    ),
    "nothing reused when warm": lambda r: dataclasses.replace(
        r, speed=dataclasses.replace(r.speed, warm=r.speed.cold)
    ),
    "the wrong cause": lambda r: dataclasses.replace(
        r,
        damages=dataclasses.replace(
            r.damages, corrupt=dataclasses.replace(r.damages.corrupt, cause="never-stored")
        ),
    ),
    "damage that was not noticed": lambda r: dataclasses.replace(
        r,
        damages=dataclasses.replace(
            r.damages, truncated=dataclasses.replace(r.damages.truncated, answer=r.speed.warm[0])
        ),
    ),
    "a store that did not heal": lambda r: dataclasses.replace(
        r, damages=dataclasses.replace(r.damages, healed_tokens=1024)
    ),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_a_broken_promise_is_named_and_exits_with_one(
    report: Report, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    result = run(BREAKAGES[what](report), monkeypatch)
    assert result.exit_code == 1
    assert "NOT KEPT" in result.output


def test_slowness_is_reported_but_never_judged(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [dataclasses.replace(answer, ttft_s=7.0) for answer in report.speed.warm]
    report = dataclasses.replace(report, speed=dataclasses.replace(report.speed, warm=slow))
    result = run(report, monkeypatch)
    assert result.exit_code == 0
    assert "never judged" in result.output


def test_json_is_written_even_when_a_promise_is_broken(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = BREAKAGES["another answer when warm"](report)
    result = run(broken, monkeypatch, "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert result.exit_code == 1
    assert figures["outputs_identical"] is False
    assert figures.keys() >= ASKED | {"wall_s"}


def test_a_kept_directory_is_named(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert str(tmp_path) in run(report, monkeypatch, "--dir", str(tmp_path)).output


def test_the_command_joins_the_program() -> None:
    (entry,) = entry_points(group="kvlayer.commands", name="demo")
    assert entry.value == "kvlayer_transformers.demo:demo"


def test_listing_the_command_imports_no_torch() -> None:
    code = (
        "import sys, kvlayer_transformers, kvlayer_transformers.demo\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_replaces_its_line_on_a_terminal_and_is_silent_in_a_short_log() -> None:
    for stream, shown in ((Terminal(), True), (StringIO(), False)):
        console = Console(stream)
        with console.stage("computing"):
            console.tokens(512, 2560)
        written = stream.getvalue()
        assert ("512 of 2,560 tokens" in written) is shown
        assert ("\r" in written) is shown
        assert written.rstrip("\n").endswith(" s")
