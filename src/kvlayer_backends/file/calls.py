"""Whether the backend may be called now, and when its last running call has ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Generic, TypeVar

from kvlayer.errors import ClosedError, ForkedError

__all__ = ["Calls"]


T = TypeVar("T")


class Calls(Generic[T]):
    """Counts running calls between ``begin`` and ``end``, on one loop in one process.

    Each call gets what ``begin`` was given.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = 0
        self._subject: T | None = None
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.has_ended = False

    @property
    def has_begun(self) -> bool:
        return self._pid != 0

    @property
    def is_foreign(self) -> bool:
        """Whether this is a forked child of the process in which calls began."""
        return self._pid not in (0, os.getpid())

    def begin(self, subject: T) -> None:
        """Admit calls."""
        self._pid = os.getpid()
        self._subject = subject

    async def end(self) -> None:
        """Admit no more calls and wait until those that run have ended. Idempotent."""
        self.has_ended = True
        await self._idle.wait()

    def check(self) -> T:
        """Raise ``ClosedError`` or ``ForkedError`` when calls are not admitted."""
        if self.has_ended or self._subject is None:
            raise ClosedError(
                f"{self._name} is {'closed' if self.has_ended else 'not open'}",
                hint="use it inside `async with`",
            )
        if self.is_foreign:
            raise ForkedError(
                f"{self._name} was opened in process {self._pid}, not in this fork of it",
                hint="open one in each process; they share the directory",
            )
        return self._subject

    @contextmanager
    def running(self) -> Generator[T]:
        """One call. Raises ``ClosedError`` or ``ForkedError`` when calls are not admitted."""
        subject = self.check()
        self._running += 1
        self._idle.clear()
        try:
            yield subject
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
