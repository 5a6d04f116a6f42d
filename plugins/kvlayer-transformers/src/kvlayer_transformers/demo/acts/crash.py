"""Act 2: a process is killed while it stores; the next one finds what had been stored before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvlayer_transformers.demo.asking import Answer, Asker
from kvlayer_transformers.demo.console import Console
from kvlayer_transformers.demo.documents import Document
from kvlayer_transformers.demo.store import CHUNK_TOKENS, DemoError

__all__ = ["Crash", "play"]

_ATTEMPTS = 5
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Crash:
    """What the killed process left behind, and what the next one answered.

    ``written`` of the second document's ``expected`` objects were complete when the process died
    by ``signal``, with ``unfinished`` files begun. ``first`` are the next process's answers about
    the first document, timed from the request with the cache still closed; ``second`` is its
    answer about the second, ``reference`` the one computed without any cache.
    """

    signal: str
    written: int
    expected: int
    unfinished: int
    reference: Answer
    first: list[Answer]
    second: Answer


def play(asker: Asker, document: Document, second: Document) -> Crash:
    """Kill a process that stores ``second``, then ask a new one about both documents."""
    console = asker.console
    with asker.open() as session, console.stage(f"cold, without a cache: {second.title}"):
        reference = asker.ask(session, second.prompts[0], load=False, save=False)
    killed_by, written, unfinished = _kill_mid_store(asker, second)
    expected = len(asker.store.objects(second.ids))
    console.line(
        f"    killed by {killed_by}: {written} of {expected} objects of {second.title} were "
        f"written, {unfinished} unfinished"
    )
    answers: list[Answer] = []
    with _worker(asker, "answer") as worker:
        for prompt in (*document.prompts, *second.prompts):
            with console.stage(f"new process: {prompt.question}"):
                answers.append(_answer(worker, console))
            console.line(f"    {answers[-1].text}")
        worker.wait()
    return Crash(killed_by, written, expected, unfinished, reference, answers[:-1], answers[-1])


def _kill_mid_store(asker: Asker, second: Document) -> tuple[str, int, int]:
    """The signal a storing process died of, and how many objects it left whole and unfinished."""
    store, expected = asker.store, len(second.ids) // CHUNK_TOKENS
    for _ in range(_ATTEMPTS):
        with _worker(asker, "store") as victim:
            with asker.console.stage(f"another process computes and stores {second.title}"):
                _until("storing", victim, asker.console)
                deadline = time.monotonic() + _PATIENCE_S
                while store.present(second.ids) < expected // 2 and victim.poll() is None:
                    if time.monotonic() > deadline:
                        raise DemoError(f"nothing was stored within {_PATIENCE_S} s")
            victim.send_signal(signal.SIGKILL)
            returned = any(event["event"] == "stored" for event in _events(victim))
            code = victim.wait()
        written = store.present(second.ids)
        if code == -signal.SIGKILL and not returned and 0 < written < expected:
            return signal.Signals(-code).name, written, store.unfinished()
        if code not in (0, -signal.SIGKILL):
            raise DemoError(f"the storing process failed with exit code {code}")
        asker.console.line("    it was quicker than the kill; once more")
        store.remove(second.ids)
    raise DemoError(f"no process could be killed in the middle of a store in {_ATTEMPTS} attempts")


@contextmanager
def _worker(asker: Asker, task: str) -> Generator[subprocess.Popen[str]]:
    """A fresh interpreter doing ``task``; it does not outlive the block."""
    command = [sys.executable, "-m", "kvlayer_transformers.demo.worker", task]
    folder: str = asker.loaded.model.config.name_or_path
    with subprocess.Popen(  # noqa: S603  # our own interpreter and module
        [*command, str(asker.store.directory), folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    ) as worker:
        try:
            with asker.console.stage("a new process loads the model"):
                _until("loaded", worker, asker.console)
            yield worker
        finally:
            worker.kill()


def _until(what: str, worker: subprocess.Popen[str], console: Console) -> dict[str, Any]:
    """Wait for an event, showing the passes on the way. Raises ``DemoError`` if it never comes."""
    for event in _events(worker):
        if event["event"] == what:
            return event
        if event["event"] == "pass":
            console.tokens(event["done"], event["total"])
    raise DemoError(
        f"a process of the demo ended with exit code {worker.wait()} before {what!r}",
        hint="its own message stands above",
    )


def _answer(worker: subprocess.Popen[str], console: Console) -> Answer:
    return Answer(**_until("answer", worker, console)["answer"])


def _events(worker: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What the worker says, one JSON object a line, until it ends."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.endswith("\n"):  # a killed process may have been interrupted in a word
            yield json.loads(line)
