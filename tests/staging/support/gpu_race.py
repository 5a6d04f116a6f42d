"""Vector clocks over memory: which accesses of a simulated GPU nothing orders, on any schedule.

Streams, events and the host each know how far they have followed every other (Lamport, Mattern);
memory knows, for every four bytes, who wrote it last and who has read it since (as FastTrack does,
Flanagan and Freund 2009). Two accesses of which one writes, and neither has followed the other, are
a race, also when the bytes happen to be right.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["HOST", "MAX_ACTORS", "Clock", "Races"]

GRAIN = 4
MAX_ACTORS = 64
HOST = 0
Clock = NDArray[np.int64]


class _Region:
    """Memory from ``start`` on: for each grain, the last write and the last read of each actor."""

    def __init__(self, start: int, nbytes: int) -> None:
        grains = -(-nbytes // GRAIN)
        self.start, self.stop = start, start + nbytes
        self.writer = np.zeros(grains, np.int8)
        self.written = np.zeros(grains, np.int64)
        self.write_op = np.zeros(grains, np.int32)
        self.reads: dict[int, NDArray[np.int64]] = {}

    def grains(self, starts: NDArray[np.int64], nbytes: int) -> NDArray[np.int64]:
        first = (starts - self.start) // GRAIN
        last = (starts + nbytes - 1 - self.start) // GRAIN
        width = int((last - first).max()) + 1
        index = first[:, None] + np.arange(width)
        return np.unique(np.minimum(index, last[:, None]))


class Races:
    """What happened before what. One actor per stream; 0 is the host."""

    def __init__(self) -> None:
        self._clocks: dict[int, Clock] = {}
        self._seats: dict[int, int] = {HOST: 0}
        self.found: list[str] = []
        self._starts: list[int] = []
        self._regions: dict[int, _Region] = {}
        self._labels = ["nobody"]

    def add(self, start: int, nbytes: int) -> None:
        """Watch this memory."""
        self._starts.append(start)
        self._starts.sort()
        self._regions[start] = _Region(start, nbytes)

    def remove(self, start: int) -> None:
        self._starts.remove(start)
        del self._regions[start]

    def begin(self, actor: int) -> Clock:
        """The actor does something: it has followed the host, which told it to."""
        clock = self.clock(actor)
        if actor != HOST:
            np.maximum(clock, self.clock(HOST), out=clock)
        clock[self._seat(actor)] += 1
        return clock

    def clock(self, actor: int) -> Clock:
        """How far the actor has followed each other, by seats."""
        return self._clocks.setdefault(actor, np.zeros(MAX_ACTORS, np.int64))

    def _seat(self, actor: int) -> int:
        return self._seats.setdefault(actor, len(self._seats))

    def join(self, actor: int, other: Clock) -> None:
        """The actor follows whatever ``other`` had followed."""
        clock = self.clock(actor)
        np.maximum(clock, other, out=clock)

    def access(
        self,
        actor: int,
        label: str,
        reads: Iterable[tuple[NDArray[np.int64], int]],
        writes: Iterable[tuple[NDArray[np.int64], int]],
    ) -> None:
        """Note accesses by (addresses, bytes at each), and what they race with."""
        clock, seat = self.begin(actor), self._seat(actor)
        self._labels.append(label)
        for starts, nbytes in reads:
            for region, grains in self._split(starts, nbytes):
                self._check_write(region, grains, clock, label)
                seen = region.reads.setdefault(seat, np.zeros(len(region.writer), np.int64))
                seen[grains] = clock[seat]
        for starts, nbytes in writes:
            for region, grains in self._split(starts, nbytes):
                self._check_write(region, grains, clock, label)
                for reader, seen in region.reads.items():
                    if (seen[grains] > clock[reader]).any():
                        self._note(f"{label} overwrites what actor {reader} still reads")
                region.writer[grains] = seat
                region.written[grains] = clock[seat]
                region.write_op[grains] = len(self._labels) - 1

    def _check_write(
        self, region: _Region, grains: NDArray[np.int64], clock: Clock, label: str
    ) -> None:
        late = clock[region.writer[grains]] < region.written[grains]
        if late.any():
            writer = self._labels[int(region.write_op[grains][late][0])]
            self._note(f"{label} does not follow the write of {writer}")

    def _split(
        self, starts: NDArray[np.int64], nbytes: int
    ) -> Iterable[tuple[_Region, NDArray[np.int64]]]:
        left = np.asarray(starts, np.int64)
        while len(left):
            at = bisect_right(self._starts, int(left[0])) - 1
            region = self._regions[self._starts[at]]
            inside = (left >= region.start) & (left < region.stop)
            assert inside[0], f"access to {int(left[0]):#x}, which nobody has"
            yield region, region.grains(left[inside], nbytes)
            left = left[~inside]

    def _note(self, text: str) -> None:
        if text not in self.found:
            self.found.append(text)
