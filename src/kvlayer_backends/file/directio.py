"""Moving whole objects between a file and lent memory, past the page cache where that works."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvlayer.payload import ALIGNMENT
from kvlayer_backends.file import disk

__all__ = ["O_DIRECT", "drain", "fill", "probe", "suits_direct"]

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""The open flag, 0 where the platform has none."""

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_Transfer: TypeAlias = Callable[[int, list[memoryview], int], int]


def suits_direct(regions: Sequence[memoryview], offset: int = 0) -> bool:
    """Whether lengths and offset allow O_DIRECT. Addresses are the kernel's to refuse."""
    return offset % ALIGNMENT == 0 and all(r.nbytes % ALIGNMENT == 0 for r in regions)


def fill(fd: int, regions: Sequence[memoryview], offset: int) -> int:
    """Read from ``offset`` into the regions in order; bytes read, short only at the end of file.

    Blocking. Raises ``OSError``.
    """
    return _move(os.preadv, fd, regions, offset)


def drain(fd: int, regions: Sequence[memoryview]) -> None:
    """Write the regions one after the other from the file's start. Blocking. Raises ``OSError``."""
    expected = sum(r.nbytes for r in regions)
    written = _move(os.pwritev, fd, regions, 0)
    if written != expected:
        raise OSError(errno.EIO, f"only {written} of {expected} bytes could be written")


def _move(transfer: _Transfer, fd: int, regions: Sequence[memoryview], offset: int) -> int:
    left = [r.cast("B") for r in regions if r.nbytes]
    done = 0
    while left:
        try:
            moved = transfer(fd, left[:_IOV_MAX], offset + done)
        except OSError as exc:
            # Memory that is not aligned, or an end of file inside a block that was just reached.
            if exc.errno == errno.EINVAL and _leave_direct(fd):
                continue
            raise
        if moved == 0:
            break
        done += moved
        _advance(left, moved)
    return done


def _advance(left: list[memoryview], moved: int) -> None:
    whole = 0
    while whole < len(left) and moved >= left[whole].nbytes:
        moved -= left[whole].nbytes
        whole += 1
    del left[:whole]
    if moved:
        left[0] = left[0][moved:]


def _leave_direct(fd: int) -> bool:
    """Go on through the page cache; False when that is where the file was already."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~O_DIRECT)
    return True


def probe(path: str) -> bool:
    """Whether a new file at ``path`` can be written and read with O_DIRECT. Leaves no file.

    Raises ``OSError`` for anything but a refusal of O_DIRECT.
    """
    if not O_DIRECT:
        return False
    block = mmap.mmap(-1, ALIGNMENT)
    try:
        fd = disk.create(path, O_DIRECT)
        try:
            return os.pwritev(fd, [block], 0) == os.preadv(fd, [block], 0) == ALIGNMENT
        finally:
            os.close(fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return False
    finally:
        block.close()
        disk.remove(path)  # some kernels create the file and then refuse to open it
