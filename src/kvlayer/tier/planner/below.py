"""What only lower tiers hold, as far as is known: flat memory, some 250 bytes an object. Pure.

A directory of a million objects would otherwise be millions of Python objects, and the garbage
collector would stop the process for a second to look at each of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from kvlayer.eviction.lists import Lists
from kvlayer.identity.keys import Part
from kvlayer.retention import ORDINARY, Retention
from kvlayer.tier.planner.copies import of_tier, with_copy

__all__ = ["BelowTable", "Known", "SpanName"]

_DIGEST = 32
_NOBODY = -1
_UNKNOWN = 0xFFFFFFFF

SpanName: TypeAlias = tuple[str, bytes, int, str]
"""Which span it is: its namespace, the hash at its end, its tokens, its zone."""


class Known(NamedTuple):
    """What is known of one object."""

    part: Part
    tiers: int
    """Bit t: tier t holds it."""
    first_token: int | None = None
    """Where it starts in its prompts, if that was ever told."""
    retention: Retention = ORDINARY
    copies: int = 0
    """How it lies there, as far as is known: see :mod:`kvlayer.tier.planner.copies`."""


class _Kind(NamedTuple):
    namespace: str
    tokens: int
    zone: str
    part: Part


class BelowTable:
    """Objects by the hash at the end of their span, the least recently used first to be forgotten.

    Rows of one span are added and removed together by the directory, or one by one by a listing.
    """

    def __init__(self) -> None:
        self._first: dict[bytes, int] = {}
        """End hash -> one of its rows; ``_next`` leads to the others."""
        self._next = array("i")
        self._digests = bytearray()
        self._kind = array("I")
        self._tiers = array("I")
        self._starts = array("I")
        self._priorities = array("b")
        self._keep_until = array("d")
        self._copies: dict[int, array[int]] = {}
        """By tier and row, how the object lies there. A row beyond the end: not known."""
        self._order = Lists()
        self._free = array("I")
        self._kinds: dict[_Kind, int] = {}
        self._kind_of: dict[int, _Kind] = {}
        self._kind_uses: dict[int, int] = {}
        self._next_kind = 0
        self.objects = 0
        self.spans = 0

    def __contains__(self, end_hash: bytes) -> bool:
        return end_hash in self._first

    def ends(self) -> list[bytes]:
        """The end hashes of all spans."""
        return list(self._first)

    def ending(self, end_hash: bytes) -> list[SpanName]:
        """The spans that end so, in every namespace."""
        kinds = [self._kind_of[self._kind[row]] for row in self._rows(end_hash)]
        names = ((kind.namespace, end_hash, kind.tokens, kind.zone) for kind in kinds)
        return list(dict.fromkeys(names))

    def tiers(self, name: SpanName, part: Part) -> int:
        """Which tiers hold an object; 0 where it is not known here."""
        row = self._row(name, part)
        return 0 if row == _NOBODY else self._tiers[row]

    def add(self, name: SpanName, known: Known) -> None:
        """An object that is not known here; the most recent now."""
        namespace, end_hash, tokens, zone = name
        if next(self._of_span(name), None) is None:
            self.spans += 1
        row = self._free.pop() if self._free else self._grow()
        kind = self._kind_number(_Kind(namespace, tokens, zone, known.part))
        self._kind[row] = kind
        self._digests[row * _DIGEST : (row + 1) * _DIGEST] = end_hash
        self._tiers[row] = known.tiers
        first_token = known.first_token
        self._starts[row] = _UNKNOWN if first_token is None else first_token
        self._priorities[row] = known.retention.priority
        self._keep_until[row] = known.retention.keep_until
        for tier in {*self._copies, *_tiers(known.copies and known.tiers)}:
            self._note_copy(row, tier, of_tier(known.copies, tier))
        self._next[row] = self._first.get(end_hash, _NOBODY)
        self._first[end_hash] = row
        self._order.append(0, (row,))
        self.objects += 1

    def hold(self, name: SpanName, part: Part, tier: int, copy: int) -> int:
        """A tier holds an object that is known here, as ``copy`` says; what was known of that."""
        row = self._row(name, part)
        self._tiers[row] |= 1 << tier
        before = self._copy(row, tier)
        if copy:
            self._note_copy(row, tier, copy)
        return before

    def _copy(self, row: int, tier: int) -> int:
        column = self._copies.get(tier, ())
        return column[row] if row < len(column) else 0

    def _note_copy(self, row: int, tier: int, copy: int) -> None:
        column = self._copies.setdefault(tier, array("Q"))
        if row >= len(column):
            if not copy:
                return
            column.frombytes(bytes((len(self._next) - len(column)) * column.itemsize))
        column[row] = copy

    def read(self, name: SpanName) -> list[Known]:
        """What is known of a span's objects; they are the most recent now."""
        rows = list(self._of_span(name))
        self._order.move(0, rows)
        return [
            Known(
                self._kind_of[self._kind[row]].part,
                self._tiers[row],
                None if self._starts[row] == _UNKNOWN else self._starts[row],
                Retention(self._priorities[row], self._keep_until[row]),
                self._copies_of(row),
            )
            for row in rows
        ]

    def remove(self, name: SpanName) -> None:
        """Take a span's objects out."""
        for row in list(self._of_span(name)):
            self._unlink(name[1], row)
            self._order.unlink((row,))
            self._let_kind_go(self._kind[row])
            self._free.append(row)
            self.objects -= 1
        self.spans -= 1

    def oldest(self) -> SpanName | None:
        """The span of the object that was used longest ago."""
        row = self._order.first()
        if row is None:
            return None
        kind = self._kind_of[self._kind[row]]
        end_hash = bytes(self._digests[row * _DIGEST : (row + 1) * _DIGEST])
        return kind.namespace, end_hash, kind.tokens, kind.zone

    def _copies_of(self, row: int) -> int:
        copies = 0
        for tier in _tiers(self._tiers[row]):
            copies = with_copy(copies, tier, self._copy(row, tier))
        return copies

    # -- rows ------------------------------------------------------------------------------------

    def _rows(self, end_hash: bytes) -> Iterator[int]:
        row = self._first.get(end_hash, _NOBODY)
        while row != _NOBODY:
            yield row
            row = self._next[row]

    def _of_span(self, name: SpanName) -> Iterator[int]:
        namespace, end_hash, tokens, zone = name
        for row in self._rows(end_hash):
            kind = self._kind_of[self._kind[row]]
            if (kind.namespace, kind.tokens, kind.zone) == (namespace, tokens, zone):
                yield row

    def _row(self, name: SpanName, part: Part) -> int:
        namespace, end_hash, tokens, zone = name
        kind = self._kinds.get(_Kind(namespace, tokens, zone, part))
        return next((row for row in self._rows(end_hash) if self._kind[row] == kind), _NOBODY)

    def _grow(self) -> int:
        row = len(self._next)
        self._next.append(_NOBODY)
        self._digests.extend(bytes(_DIGEST))
        self._kind.append(0)
        self._tiers.append(0)
        self._starts.append(0)
        self._priorities.append(0)
        self._keep_until.append(0.0)
        self._order.fit(row + 1)
        return row

    def _unlink(self, end_hash: bytes, row: int) -> None:
        before, at = _NOBODY, self._first[end_hash]
        while at != row:
            before, at = at, self._next[at]
        after = self._next[row]
        if before != _NOBODY:
            self._next[before] = after
        elif after != _NOBODY:
            self._first[end_hash] = after
        else:
            del self._first[end_hash]

    def _kind_number(self, kind: _Kind) -> int:
        number = self._kinds.get(kind)
        if number is None:
            number = self._kinds[kind] = self._next_kind
            self._next_kind += 1
            self._kind_of[number] = kind
            self._kind_uses[number] = 0
        self._kind_uses[number] += 1
        return number

    def _let_kind_go(self, number: int) -> None:
        """A zone that holds nothing any more is forgotten."""
        self._kind_uses[number] -= 1
        if not self._kind_uses[number]:
            del self._kinds[self._kind_of.pop(number)], self._kind_uses[number]


def _tiers(bits: int) -> list[int]:
    return [tier for tier in range(1, bits.bit_length()) if bits >> tier & 1]
