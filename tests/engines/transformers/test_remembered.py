"""Verdicts on disk are a hint: anybody may damage them, nobody else can give them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvlayer_transformers.proof import Verdict
from kvlayer_transformers.remembered import Remembered

GOOD = Verdict(None, "counts columns: \u00e9\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kvlayer"


def file_of(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_verdict_is_read_by_the_next_process(folder: Path) -> None:
    Remembered(folder).put("a", GOOD)
    Remembered(folder).put("b", Verdict())
    assert Remembered(folder).get("a") == GOOD
    assert Remembered(folder).get("b") == Verdict()
    assert Remembered(folder).get("c") is None
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-20],
        lambda raw: raw.replace(b"counts", b"skates"),
        lambda raw: b"\xff" + raw,
        lambda _: b"",
        lambda _: b"00000000 [1, 2, 3]\n",
        lambda _: b"b45ad3b8 {}\n",
        lambda _: b"\0" * 3_000_000,
    ],
)
def test_a_line_that_does_not_check_is_not_there(folder: Path, damage: object) -> None:
    assert callable(damage)
    Remembered(folder).put("a", GOOD)
    file_of(folder).write_bytes(damage(file_of(folder).read_bytes()))
    assert Remembered(folder).get("a") is None
    Remembered(folder).put("b", Verdict())
    assert Remembered(folder).get("b") == Verdict()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_may_write_is_not_believed(folder: Path, what: str) -> None:
    Remembered(folder).put("a", GOOD)
    (file_of(folder) if what == "file" else folder).chmod(0o777)
    assert Remembered(folder).get("a") is None


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.mkfifo(folder / "verdicts.jsonl")
    assert Remembered(folder).get("a") is None


def test_a_folder_that_cannot_be_written_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    remembered = Remembered(tmp_path / "file")
    remembered.put("a", GOOD)
    assert remembered.get("a") is None


def test_the_file_does_not_grow_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlayer_transformers.remembered._MAX_ENTRIES", 3)
    for key in "abcde":
        Remembered(folder).put(key, GOOD)
    assert [key for key in "abcde" if Remembered(folder).get(key)] == ["c", "d", "e"]
