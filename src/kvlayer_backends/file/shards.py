"""Which objects lie in which folder, as row numbers. Pure memory."""

from __future__ import annotations

from array import array

from kvlayer_backends.file.paths import Shard

__all__ = ["Shards"]

_NOBODY = -1


class Shards:
    """Which rows lie in which shard: a list for each, linked through flat arrays.

    A shard that has become empty stays known until it is dropped.
    """

    def __init__(self) -> None:
        self._first: dict[Shard, int] = {}
        self._next = array("i")
        self._previous = array("i")

    def add(self, shard: Shard, row: int) -> None:
        more = row + 1 - len(self._next)
        if more > 0:
            self._next.frombytes(bytes(more * self._next.itemsize))
            self._previous.frombytes(bytes(more * self._previous.itemsize))
        after = self._first.get(shard, _NOBODY)
        self._first[shard] = row
        self._previous[row], self._next[row] = _NOBODY, after
        if after != _NOBODY:
            self._previous[after] = row

    def discard(self, shard: Shard, row: int) -> None:
        before, after = self._previous[row], self._next[row]
        if after != _NOBODY:
            self._previous[after] = before
        if before != _NOBODY:
            self._next[before] = after
        else:
            self._first[shard] = after

    def rows(self, shard: Shard) -> list[int]:
        """Those of one shard, which is known from now on."""
        rows: list[int] = []
        row = self._first.setdefault(shard, _NOBODY)
        while row != _NOBODY:
            rows.append(row)
            row = self._next[row]
        return rows

    def known(self) -> list[Shard]:
        return list(self._first)

    def is_empty(self, shard: Shard) -> bool:
        return self._first.get(shard, _NOBODY) == _NOBODY

    def drop(self, shard: Shard) -> None:
        if self.is_empty(shard):
            self._first.pop(shard, None)
