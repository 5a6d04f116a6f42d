"""Memory for the tables that launches read: pinned where it is written, and on the device.

A batch takes an arena, puts its table into it, and gives it back when its work has ended: a table
is never overwritten while a copy or a kernel may still read it, and nothing but the end of a batch
has to be waited for.
"""

from __future__ import annotations

from contextlib import ExitStack
from ctypes import memmove
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from kvlayer.staging.cuda.runs import Runs
from kvlayer.staging.cuda.runtime import ALIGNMENT, PORTABLE, Runtime

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

__all__ = ["Arena", "Arenas"]

_BLOCK_NBYTES = 1 << 20


@dataclass(slots=True)
class _Block:
    """Pinned memory and its twin on the device."""

    host: int
    device: int
    nbytes: int
    used: int = 0


class Arena:
    """What one batch writes tables into. Not thread-safe."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._blocks: list[_Block] = []

    def place(self, table: NDArray[uint8]) -> tuple[Runs, int]:
        """Write a table: the copy it needs, and its address on the device."""
        block = self._room(table.nbytes)
        host, device = block.host + block.used, block.device + block.used
        block.used += -(-table.nbytes // ALIGNMENT) * ALIGNMENT
        memmove(host, table.ctypes.data, table.nbytes)
        return Runs([host], [device], [table.nbytes]), device

    def clear(self) -> None:
        """Start over. Nothing may read the tables any more."""
        for block in self._blocks:
            block.used = 0

    def close(self) -> None:
        """Free everything. Nothing may read the tables any more."""
        with ExitStack() as freeing:
            for block in self._blocks:
                freeing.callback(self._runtime.freeHost, block.host)
                freeing.callback(self._runtime.free, block.device)
        self._blocks.clear()

    def _room(self, nbytes: int) -> _Block:
        for block in self._blocks:
            if block.nbytes - block.used >= nbytes:
                return block
        size = max(nbytes, _BLOCK_NBYTES)
        with ExitStack() as made:
            host = self._runtime.hostAlloc(size, PORTABLE)
            made.callback(self._runtime.freeHost, host)
            self._blocks.append(_Block(host, self._runtime.malloc(size), size))
            made.pop_all()
        return self._blocks[-1]


class Arenas:
    """Arenas of one device; as many as batches were ever in flight at once."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._idle: list[Arena] = []
        self._lock = Lock()

    def take(self) -> Arena:
        with self._lock:
            return self._idle.pop() if self._idle else Arena(self._runtime)

    def give(self, arena: Arena) -> None:
        """Take an arena back. Nothing may read it any more."""
        arena.clear()
        with self._lock:
            self._idle.append(arena)

    def close(self) -> None:
        with ExitStack() as closing:
            for arena in self._idle:
                closing.callback(arena.close)
        self._idle.clear()
