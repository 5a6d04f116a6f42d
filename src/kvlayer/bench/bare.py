"""What a disk gives to threads that do nothing else: the ceiling of a tier of files."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from kvlayer.bench.measure import seconds_of
from kvlayer.payload import ALIGNMENT

__all__ = ["BareFiles", "forget", "takes_direct"]

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)


class BareFiles:
    """Files below ``directory``, each written and read by one call on one thread of ``threads``.

    ``bodies`` is the memory that is moved, one piece a file; a page comes before each, as a header
    does. Blocking calls.
    """

    def __init__(
        self, directory: Path, bodies: Sequence[memoryview], threads: int, *, direct: bool
    ) -> None:
        pages = memoryview(mmap.mmap(-1, ALIGNMENT * len(bodies)))
        self._regions = [
            (pages[at * ALIGNMENT : (at + 1) * ALIGNMENT], body) for at, body in enumerate(bodies)
        ]
        self._paths = [str(directory / f"bare-{at}") for at in range(len(bodies))]
        self._flags = _O_DIRECT if direct else 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kvlayer-bench")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        for pages, body in self._regions:
            pages.release()
            body.release()

    def write(self) -> float:
        """Seconds to write every file anew; none may be there."""
        return self._each(self._write)

    def read(self) -> float:
        """Seconds to read every file."""
        return self._each(self._read)

    def remove(self) -> None:
        """Delete the files."""
        for path in self._paths:
            os.unlink(path)  # noqa: PTH108  # as the tier itself does

    def _each(self, work: Callable[[int], None]) -> float:
        return seconds_of(lambda: [*self._pool.map(work, range(len(self._paths)))])

    def _write(self, at: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._flags
        self._move(at, flags, os.pwritev)

    def _read(self, at: int) -> None:
        self._move(at, os.O_RDONLY | self._flags, os.preadv)

    def _move(
        self, at: int, flags: int, transfer: Callable[[int, list[memoryview], int], int]
    ) -> None:
        left, done = list(self._regions[at]), 0
        fd = os.open(self._paths[at], flags, 0o600)
        try:
            while left:
                moved = transfer(fd, left, done)
                if not moved:
                    raise EOFError(f"{self._paths[at]} ends after {done} bytes")
                done += moved
                while left and moved >= left[0].nbytes:
                    moved -= left.pop(0).nbytes
                if moved:
                    left[0] = left[0][moved:]
        finally:
            os.close(fd)


def takes_direct(directory: Path) -> bool:
    """Whether files in ``directory`` can be written with O_DIRECT. Blocking; leaves nothing."""
    if not _O_DIRECT:
        return False
    path, page = str(directory / "probe"), mmap.mmap(-1, ALIGNMENT)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | _O_DIRECT)
        return os.pwritev(fd, [page], 0) == ALIGNMENT
    except OSError:  # which refusal it is depends on the file system
        return False
    finally:
        os.close(fd)
        os.unlink(path)  # noqa: PTH108
        page.close()


def forget(directory: Path) -> None:
    """Have the page cache give up what it holds of the files below ``directory``. Blocking."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)  # only what is on the medium can be given up
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
