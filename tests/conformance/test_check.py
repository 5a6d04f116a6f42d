"""``kvlayer check``: what it prints, what it leaves, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvlayer.cli.main import program

LIAR = """
import asyncio
from kvlayer_backends.cpu import CpuBackend

class Liar(CpuBackend):
    scheme = "liar"
    async def get(self, reads, /):
        results = await super().get(reads)
        if len(reads) == 27:
            {lie}
        return results
{also}
"""


def check(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(program, ["check", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.fixture
def liar(tmp_path: Path) -> object:
    """A distribution that lies in one place, and the program in a process that sees it."""

    def run(lie: str, *arguments: str, also: str = "") -> subprocess.CompletedProcess[str]:
        info = tmp_path / "liar-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: liar\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[kvlayer.backends]\nliar = liar:Liar\n")
        (tmp_path / "liar.py").write_text(LIAR.format(lie=lie, also=also))
        path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
        code = f"{path}\nfrom kvlayer.cli.main import main\nmain()"
        return subprocess.run(
            [sys.executable, "-c", code, "check", "liar://?capacity=128MiB", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_a_live_directory_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    directory, report = tmp_path / "kv", tmp_path / "report.json"
    code, said = check(f"file://{directory}", "--only", "object", "--json", str(report))
    assert code == 0
    assert "kept      a large object is read back to the byte\n" in said
    assert "not run   a truncated object reads short: nothing can shorten" in said
    assert [path.name for path in directory.rglob("*") if path.is_file()] == ["janitor.lock"]
    assert said.startswith(f"file://{directory}  (list, persistent, shared)\n")
    written = json.loads(report.read_text())
    assert written["format"] == 1
    assert written["ok"] is True
    assert written["disposable"] is False
    kept = sum(row["outcome"] == "kept" for row in written["verdicts"])
    left_out = len(written["verdicts"]) - kept
    wanted = {"kept": kept, "broken": 0, "failed": 0, "hung": 0, "not run": left_out}
    assert written["counts"] == wanted
    assert written["capabilities"] == ["list", "persistent", "shared"]
    rows = {row["promise"]: row for row in written["verdicts"]}
    assert rows["touching changes no object"]["outcome"] == "kept"
    assert all(row["contract"] for row in rows.values())


def test_what_cannot_be_undone_is_done_only_where_nothing_is_worth_keeping(tmp_path: Path) -> None:
    url = f"file://{tmp_path}?capacity=64MiB"
    code, said = check(url, "--only", "quarantined")
    assert said.count("not run") == 3  # two promises, and the summary
    assert code == 2, "nothing was asked, which proves nothing"
    assert "--disposable, where nothing in it is worth keeping, tries 2 more" in said
    _, said = check(url, "--only", "quarantined", "--disposable")
    assert "2 kept" in said
    _, said = check("cpu://?capacity=64MiB", "--only", "quarantined is never")
    assert "1 kept" in said  # whose objects end with the process holds nobody's


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("cpu:/",), 2, "not a backend URL"),
        (("cpu://?capcity=1GiB",), 2, "capacity"),
        (("cpu://?capacity=1MiB",), 2, "too small"),
        (("cpu://", "--only", "nothing like it"), 2, "no promise"),
        (("nowhere://",), 3, "nowhere"),
        (("file:///proc/1/nobody/may",), 1, "/proc/1/nobody"),
        (("cpu://", "--json", "/nowhere/report.json"), 2, "there is no directory /nowhere"),
        (("cpu://", "--json", "/proc"), 2, "directory"),
    ],
)
def test_what_cannot_be_looked_at_is_an_error_with_the_programs_exit_code(
    arguments: tuple[str, ...], code: int, word: str
) -> None:
    found, said = check(*arguments)
    assert found == code, said
    assert word in said
    assert "Traceback" not in said


def test_a_tier_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "v2").mkdir(mode=0o700)
    code, said = check(f"file://{tmp_path}?readonly=true")
    assert code == 1
    assert said.startswith("error: file://: cannot put")
    assert "BROKEN" not in said


def test_a_broken_promise_is_told_with_its_contract(liar, tmp_path: Path) -> None:
    done = liar("return results[::-1]", "--only", "own order", "--json", str(tmp_path / "r.json"))
    assert done.returncode == 1, done.stderr
    assert "BROKEN    a batch is answered in its own order\n" in done.stdout
    assert "contract: Results align with inputs and carry the error." in done.stdout
    assert "expected: the results of a shuffled get()" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["ok"] is False


def test_a_hang_is_reported_not_suffered(liar) -> None:
    done = liar("await asyncio.Event().wait()", "--only", "own order", "--seconds", "2")
    assert done.returncode == 1, done.stderr
    assert "HUNG      a batch is answered in its own order\n" in done.stdout
    assert "liar.py" in done.stdout  # where it waits


def test_a_backend_that_does_not_open_is_one_error(liar) -> None:
    never = "    async def open(self):\n        await asyncio.Event().wait()"
    done = liar("pass", "--seconds", "2", also=never)
    assert done.returncode == 1
    assert done.stderr.startswith("error: liar://?capacity=*** does not answer within 2 seconds")
    assert "await asyncio.Event().wait()" in done.stderr  # where it waits
    assert done.stdout == ""


def test_a_backend_whose_first_put_fails_oddly_is_told_by_its_promises(liar) -> None:
    odd = "    async def put(self, writes, /):\n        return 1 / 0"
    done = liar("pass", "--only", "own order", also=odd)
    assert done.returncode == 1
    assert "FAILED    a batch is answered in its own order\n" in done.stdout
    assert done.stderr == ""


def test_a_blocked_thread_does_not_keep_the_program(liar) -> None:
    lie = "import threading; threading.Event().wait()"
    done = liar(lie, "--only", "own order", "--seconds", "2")
    assert done.returncode == 1, done.stderr
    assert "HUNG" in done.stdout
