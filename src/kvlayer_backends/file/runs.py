"""Objects in the order in which they were used. Pure memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

__all__ = ["Run"]


class Run:
    """Objects by time of use, the earliest first, in flat arrays: (ns, row, entry) each."""

    def __init__(self) -> None:
        self._used_ns = array("q")
        self._rows = array("I")
        self._entries = array("Q")

    def append(self, used_ns: int, row: int, entry: int) -> None:
        self._used_ns.append(used_ns)
        self._rows.append(row)
        self._entries.append(entry)

    @property
    def first_ns(self) -> array[int]:
        """The earliest time, if there is any."""
        return self._used_ns[:1]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self._used_ns, self._rows, self._entries, strict=True)
