"""Host memory that copy engines reach by themselves: a slab's pages, pinned in pieces.

Pinning touches every page, which takes seconds for a large slab, so it goes on in the background; a
copy that comes earlier pins what it needs. CUDA refuses a copy that lies in two registrations, so
copies are cut where pieces meet. Pinned pages are memory for good: what is pinned counts as used,
whatever the slab holds.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from threading import Lock

from kvlayer.staging.cuda.runs import Parts
from kvlayer.staging.cuda.runtime import PORTABLE, Runtime, cuda_errors
from kvlayer.staging.lazy import np
from kvlayer.staging.slots import IntArray

__all__ = ["PIECE_NBYTES", "PinnedSlab"]

_log = logging.getLogger(__name__)

_FAR = (1 << 63) - 1
PIECE_NBYTES = 64 << 20
"""Pinned at once: tens of milliseconds, and a copy in sixty-four of a slab's layers is cut."""


class PinnedSlab:
    """``nbytes`` bytes at ``address``, which its owner keeps mapped until this is closed.

    In any thread. Memory that cannot be pinned stays usable: copies of it are slower, and said so
    once.
    """

    def __init__(
        self, runtime: Runtime, address: int, nbytes: int, *, piece_nbytes: int = PIECE_NBYTES
    ) -> None:
        self._runtime = runtime
        self._address = address
        self._nbytes = nbytes
        self._piece = piece_nbytes
        self._waiting = set(range(-(-nbytes // piece_nbytes)))
        self._pinned: set[int] = set()
        pieces = range(address, address + nbytes, piece_nbytes)
        self._edges = np.array([*pieces, address + nbytes], np.int64)
        self._lock = Lock()
        self._is_refused = False

    @property
    def pinned_nbytes(self) -> int:
        """Bytes that are pinned by now."""
        return sum(self._extent(piece)[1] for piece in tuple(self._pinned))

    @property
    def is_whole(self) -> bool:
        """Whether all of it is pinned."""
        return not self._waiting

    def pin_next(self) -> bool:
        """Pin one more piece; whether others are left. Blocks."""
        with self._lock:
            if self._waiting and not self._is_refused:
                self._pin(min(self._waiting))
            return bool(self._waiting) and not self._is_refused

    def ensure(self, address: int, nbytes: int) -> None:
        """Pin what is not pinned yet of the pieces that hold these bytes. Blocks."""
        pieces = self._pieces(address, nbytes)
        if self._pinned.issuperset(pieces):
            return
        with self._lock:
            for piece in pieces:
                if piece in self._waiting and not self._is_refused:
                    self._pin(piece)

    def cut(self, addresses: IntArray, nbytes: IntArray) -> Parts:
        """Stretches of host memory in parts, none of which lies in two pieces, or partly in one."""
        stops = addresses + nbytes
        first = np.searchsorted(self._edges, addresses, "right")
        counts = np.searchsorted(self._edges, stops, "left") - first + 1
        whole = np.repeat(np.arange(len(addresses)), counts)
        after = np.arange(len(whole)) - np.repeat(np.cumsum(counts) - counts, counts)
        edge = first[whole] + after  # the edge that ends the part, unless the stretch ends before
        edges = np.concatenate(([0], self._edges, [_FAR]))
        starts = np.maximum(addresses[whole], edges[edge])
        offsets = starts - addresses[whole]
        return Parts(whole, offsets, np.minimum(stops[whole], edges[edge + 1]) - starts)

    def close(self) -> None:
        """Unpin everything. No copy may be running. Idempotent."""
        with self._lock, ExitStack() as unpinning:  # a piece that stays pinned stops no other
            self._waiting.clear()
            while self._pinned:
                address, _ = self._extent(self._pinned.pop())
                unpinning.callback(self._runtime.hostUnregister, address)

    def _pin(self, piece: int) -> None:
        address, nbytes = self._extent(piece)
        try:
            self._runtime.hostRegister(address, nbytes, PORTABLE)
        except cuda_errors() as exc:
            self._is_refused = True
            _log.warning(
                "host memory cannot be pinned (%s): %d of %d bytes are; copies of the rest are "
                "slower and occupy a thread",
                exc,
                self.pinned_nbytes,
                self._nbytes,
            )
        else:
            self._pinned.add(piece)
            self._waiting.discard(piece)

    def _extent(self, piece: int) -> tuple[int, int]:
        start = piece * self._piece
        return self._address + start, min(self._piece, self._nbytes - start)

    def _pieces(self, address: int, nbytes: int) -> range:
        first = max(address - self._address, 0)
        stop = min(address + nbytes - self._address, self._nbytes)
        return range(first // self._piece, -(-stop // self._piece)) if first < stop else range(0)
