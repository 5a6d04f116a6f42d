"""Real processes on one directory, one codes its objects, one lacks the codec, one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from codecs_of_tests import DOUBLES, SHRINKS, install
from coded_process import CHUNK, TOKENS
from hang import HANG

from kvlayer.tier.transfer.encodings import Coding, Raw

SUPPORT = Path(__file__).parents[2] / "support"
CODINGS: dict[str, Coding] = {"doubles": DOUBLES, "shrinks": SHRINKS}
OBJECTS = TOKENS // CHUNK + 1


class Process:
    def __init__(self, directory: Path, codec: str, deeds: str, site: Path | None) -> None:
        self._said: str | None = None
        path = [*map(str, filter(None, [site])), str(SUPPORT), *filter(None, sys.path)]
        self._popen = subprocess.Popen(
            [sys.executable, str(SUPPORT / "coded_process.py"), str(directory), codec, deeds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.end()

    def told(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        assert line, self.end()
        found: dict[str, Any] = json.loads(line)
        return found

    def kill(self) -> None:
        self._popen.kill()

    def end(self) -> str:
        """What it complained of. Whatever it waits for, it waits no longer."""
        if self._said is None:
            _, self._said = self._popen.communicate(timeout=HANG)
        return self._said


def files(directory: Path, coding: Coding) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (directory / "v2").rglob(f"*{coding.encoding}")}


@pytest.mark.parametrize("codec", CODINGS)
def test_what_one_process_coded_serves_the_next_and_is_left_alone_by_one_that_lacks_the_codec(
    tmp_path: Path, codec: str
) -> None:
    directory, site, coding = tmp_path / "kv", tmp_path / "site", CODINGS[codec]
    install(site)
    lacking = dict.fromkeys([str(coding.encoding)], OBJECTS)
    with Process(directory, codec, "sw", site) as writer:
        stored = writer.told()
        assert (stored["stored"], stored["failed"]) == (OBJECTS, 0)
        before = files(directory, coding)
        assert len(before) == OBJECTS and not files(directory, Raw())
        with Process(directory, "", "lsl", None) as beside:  # while the writer is open
            missed = beside.told()
            assert missed["tokens"] == 0 and missed["foreign"] == lacking
            assert beside.told()["stored"] == OBJECTS
            assert beside.told()["digest"] == stored["digest"]
        writer.kill()  # it was to wait for a line: nothing of it is closed
    assert files(directory, coding) == before and len(files(directory, Raw())) == OBJECTS
    for path in files(directory, Raw()):
        path.unlink()
    with Process(directory, "", "l", None) as after:
        assert after.told()["foreign"] == lacking
    with Process(directory, codec, "l", site) as reader:
        loaded = reader.told()
    assert (loaded["tokens"], loaded["digest"]) == (TOKENS, stored["digest"])
    assert loaded["foreign"] == {} and files(directory, coding) == before
    assert not [*(directory / "v2").rglob("quarantine/*")]


def test_a_process_that_is_told_of_a_codec_it_lacks_says_so(tmp_path: Path) -> None:
    with Process(tmp_path / "kv", "doubles", "s", None) as process:
        said = process.end()
    assert "no codec is called 'doubles'" in said
    assert not (tmp_path / "kv").exists()
