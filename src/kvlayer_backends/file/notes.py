"""Notes beside damaged objects, written on a thread of their own.

A note is a courtesy. So whatever the disk does to its thread costs nobody else anything: no thread
that serves, not the loop, and not the process's end, which does not wait for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterable
from typing import NamedTuple

from kvlayer.identity.keys import ObjectKey
from kvlayer.runtime.threads import Threads
from kvlayer_backends.file import disk
from kvlayer_backends.file.pulse import Pulse

__all__ = ["SUFFIX", "Aside", "Notes"]

_log = logging.getLogger(__name__)

SUFFIX = ".json"


class Aside(NamedTuple):
    """A damaged object that was moved aside, and where to."""

    key: ObjectKey
    path: str
    nbytes: int | None


class Notes:
    """Writes what is known of objects that were moved aside. Use it on one loop."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._threads = Threads(1, "kvlayer-file-notes")
        self._writing: set[asyncio.Task[None]] = set()

    async def write(self, aside: Iterable[Aside]) -> None:
        """Put a note beside each; what fails is left out.

        Cancelled, it returns at once, and the notes are written all the same.
        """
        task = asyncio.get_running_loop().create_task(self._write(tuple(aside)))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        await asyncio.shield(task)

    async def _write(self, aside: tuple[Aside, ...]) -> None:
        loop = asyncio.get_running_loop()
        for each in aside:
            try:
                await loop.run_in_executor(self._threads, self._pulse.check)
                await disk.write_note(each.path + SUFFIX, _facts(each), self._threads)
            except (OSError, RuntimeError) as exc:  # RuntimeError: the system gives no thread
                _log.debug("file:// cannot note why %s is in quarantine: %s", each.path, exc)

    async def aclose(self) -> None:
        """Wait until all notes are written. Cancelled, it leaves them: see :meth:`abandon`."""
        if self._writing:
            await asyncio.wait(self._writing)
        self._threads.end()

    def abandon(self, seconds: float) -> int:
        """Write no more, and leave a thread that hangs to itself; how many do. Idempotent."""
        for task in self._writing:
            task.cancel()
        return self._threads.end(seconds)


def _facts(aside: Aside) -> bytes:
    facts = {
        "key": aside.key,
        "nbytes": aside.nbytes,
        "quarantined": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "pid": os.getpid(),
        "host": os.uname().nodename,
    }
    return (json.dumps(facts, indent=1) + "\n").encode()
