"""Object keys as numbers and back, in flat memory: some 55 bytes a key. Pure.

A key's text costs several times that, and the garbage collector looks at each one: a tier that
knows a million of them would stop its process for a second at a time. Here it looks at none.
"""

# The stubs of array and bytearray say less than is so.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnnecessaryComparison=false

from __future__ import annotations

from array import array
from collections.abc import Iterator
from os import urandom
from struct import Struct
from typing import TypeAlias

from kvlayer.identity.keys import ObjectKey

__all__ = ["KeyTable"]

_DIGEST = 32
_WORDS = Struct("<Q")

Frame: TypeAlias = tuple[str, str | None]
"""What stands before and after the hash in a key. None: it has no hash, and stands for itself."""


_SEGMENTS = 512
"""Parts of the hash table. Each grows by itself, so that no call moves more than a few of its rows.
"""
_SEGMENT_SHIFT = 55
_SLOT_SHIFT = 24
_WORD = (1 << 64) - 1
_MULTIPLIER = int.from_bytes(urandom(8)) | 1  # nobody can make keys that all meet in one place
_FEWEST = 16  # slots of a segment
_GROWTH = 4
_EMPTY, _GONE, _ROWS = range(3)
"""What a slot holds: nothing, what is no more, or a row and 2 added to it."""


class KeyTable:
    """A mapping of keys to row numbers that somebody else hands out, and from those back to keys.

    Of a key it keeps the chunk hash, and once for all keys that share it the text around it. Keys
    of one namespace are a family: within it they can be found by their hash alone. Other threads
    may ask for keys while one changes the table.
    """

    __slots__ = ("_count", "_digests", "_families", "_frame_count", "_frame_ids", "_frames",
                 "_left", "_of_row", "_segments", "_uses")  # fmt: skip

    def __init__(self) -> None:
        self._segments: list[array[int]] = [
            array("I", bytes(4 * _FEWEST)) for _ in range(_SEGMENTS)
        ]
        """Open hash tables of rows, by family and hash. One that is too full is replaced."""
        self._left = array("I", (_most(n, _FEWEST) for n in range(_SEGMENTS)))
        """How many more slots of each segment may be taken."""
        self._count = 0
        self._frame_ids: dict[Frame, int] = {}
        """Frames by number. A number is used once, or another thread might mix up two."""
        self._frames: dict[int, Frame] = {}
        self._families: dict[int, int] = {}
        """By frame, its family: 64 bits."""
        self._uses: dict[int, int] = {}
        """How many keys have a frame: it goes with the last."""
        self._frame_count = 0
        self._digests = bytearray()
        self._of_row = array("Q")
        """The frame of each row's key."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ObjectKey]:
        return map(self.key, self.rows())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.row(key) is not None

    def rows(self) -> array[int]:
        """The rows of all keys."""
        found = array("I")
        for slots in self._segments:
            found.extend(slot - _ROWS for slot in slots if slot >= _ROWS)
        return found

    def row(self, key: str) -> int | None:
        """The row of a key, if it is known."""
        frame, digest = _cut(key)
        number = self._frame_ids.get(frame)
        if number is None:
            return None
        found = self._find(number, self._families.get(number, 0), digest)
        return None if found is None else found[2]

    def key(self, row: int) -> ObjectKey:
        """The key of a row that has one."""
        head, tail = self._frames[self._of_row[row]]
        if tail is None:
            return ObjectKey(head)
        return ObjectKey(head + self._digests[row * _DIGEST : (row + 1) * _DIGEST].hex() + tail)

    def add(self, key: str, row: int) -> bool:
        """Let a row stand for a key that is not known.

        False where no other key of its family has its hash, as far as that was seen in passing.
        """
        frame, digest = _cut(key)
        number = self._frame_ids.get(frame)
        if number is None:
            number = self._frame_ids[frame] = self._frame_count
            self._frame_count += 1
            self._frames[number] = frame
            self._families[number] = _family(frame)
            self._uses[number] = 0
        self._uses[number] += 1
        more = row + 1 - len(self._of_row)
        if more > 0:
            self._of_row.frombytes(bytes(more * self._of_row.itemsize))
            self._digests.extend(bytes(more * _DIGEST))
        self._of_row[row] = number
        self._digests[row * _DIGEST : (row + 1) * _DIGEST] = digest
        self._count += 1
        (prefix,) = _WORDS.unpack_from(digest)
        mixed = (self._families[number] ^ prefix) * _MULTIPLIER & _WORD
        segment = mixed >> _SEGMENT_SHIFT
        if not self._left[segment]:
            self._rebuild(segment)
        slots = self._segments[segment]
        mask = len(slots) - 1
        at = mixed >> _SLOT_SHIFT & mask
        is_met = bool(slots[at])
        while slots[at] >= _ROWS:
            at = (at + 1) & mask
        if slots[at] == _EMPTY:
            self._left[segment] -= 1
        slots[at] = row + _ROWS
        return is_met

    def pop(self, key: str) -> int | None:
        """Forget a key; the row it had, if it was known."""
        frame, digest = _cut(key)
        number = self._frame_ids.get(frame)
        found = None if number is None else self._find(number, self._families[number], digest)
        if found is None or number is None:
            return None
        slots, at, row = found
        slots[at] = _GONE
        self._count -= 1
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._frame_ids[frame], self._frames[number], self._uses[number]
            del self._families[number]
        return row

    # -- families --------------------------------------------------------------------------------

    @staticmethod
    def place(key: str) -> tuple[int, int]:
        """The family of any key, and the first 64 bits of its hash.

        A family is a number of 64 bits, the same for all keys of one namespace.
        """
        frame, digest = _cut(key)
        return _family(frame), _prefix(digest)

    @staticmethod
    def family(key: str) -> int:
        """The family of a key that has a hash."""
        return hash(key.partition("/")[0]) & _WORD

    def family_of(self, row: int) -> int:
        """The family of a row that has a key."""
        return self._families[self._of_row[row]]

    def prefix(self, row: int) -> int:
        """The first 64 bits of the hash in a row's key."""
        (prefix,) = _WORDS.unpack_from(self._digests, row * _DIGEST)
        return int(prefix)

    def ending(self, family: int, prefix: int) -> list[int]:
        """The rows of a family whose hash begins so, whatever else their keys say."""
        mixed = (family ^ prefix) * _MULTIPLIER & _WORD
        slots = self._segments[mixed >> _SEGMENT_SHIFT]
        mask, found = len(slots) - 1, list[int]()
        at = mixed >> _SLOT_SHIFT & mask
        if not slots[at]:
            return found
        digests, read = self._digests, _WORDS.unpack_from
        while slot := slots[at]:
            row = slot - _ROWS
            is_same = row >= 0 and read(digests, row * _DIGEST)[0] == prefix
            if is_same and self._families[self._of_row[row]] == family:
                found.append(row)
            at = (at + 1) & mask
        return found

    # -- the hash table --------------------------------------------------------------------------

    def _find(self, number: int, family: int, digest: bytes) -> tuple[array[int], int, int] | None:
        """Where a key stands: the slots, which of them, and its row."""
        segment, at = _place(family, _prefix(digest))
        slots = self._segments[segment]
        mask, digests, frames = len(slots) - 1, self._digests, self._of_row
        while slot := slots[at & mask]:
            if slot >= _ROWS:
                row = slot - _ROWS
                start = row * _DIGEST
                known: object = digests[start : start + _DIGEST]  # equal to bytes, as those are
                if frames[row] == number and known == digest:
                    return slots, at & mask, row
            at += 1
        return None

    def _rebuild(self, segment: int) -> None:
        """Clear a segment of what has gone from it, and make it larger if that is not enough."""
        rows = [slot - _ROWS for slot in self._segments[segment] if slot >= _ROWS]
        size = len(self._segments[segment])
        if 2 * len(rows) >= _most(segment, size):
            size *= _GROWTH
        slots, mask = array("I", bytes(4 * size)), size - 1
        families, frames, digests = self._families, self._of_row, self._digests
        read = _WORDS.unpack_from
        for row in rows:
            (prefix,) = read(digests, row * _DIGEST)
            at = ((families[frames[row]] ^ prefix) * _MULTIPLIER & _WORD) >> _SLOT_SHIFT & mask
            while slots[at]:
                at = (at + 1) & mask
            slots[at] = row + _ROWS
        self._left[segment] = _most(segment, size) - len(rows)
        self._segments[segment] = slots  # last: another thread may be looking into the old one


def _most(segment: int, size: int) -> int:
    """How many slots may be taken: some 40 to 70%, so that not all segments grow at once."""
    return size * (27 + 17 * segment // _SEGMENTS) // 64


def _place(family: int, prefix: int) -> tuple[int, int]:
    """Where to look: the segment, and the number of its first slot, to be cut to its size."""
    mixed = (family ^ prefix) * _MULTIPLIER & _WORD
    return mixed >> _SEGMENT_SHIFT, mixed >> _SLOT_SHIFT


def _prefix(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")


def _family(frame: Frame) -> int:
    head, tail = frame
    return hash(head if tail is None else head.partition("/")[0]) & _WORD


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
