"""What a person sees while the demo runs: stages with their times, progress inside long ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["Console"]


class Console:
    """Stages and progress on one text stream; results belong on standard output instead.

    On a terminal progress overwrites its line; elsewhere (a log) each step is a line, at most one
    every two seconds.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """``stream`` is standard error unless another is given."""
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._stage = ""
        self._shown = 0.0

    def line(self, text: str) -> None:
        """One finished line."""
        self._write(f"{text}\n")

    def heading(self, text: str) -> None:
        """The title of an act."""
        self._write(f"\n{text}\n")

    @contextmanager
    def stage(self, what: str) -> Generator[None]:
        """Something that takes time: said when it begins, timed when it ends."""
        outer, self._stage = self._stage, what
        began = self._shown = time.monotonic()
        self._write(f"  {what} ..." if self._live else f"  {what} ...\n")
        try:
            yield
        finally:
            self._stage = outer
            took = f"{time.monotonic() - began:.1f} s"
            self._write(f"  {what}: {took}\n")

    def tokens(self, done: int, total: int) -> None:
        """A forward pass over a prompt ended."""
        self.step(f"{done:,} of {total:,} tokens")

    def step(self, text: str) -> None:
        """Progress inside the current stage."""
        now = time.monotonic()
        if self._live:
            self._write(f"  {self._stage} ... {text}")
        elif now - self._shown >= 2:
            self._shown = now
            self._write(f"  {self._stage} ... {text}\n")

    def _write(self, text: str) -> None:
        # \r and "erase to the end": what is written next replaces the line of progress.
        self._stream.write(f"\r\x1b[K{text}" if self._live else text)
        self._stream.flush()
