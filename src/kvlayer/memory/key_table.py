"""Object keys as numbers and back, in flat memory: some 200 bytes a key. Pure.

A key's text costs as much again, and the garbage collector looks at each one: a tier that knows a
million of them would stop its process for a second at a time. Here it looks at none.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TypeAlias

from kvlayer.keys import ObjectKey

__all__ = ["KeyTable"]

_DIGEST = 32

Frame: TypeAlias = tuple[str, str | None]
"""What stands before and after the hash in a key. None: it has no hash, and stands for itself."""


class KeyTable:
    """A mapping of keys to row numbers that somebody else hands out, and from those back to keys.

    Of a key it keeps the chunk hash, and once for all keys that share it the text around it.
    Other threads may ask for keys while one changes the table.
    """

    __slots__ = ("_digests", "_frame_count", "_frame_ids", "_frames", "_of_row", "_rows", "_uses")

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        """Frame and digest -> row."""
        self._frame_ids: dict[Frame, int] = {}
        """Frames by number. A number is used once, or another thread might mix up two."""
        self._frames: dict[int, Frame] = {}
        self._uses: dict[int, int] = {}
        """How many keys have a frame: it goes with the last."""
        self._frame_count = 0
        self._digests = bytearray()
        self._of_row = array("Q")
        """The frame of each row's key."""

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[ObjectKey]:
        return map(self.key, self.rows())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.row(key) is not None

    def rows(self) -> array[int]:
        """The rows of all keys."""
        return array("I", self._rows.values())

    def row(self, key: str) -> int | None:
        """The row of a key, if it is known."""
        frame, digest = _cut(key)
        number = self._frame_ids.get(frame)
        return None if number is None else self._rows.get(_packed(number, digest))

    def key(self, row: int) -> ObjectKey:
        """The key of a row that has one."""
        head, tail = self._frames[self._of_row[row]]
        if tail is None:
            return ObjectKey(head)
        return ObjectKey(head + self._digests[row * _DIGEST : (row + 1) * _DIGEST].hex() + tail)

    def add(self, key: str, row: int) -> None:
        """Let a row stand for a key that is not known."""
        frame, digest = _cut(key)
        number = self._frame_ids.get(frame)
        if number is None:
            number = self._frame_ids[frame] = self._frame_count
            self._frame_count += 1
            self._frames[number] = frame
            self._uses[number] = 0
        self._uses[number] += 1
        more = row + 1 - len(self._of_row)
        if more > 0:
            self._of_row.frombytes(bytes(more * self._of_row.itemsize))
            self._digests.extend(bytes(more * _DIGEST))
        self._of_row[row] = number
        self._digests[row * _DIGEST : (row + 1) * _DIGEST] = digest
        self._rows[_packed(number, digest)] = row

    def pop(self, key: str) -> int | None:
        """Forget a key; the row it had, if it was known."""
        frame, digest = _cut(key)
        number = self._frame_ids.get(frame)
        row = None if number is None else self._rows.pop(_packed(number, digest), None)
        if row is None or number is None:
            return None
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._frame_ids[frame], self._frames[number], self._uses[number]
        return row


def _cut(key: str) -> tuple[Frame, bytes]:
    """A key without its hash, and the hash."""
    start = key.find("/", key.find("/") + 1) + 1
    text = key[start : start + 2 * _DIGEST]
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != _DIGEST or digest.hex() != text:
        return (str(key), None), bytes(_DIGEST)
    return (key[:start], key[start + 2 * _DIGEST :]), digest


def _packed(frame: int, digest: bytes) -> bytes:
    return frame.to_bytes(5, "little") + digest
