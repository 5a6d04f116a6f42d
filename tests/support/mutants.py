"""Plants small bugs in a file, one at a time, and runs its tests: one that lives wants a test.

``nox -s mutants -- FILES``; see docs/testing.md. The file itself is never written: a copy of its
source tree stands before it on the path of the tests, which run in processes forked from this one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib import import_module
from itertools import islice
from pathlib import Path

from mutations import Mutation, mutations_of

__all__ = ["Dead", "FileReport", "Runner", "Verdict", "examine", "main", "mirrors"]

_POISON = "raise SystemError('a planted bug: the tests do load this file')\n"
_TIMES_LONGER = 10.0


class Verdict(StrEnum):
    """What the tests made of one mutant."""

    KILLED = "killed"
    HUNG = "hung"
    """Nothing failed until the time was over: as good as killed, but look whether a test hangs."""
    LIVED = "lived"


class Dead(Exception):  # noqa: N818  # what the tests are
    """The tests say nothing about the file: red without a mutant, or green whatever it holds."""


@dataclass
class FileReport:
    """What was tried in one file."""

    path: str
    tests: list[str]
    sites: int
    """Mutants there are; fewer are tried where the time or the sample ends first."""
    killed: int = 0
    hung: list[str] = field(default_factory=list[str])
    survivors: list[str] = field(default_factory=list[str])

    @property
    def tried(self) -> int:
        return self.killed + len(self.hung) + len(self.survivors)

    @property
    def score(self) -> float:
        """The share that was noticed."""
        return 1.0 - len(self.survivors) / self.tried if self.tried else 0.0

    def add(self, name: str, verdict: Verdict) -> None:
        if verdict is Verdict.KILLED:
            self.killed += 1
        else:
            (self.survivors if verdict is Verdict.LIVED else self.hung).append(name)

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.score:.0%} of {self.tried} mutants were noticed, of {self.sites} "
            f"there are; killed {self.killed}, hung {len(self.hung)}, lived {len(self.survivors)}"
        )


def mirrors(source: Path, root: Path) -> list[Path]:
    """The test files that mirror ``source``: named after it, else those of the nearest folder."""
    every = sorted((root / "tests").rglob("test_*.py"))
    stem = source.stem.strip("_")
    named = [path for path in every if re.search(rf"(^|_){stem}(_|$)", path.stem[5:])]
    folders = [folder.name for folder in source.relative_to(root).parents]

    def beside(paths: list[Path]) -> list[Path]:
        near = ([path for path in paths if path.parent.name == folder] for folder in folders)
        return next(filter(None, near), [])

    return beside(named) or named or beside(every)


class Runner:
    """Runs ``tests`` against mutants of ``source``. A context manager: it keeps a copy inside."""

    def __init__(
        self, source: Path, tests: Sequence[Path], root: Path, *, least_seconds: float
    ) -> None:
        """A mutant gets ten times what the tests take without one, and ``least_seconds``."""
        self.source, self.tests, self.root = source.resolve(), list(tests), root
        self._tree = next(
            (folder for folder in self.source.parents if not (folder / "__init__.py").exists()),
            self.source.parent,
        )
        self._folder = Path(tempfile.mkdtemp(prefix="kvlayer-mutants-"))
        self._copy = self._folder / "src"
        shutil.copytree(self._tree, self._copy, ignore=shutil.ignore_patterns("__pycache__"))
        self._text = self.source.read_text()
        self._seconds = least_seconds

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def prove_alive(self) -> None:
        """Raise ``Dead`` unless the tests pass as they are, and fail where the file is broken."""
        began = time.monotonic()
        code = self._run(self._text, seconds=None, log=self._folder / "log")
        self._seconds = max(self._seconds, _TIMES_LONGER * (time.monotonic() - began))
        if code != 0:
            said = (self._folder / "log").read_text()[-4000:]
            raise Dead(f"the tests are not green without a mutant (pytest's code {code}):\n{said}")
        if self._run(_POISON, seconds=self._seconds) == 0:
            raise Dead(f"the tests stay green without {self.source.name}: they do not load it")

    def judge(self, mutation: Mutation) -> Verdict:
        """Run the tests against one mutant."""
        code = self._run(mutation.applied(self._text), seconds=self._seconds)
        if code is None:
            return Verdict.HUNG
        return Verdict.LIVED if code == 0 else Verdict.KILLED

    def _run(self, text: str, *, seconds: float | None, log: Path | None = None) -> int | None:
        """Exit code of pytest with ``text`` in the file's place, or None when it took too long."""
        target = self._copy / self.source.relative_to(self._tree)
        target.write_text(text)
        pid = os.fork()
        if pid == 0:
            self._play(log)
        ended = os.pidfd_open(pid)
        try:
            in_time = select.select([ended], [], [], seconds)[0]
        finally:
            os.close(ended)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # whatever it has started, too
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code if in_time else None

    def _play(self, log: Path | None) -> None:
        """The forked process, to its end."""
        code = 3
        try:
            os.setpgid(0, 0)
            out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(self.root)
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
            sys.dont_write_bytecode = True  # sources change within a second
            path = [str(self._copy), *filter(None, [os.environ.get("PYTHONPATH")])]
            os.environ["PYTHONPATH"] = os.pathsep.join(path)
            sys.path[:] = [str(self._copy), *(p for p in sys.path if Path(p) != self._tree)]
            pytest = import_module("pytest")
            # No examples of earlier runs, and none is left: a mutant's are no use to anybody.
            few = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=ci"]
            code = int(pytest.main([*few, *map(str, self.tests)]))
        except BaseException:  # noqa: BLE001  # the boundary of a process
            traceback.print_exc()
        finally:
            os._exit(code)


def examine(
    source: Path,
    tests: Sequence[Path],
    root: Path,
    *,
    chance: random.Random,
    until: float,
    least_seconds: float,
) -> Iterator[FileReport]:
    """Try mutants of ``source`` in a random order until ``until`` (``time.monotonic``).

    Yields the one report after each mutant, and before the first: whoever has enough may stop.
    """
    mutations = mutations_of(source.read_text())
    said = [str(path.relative_to(root)) for path in tests]
    report = FileReport(str(source), said, len(mutations))
    with Runner(source, tests, root, least_seconds=least_seconds) as runner:
        runner.prove_alive()
        yield report
        for mutation in chance.sample(mutations, len(mutations)):
            if time.monotonic() >= until:
                return
            verdict = runner.judge(mutation)
            report.add(f"{source}:{mutation}", verdict)
            if verdict is not Verdict.KILLED:
                _say(f"{verdict}: {source}:{mutation}")
            yield report


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when every file's tests are alive, whatever they have missed."""
    parser = argparse.ArgumentParser(prog="nox -s mutants --", allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, help="sources to plant bugs in")
    parser.add_argument("--tests", nargs="+", type=Path, help="in place of those that mirror them")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all files together")
    parser.add_argument("--most", type=int, help="mutants of each file; all of them")
    parser.add_argument("--least-seconds", type=float, default=60.0, help="for a mutant to hang")
    parser.add_argument("--seed", type=int, default=1, help="of the order in which they are tried")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--preload", action="append", default=[], help=argparse.SUPPRESS)
    wanted = parser.parse_args(arguments)
    for name in ("pytest", *wanted.preload):  # what takes seconds to import is imported once
        import_module(name)
    root, chance, begun = Path.cwd(), random.Random(wanted.seed), time.monotonic()
    reports, dead = list[FileReport](), dict[str, str]()
    for number, source in enumerate(wanted.files, 1):
        until = begun + 60.0 * wanted.minutes * number / len(wanted.files)
        tests = [path.resolve() for path in wanted.tests or mirrors(source.resolve(), root)]
        try:
            if not tests:
                raise Dead("no test is named after it: name some with --tests")
            trying = examine(
                source, tests, root, chance=chance, until=until, least_seconds=wanted.least_seconds
            )
            *_, report = islice(trying, None if wanted.most is None else wanted.most + 1)
            reports.append(report)
        except Dead as why:
            dead[str(source)] = str(why)
    for report in reports:
        _say(str(report))
    for name, reason in dead.items():
        _say(f"{name}: {reason}")
    if wanted.json:
        rows = [{**asdict(each), "tried": each.tried, "score": each.score} for each in reports]
        found = {"format": 1, "seed": wanted.seed, "files": rows, "dead": dead}
        wanted.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
