"""One page-aligned piece of host memory that every process of a host can map.

The slab is a memfd where the system has one (Linux), so that its descriptor can be passed to
another process; elsewhere it is anonymous memory of this process alone. Pages are committed when
first touched.
"""

from __future__ import annotations

import mmap
import os

from kvlayer.errors import CapacityError, ClosedError
from kvlayer.payload import ALIGNMENT

__all__ = ["Slab"]


class Slab:
    """``nbytes`` bytes of zeroed, page-aligned memory. Owns the mapping and the descriptor."""

    def __init__(self, nbytes: int, *, name: str = "kvlayer") -> None:
        if nbytes < ALIGNMENT:
            raise CapacityError(
                f"host memory of {nbytes} bytes is smaller than one page",
                hint="give the cpu:// tier a capacity, for example cpu://?capacity=8GiB",
            )
        self.nbytes = nbytes // ALIGNMENT * ALIGNMENT
        self.fd = -1
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            if self.fd >= 0:
                os.ftruncate(self.fd, self.nbytes)
            self._map = mmap.mmap(self.fd, self.nbytes)  # fd -1: anonymous, shared with no one
        except (OSError, OverflowError, ValueError) as exc:
            self._close_fd()
            raise CapacityError(
                f"cannot map {self.nbytes} bytes of host memory: {exc}",
                hint="lower the capacity of the cpu:// tier",
            ) from exc
        self._whole: memoryview | None = memoryview(self._map)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Borrow ``nbytes`` bytes at ``offset``, writable. Valid until the slab is closed."""
        if self._whole is None:
            raise ClosedError("the host slab is closed")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"{offset}+{nbytes} is outside a slab of {self.nbytes} bytes")
        return self._whole[offset : offset + nbytes]

    def close(self) -> None:
        """Unmap. Idempotent. While views are still out the memory lives until the last one dies."""
        if self._whole is None:
            return
        self._whole.release()
        self._whole = None
        try:
            self._map.close()
        except BufferError:
            pass  # a borrower still holds a view: unmapping under it would be a crash
        self._close_fd()

    def _close_fd(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
