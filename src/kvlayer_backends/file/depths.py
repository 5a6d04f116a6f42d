"""Which of the objects that were used at about the same time lies deepest in its prompt. Pure.

A prompt is written root first and one object at a time, so by time alone its beginning is the first
to go, and what is kept behind it serves nobody. Objects that were written or used within one epoch
are therefore given up by depth: no matter how many prompts it holds, an object's ancestors were
used in its epoch, or in a later one, and lie less deep.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

from kvlayer.abc.backend import Write
from kvlayer.abc.rows import Rows
from kvlayer.retention import Retention
from kvlayer_backends.file.epochs import Epochs

__all__ = ["Depths"]

_NONE = 0
_SLACK = 64  # entries of rows that have gone that are not worth clearing up


class Depths:
    """Groups rows whose depth is known, one group an epoch and retention. Costs O(log n) a row."""

    def __init__(self, rows: Rows, clock: Callable[[], float]) -> None:
        self._rows = rows
        self._clock = clock
        self._groups = array("I")
        """By row; 0 for one in no group."""
        self._heaps: dict[int, list[int]] = {}
        """By group, (depth, row) of its rows packed into negative numbers, the deepest first."""
        self._sizes: dict[int, int] = {}
        self._current: dict[Retention, int] = {}
        self._next = 1
        self._epochs = Epochs()

    def add(self, rows: Iterable[int]) -> None:
        """Rows were written or used now. Those of unknown depth are left alone."""
        table = self._rows
        for row in rows:
            if not table.tokens[row]:
                continue
            group = self._group(table.retention(row), is_root=table.first_tokens[row] == 0)
            if self._group_of(row) != group:
                self.discard(row)
                self._groups[row] = group
                self._sizes[group] += 1
                self._push(group, row)

    def discard(self, row: int) -> None:
        """A row is in no group any more."""
        group = self._group_of(row)
        self._groups[row] = _NONE
        if group == _NONE:
            return
        self._sizes[group] -= 1
        if self._sizes[group] == 0 and group not in self._current.values():
            del self._sizes[group], self._heaps[group]

    def instead_of(self, row: int) -> int:
        """What should go in the place of ``row``, the next to go by time: the deepest beside it."""
        group = self._group_of(row)
        if group == _NONE:
            return row
        heap = self._heaps[group]
        while heap:
            depth, deepest = divmod(-heap[0], 1 << 32)
            if self._groups[deepest] == group and self._rows.first_tokens[deepest] == depth:
                return deepest if depth > self._rows.first_tokens[row] else row
            heappop(heap)
        return row

    def lies_before(self, row: int, write: Write) -> bool:
        """Whether ``row`` may be part of what comes before an object that is to be written."""
        if not write.tokens or self._group_of(row) == _NONE:
            return False
        is_current = self._groups[row] == self._current.get(write.retention)
        return is_current and self._rows.first_tokens[row] < write.first_token

    def _group_of(self, row: int) -> int:
        more = row + 1 - len(self._groups)
        if more > 0:
            self._groups.frombytes(bytes(more * self._groups.itemsize))
        return self._groups[row]

    def _group(self, retention: Retention, *, is_root: bool) -> int:
        """The group of now."""
        if self._epochs.begins(self._clock(), is_root=is_root):
            for group in self._current.values():
                if self._sizes[group] == 0:
                    del self._sizes[group], self._heaps[group]
            self._current = {}
        group = self._current.get(retention, _NONE)
        if group == _NONE:
            group = self._current[retention] = self._next
            self._next += 1
            self._sizes[group], self._heaps[group] = 0, []
        return group

    def _push(self, group: int, row: int) -> None:
        heap = self._heaps[group]
        heappush(heap, -(self._rows.first_tokens[row] << 32 | row))
        if len(heap) > 2 * self._sizes[group] + _SLACK:
            heap[:] = {at for at in heap if self._groups[-at & 0xFFFFFFFF] == group}
            heapify(heap)
