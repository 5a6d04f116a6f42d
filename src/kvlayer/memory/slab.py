"""One page-aligned piece of host memory that every process of a host can map.

The slab is a memfd where the system has one (Linux), so that another process can map the same
memory by its descriptor; elsewhere it is anonymous memory of this process alone. Pages are
committed when first touched.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Self

from kvlayer.errors import CapacityError, ClosedError, UnsupportedError
from kvlayer.memory.handle import SlabHandle
from kvlayer.payload import ALIGNMENT, align

__all__ = ["SCRATCH_NBYTES", "Slab"]


SCRATCH_NBYTES = 16 << 20
"""Committed as it is used: a few headers, where payloads are stored as they are."""

_REGIONS = struct.Struct("<8sQQ")
_MAGIC = b"KVLSLAB2"
_WORD_NBYTES = 8


class Slab:
    """Zeroed, page-aligned memory in regions. Owns the mapping and the descriptor.

    ``nbytes`` bytes of slots come first, then scratch, which :mod:`~kvlayer.memory.arena` hands
    out, then a generation for each page of the slots, then a page that says so, for other
    processes.
    """

    def __init__(
        self, nbytes: int, *, name: str = "kvlayer", scratch_nbytes: int = SCRATCH_NBYTES
    ) -> None:
        if nbytes < ALIGNMENT:
            raise CapacityError(
                f"host memory of {nbytes} bytes is smaller than one page",
                hint="give the cpu:// tier a capacity, for example cpu://?capacity=8GiB",
            )
        self.nbytes = nbytes // ALIGNMENT * ALIGNMENT
        """Of the slots."""
        self.scratch_nbytes = align(scratch_nbytes)
        mapped_nbytes = _mapped_nbytes(self.nbytes, self.scratch_nbytes)
        self.fd = -1
        """The memfd; -1 where there is none, in an attached slab and once closed."""
        try:
            if hasattr(os, "memfd_create"):
                self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(self.fd, mapped_nbytes)
                _seal(self.fd)
            self._map = mmap.mmap(self.fd, mapped_nbytes)  # fd -1: anonymous, shared with no one
        except (OSError, OverflowError, ValueError) as exc:
            self._close_fd()
            raise CapacityError(
                f"cannot map {self.nbytes} bytes of host memory: {exc}",
                hint="lower the capacity of the cpu:// tier",
            ) from exc
        _REGIONS.pack_into(
            self._map, mapped_nbytes - ALIGNMENT, _MAGIC, self.nbytes, self.scratch_nbytes
        )
        self._whole: memoryview | None = memoryview(self._map)

    @classmethod
    def attach(cls, fd: int, *, is_writable: bool = True) -> Self:
        """Map the slab of another process, given a descriptor of it (``SCM_RIGHTS``, pass_fds).

        The descriptor stays the caller's, who may close it at once. The memory lives until the
        last process that maps it is done; who hands out its bytes is for the processes to agree.
        Who only reads maps it so (``is_writable``): no view can be written to then, and the
        descriptor need not be. Raises ``UnsupportedError`` for a descriptor that is no slab.
        """
        try:
            found = os.fstat(fd)
            if not _is_sealed(fd) or found.st_size < ALIGNMENT:
                raise ValueError("its size is not fixed")
            attached = cls.__new__(cls)
            attached.fd = -1
            access = mmap.ACCESS_WRITE if is_writable else mmap.ACCESS_READ
            attached._map = mmap.mmap(fd, found.st_size, access=access)
            magic, nbytes, scratch = _REGIONS.unpack_from(attached._map, found.st_size - ALIGNMENT)
            if magic != _MAGIC or _mapped_nbytes(nbytes, scratch) != found.st_size:
                attached._map.close()
                raise ValueError("it does not say what lies where")
            attached.nbytes, attached.scratch_nbytes = nbytes, scratch
        except (OSError, ValueError) as exc:
            raise UnsupportedError(
                f"descriptor {fd} is no slab: {exc}",
                hint="pass the descriptor of a slab that kvlayer made (slab.fd)",
            ) from exc
        attached._whole = memoryview(attached._map)
        return attached

    @classmethod
    def attach_to(cls, handle: SlabHandle, *, is_writable: bool = True) -> Self:
        """Map the slab of another process of this host, by what its ``handle`` says.

        ``is_writable`` as for :meth:`attach`. Raises ``UnsupportedError`` when that process has
        ended or cannot be looked into.
        """
        path = Path("/proc", str(handle.pid), "fd", str(handle.fd))
        try:
            mode = os.O_RDWR if is_writable else os.O_RDONLY
            fd = os.open(path, mode | os.O_CLOEXEC)
        except OSError as exc:
            raise UnsupportedError(
                f"cannot open the slab of process {handle.pid}: {exc}",
                hint="it must run, on this host, as this user and in this container; "
                "else pass its descriptor and use Slab.attach",
            ) from exc
        try:
            if os.fstat(fd).st_ino != handle.inode:
                raise UnsupportedError(
                    f"process {handle.pid} no longer has the slab that the handle names",
                    hint="ask the planner's process for a new handle",
                )
            return cls.attach(fd, is_writable=is_writable)
        finally:
            os.close(fd)

    @property
    def handle(self) -> SlabHandle:
        """What another process needs to map this slab, while this one has it open.

        Raises ``UnsupportedError`` where there is no descriptor.
        """
        if self.fd < 0:
            raise UnsupportedError(
                "this slab has no descriptor, so no other process can map it",
                hint="memfd is Linux's; an attached slab is handed on by the process that made it",
            )
        return SlabHandle(os.getpid(), self.fd, os.fstat(self.fd).st_ino, self.nbytes)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Borrow ``nbytes`` bytes at ``offset``, writable. Valid until the slab is closed."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"{offset}+{nbytes} is outside a slab of {self.nbytes} bytes")
        return self.whole()[offset : offset + nbytes]

    def scratch(self, offset: int, nbytes: int) -> memoryview:
        """Borrow bytes of the scratch, as :meth:`view` does of the slots."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.scratch_nbytes:
            raise ValueError(f"{offset}+{nbytes} is outside {self.scratch_nbytes} bytes of scratch")
        start = self.nbytes + offset
        return self.whole()[start : start + nbytes]

    def generations(self) -> memoryview:
        """Borrow the words, of 8 bytes, one for each page of the slots: see ``Extents``.

        Another process that maps the slab reads an object's word, its bytes, and the word again:
        where it is what its owner said, the bytes are the object's.
        """
        start = self.nbytes + self.scratch_nbytes
        self.whole()  # raises when it is closed
        assert self._whole is not None
        return self._whole[start : start + self.nbytes // ALIGNMENT * _WORD_NBYTES].cast("Q")

    def whole(self) -> memoryview:
        """Slots and scratch, for who registers memory. Valid until the slab is closed."""
        if self._whole is None:
            raise ClosedError("the host slab is closed")
        return self._whole[: self.nbytes + self.scratch_nbytes]

    def close(self) -> None:
        """Unmap. Idempotent. While views are still out the memory lives until the last one dies."""
        if self._whole is None:
            return
        self._whole.release()
        self._whole = None
        try:
            self._map.close()
        except BufferError:
            # A borrower still holds a view, so unmapping would be a crash. It keeps the map alive;
            # who keeps the slab must not.
            del self._map
        self._close_fd()

    def _close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _mapped_nbytes(nbytes: int, scratch_nbytes: int) -> int:
    words = align(nbytes // ALIGNMENT * _WORD_NBYTES)
    return nbytes + scratch_nbytes + words + ALIGNMENT


def _seal(fd: int) -> None:
    """Fix the size for good: memory that shrinks under a mapping kills the process that maps it."""
    import fcntl  # not everywhere; where memfd is, it is

    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)


def _is_sealed(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
