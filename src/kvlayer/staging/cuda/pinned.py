"""Host memory that copy engines reach by themselves: a slab's pages, pinned in pieces.

Pinning touches every page, which takes seconds for a large slab, so it goes on in the background; a
copy that comes earlier pins what it needs. CUDA refuses a copy that lies in two registrations, so
copies are cut where pieces meet. Pinned pages are memory for good: what is pinned counts as used,
whatever the slab holds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from threading import Lock

from kvlayer.staging.cuda.runs import Run
from kvlayer.staging.cuda.runtime import PORTABLE, Runtime, cuda_errors

__all__ = ["PIECE_NBYTES", "PinnedSlab"]

_log = logging.getLogger(__name__)

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
        self._lock = Lock()
        self._is_refused = False

    @property
    def pinned_nbytes(self) -> int:
        """Bytes that are pinned by now."""
        return sum(self._extent(piece)[1] for piece in tuple(self._pinned))

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

    def cut(self, runs: Iterable[Run], *, to_host: bool) -> Iterator[Run]:
        """The same copies, none of which lies in two pieces; the other end is device memory."""
        for run in runs:
            host = run.target if to_host else run.source
            at = 0
            while at < run.nbytes:
                nbytes = min(run.nbytes - at, self._room(host + at))
                yield Run(run.source + at, run.target + at, nbytes)
                at += nbytes

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

    def _room(self, address: int) -> int:
        """Bytes from ``address`` to the next place where a copy is cut."""
        offset = address - self._address
        if offset < 0:
            return -offset
        if offset >= self._nbytes:
            return 1 << 62
        return min(self._piece - offset % self._piece, self._nbytes - offset)
