"""What a process does that opens a well filled directory: a role for ``zygote.Zygote``."""

from __future__ import annotations

import json
import os
import sys
import time
from mmap import mmap
from pathlib import Path
from threading import Event
from typing import Any

from sparse import names

from kvlayer.abc.backend import Write
from kvlayer_backends.file import FileBackend, FileOptions, disk, scan

__all__ = ["NBYTES", "on_disk", "serve"]

NBYTES = 8192


class _CountedDisk:
    """The disk as the scan sees it; counts the objects it is looked at for."""

    def __init__(self) -> None:
        self.looks = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(disk, name)

    def look_at_object(self, path: str) -> os.stat_result | None:
        self.looks += 1
        return disk.look_at_object(path)


async def serve(directory: str, *, capacity: int, first: int, fits: int, more: int) -> None:
    """Write objects while the directory is listed, and more once it is; then wait for a word.

    The scan does not begin before the first object is written: that cannot have waited for it.
    """
    counted = _CountedDisk()
    vars(scan)["disk"] = counted
    begins, read = Event(), scan.Scan.more

    def held(self: scan.Scan, count: int) -> scan.Part | None:
        begins.wait()
        return read(self, count)

    scan.Scan.more = held  # type: ignore[method-assign]
    keys = [*names(fits + more, first=first)]
    memory = memoryview(mmap(-1, NBYTES))
    backend = FileBackend(directory, FileOptions(capacity=capacity, interval=3600.0))
    began = time.monotonic()
    await backend.open()
    try:
        answers = await backend.put([Write(keys[0], (memory,))])
        accepted = time.monotonic() - began
        unlisted = not backend.objects - 1
        begins.set()
        for key in keys[1:fits]:
            answers += await backend.put([Write(key, (memory,))])
        await backend.recovered()
        listed = time.monotonic() - began
        looks = counted.looks
        found = backend.objects
        for key in keys[fits:]:
            answers += await backend.put([Write(key, (memory,))])
        report = {
            "is_janitor": backend.is_janitor,
            "refused": [str(answer) for answer in answers if answer is not None],
            "accepted_seconds": round(accepted, 3),
            "listed_seconds": round(listed, 1),
            "was_unlisted": unlisted,
            "looks": looks,
            "found": found,
            "used_nbytes": backend.used_nbytes,
            "objects": backend.objects,
        }
        os.write(1, f"{json.dumps(report)}\n".encode())
        sys.stdin.readline()
    finally:
        await backend.aclose()


def on_disk(directory: Path) -> dict[str, int]:
    """Name -> bytes of every file of an object."""
    found: dict[str, int] = {}
    for namespace in (directory / "v2").iterdir():
        if len(namespace.name) != 64:
            continue
        for shard in os.scandir(namespace):
            if shard.is_dir():
                found.update({f.name: f.stat().st_size for f in os.scandir(shard.path)})
    return found
