"""The speed of a disk is measured for real, leaves nothing, and is put beside recomputing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hang import HANG

from kvlayer.doctor import disk as module
from kvlayer.doctor.configured import Place
from kvlayer.doctor.disk import Speed, measure, speed
from kvlayer.doctor.finding import Status
from kvlayer.doctor.machine import Machine, Space

if TYPE_CHECKING:
    from conftest import Build  # type: ignore[import-not-found]

MIB = 1 << 20


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of which one token of 131,072 bytes is read 5,000 times a second."""
    found = Speed(read=5_000 * 131_072.0, write=1e9, nbytes=256 * MIB, is_direct=True)
    monkeypatch.setattr(module, "measure", lambda *_, **__: found)


@pytest.mark.parametrize("direct", [True, False])
def test_what_was_asked_for_is_written_and_read_and_nothing_is_left(
    tmp_path: Path, direct: bool
) -> None:
    found = measure(str(tmp_path), 24 * MIB, threads=3, direct=direct)
    assert found.nbytes == 24 * MIB
    assert found.read > 0 and found.write > 0
    if not direct:
        assert not found.is_direct
    assert list(tmp_path.iterdir()) == []


def test_a_size_is_rounded_up_to_blocks(tmp_path: Path) -> None:
    assert measure(str(tmp_path), 1, threads=8).nbytes == 4 * MIB


def test_time_runs_out_before_the_disk_is_full(tmp_path: Path) -> None:
    found = measure(str(tmp_path), 1 << 50, threads=2, seconds=0.0)
    assert 4 * MIB <= found.nbytes <= 8 * MIB


def test_the_file_has_no_name_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = os.pwritev

    def look(fd: int, buffers: list[memoryview], offset: int) -> int:
        if memoryview(buffers[0]).nbytes > MIB:  # not the page that tries O_DIRECT
            seen.append([entry.name for entry in tmp_path.iterdir()])
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", look)
    measure(str(tmp_path), 8 * MIB, threads=1)
    assert seen == [[], []]


def test_a_disk_that_reads_something_else_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, _: real(fd, buffers, 0))
    with pytest.raises(OSError, match="not what was written"):
        measure(str(tmp_path), 8 * MIB, threads=1, direct=False)


def test_a_disk_that_fills_up_is_said_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    found = speed(Machine(), Place(str(tmp_path), direct="off"), 8 * MIB)
    assert found.status is Status.UNKNOWN
    assert "No space left" in found.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    ("rate", "token", "expected"),
    [
        (None, 131_072, Status.OK),
        (4_999.0, 131_072, Status.OK),
        (5_001.0, 131_072, Status.WARN),
        (9_999.0, 65_536, Status.OK),  # half the bytes, twice the tokens
        (10_001.0, 65_536, Status.WARN),
    ],
)
def test_loading_pays_where_the_engine_is_slower_than_the_disk(
    tmp_path: Path, rate: float | None, token: int, expected: Status
) -> None:
    place = Place(str(tmp_path))
    found = speed(Machine(), place, MIB, token_nbytes=token, prefill_rate=rate)
    assert found.status is expected
    assert found.detail["break_even_tokens_per_second"] == 5_000 * 131_072 / token
    assert f"{5_000 * 131_072 // token:,} tokens/s" in found.found  # said in any case


@pytest.mark.usefixtures("fast")
def test_a_read_only_place_is_not_written_to(tmp_path: Path) -> None:
    found = speed(Machine(), Place(str(tmp_path), readonly=True), MIB)
    assert found.status is Status.UNKNOWN


@pytest.mark.usefixtures("fast")
def test_a_disk_that_is_nearly_full_is_left_alone(machine: Build, tmp_path: Path) -> None:
    fake = machine()
    fake.spaces[str(tmp_path)] = Space(MIB, MIB, None)
    assert speed(fake, Place(str(tmp_path)), MIB).status is Status.UNKNOWN
    assert speed(fake, Place(str(tmp_path)), MIB // 2).status is Status.OK


def measuring(folder: Path, on_the_way: str) -> list[str]:
    """A process that measures for an hour and does something on the way."""
    code = (
        "import os, signal, sys, threading\n"
        "from kvlayer.doctor import disk\n"
        "real = os.pwritev\n"
        "def look(fd, buffers, offset):\n"
        f"    if offset == 80 << 20: {on_the_way}\n"
        "    return real(fd, buffers, offset)\n"
        "os.pwritev = look\n"
        "disk.measure(sys.argv[1], 1 << 50, threads=2, seconds=3600.0)\n"
    )
    return [sys.executable, "-c", code, str(folder)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_it_leaves_nothing(tmp_path: Path, ending: signal.Signals) -> None:
    """The process says when it is writing; what is in the directory then is nothing either."""
    process = subprocess.Popen(
        measuring(tmp_path, "print('writing', flush=True)"),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert list(tmp_path.iterdir()) == []
        process.send_signal(ending)
        _, said = process.communicate(timeout=HANG)  # long before its time is over
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in said) == (ending is signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_wakes_nobody_is_heard_all_the_same(tmp_path: Path) -> None:
    """One that comes just before a wait begins; here it comes to a thread that does not wait."""
    interrupt = "signal.pthread_kill(threading.get_ident(), signal.SIGINT)"
    ended = subprocess.run(
        measuring(tmp_path, interrupt),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert ended.returncode != 0
    assert "KeyboardInterrupt" in ended.stderr
    assert list(tmp_path.iterdir()) == []
