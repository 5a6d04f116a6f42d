"""How late a loop hears of what happens outside: another process tells it the time, every ms."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from struct import Struct
from types import TracebackType
from typing import Self

__all__ = ["Heartbeat"]

_STAMP = Struct("d")
_SECONDS = 0.001
_READ_NBYTES = 1 << 16

# Timers would measure the selector, whose timeouts are rounded up to whole milliseconds.
_METRONOME = f"""
import os, struct, time
due = time.monotonic()
try:
    while True:
        due = max(due + {_SECONDS}, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0))
        os.write(1, struct.pack("d", time.monotonic()))
except (BrokenPipeError, KeyboardInterrupt):
    pass
"""


class Heartbeat:
    """Seconds from when a beat was sent until the loop had it, while it is watched.

    Beats are sent whether or not the loop takes them, so one that stands still for 5 ms was 5, 4,
    3, 2 and 1 ms late. A context manager: the sending process lives inside it.
    """

    def __init__(self) -> None:
        self.late: list[float] = []
        self._since = 0.0
        self._goal = 0
        self._reached = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-I", "-S", "-c", _METRONOME]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    async def taken(self, count: int) -> None:
        """Wait until ``count`` beats have been taken in all, while it is watched."""
        self._goal = count
        self._reached.clear()
        await self._reached.wait()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Take beats on the running loop; those sent before are passed over."""
        assert self._process is not None
        assert self._process.stdout is not None
        loop, beats = asyncio.get_running_loop(), self._process.stdout.fileno()
        self._since = loop.time()
        loop.add_reader(beats, self._take, loop, beats)
        try:
            yield
        finally:
            loop.remove_reader(beats)

    def _take(self, loop: asyncio.AbstractEventLoop, beats: int) -> None:
        stamps = os.read(beats, _READ_NBYTES)  # whole ones: each is written at once
        now = loop.time()
        self.late += [now - sent for (sent,) in _STAMP.iter_unpack(stamps) if sent >= self._since]
        if len(self.late) >= self._goal:
            self._reached.set()

    def percentile(self, percent: float) -> float:
        """The lateness below which ``percent`` of the beats stay."""
        return sorted(self.late)[int(len(self.late) * percent / 100)]
