"""What a Planner and its movers say to each other: plain values that cross a process boundary.

A Planner greets its ranks once (:class:`Greeting`) and then sends them orders (:class:`Order`,
which a rank hears as a :class:`Task`); a rank answers each with a :class:`Completion`. All are
tuples of integers, strings, lists and tables of such and travel as bytes (``to_bytes``,
``from_bytes``); the transport is the engine's. Memory is named by its offset in the shared slab.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable, Sequence
from enum import StrEnum
from typing import NamedTuple, Self

from kvlayer._pack import as_list, is_count, pack, unpack
from kvlayer.errors import MessageError
from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.memory.handle import SlabHandle
from kvlayer.results import Cause
from kvlayer.retention import ORDINARY, Retention

__all__ = [
    "MAX_PIECES",
    "VERSION",
    "Completion",
    "Greeting",
    "Missed",
    "Order",
    "Outcome",
    "Piece",
    "Slot",
    "Task",
    "Verb",
]

VERSION = 2
"""Of greetings, orders and completions: both ends must run the same."""

_GREETING, _ORDER, _COMPLETION = "a greeting", "an order", "a completion"

MAX_PIECES = 512
"""Pieces in one order at most; a longer move is several orders."""


class Piece(NamedTuple):
    """One object and its place in the slab: what to gather, scatter, spill or fetch.

    ``first_token`` is the position of the object's first token in the prompt, ``num_tokens`` how
    many it holds, ``offset`` and ``nbytes`` its slot. ``retention`` and ``parent`` (of its span)
    are for a tier that it is written to, and do not travel to ranks.
    """

    key: ObjectKey
    first_token: int
    num_tokens: int
    offset: int
    nbytes: int
    retention: Retention = ORDINARY
    parent: bytes = b""

    @property
    def part(self) -> Part:
        """What the object holds of its tokens."""
        return self.key.part


class Slot(NamedTuple):
    """What a rank is told of a piece: which part of which tokens, and its place in the slab."""

    part: Part
    first_token: int
    num_tokens: int
    offset: int
    nbytes: int


class Outcome(NamedTuple):
    """How one move ended. ``cause`` is None when it succeeded."""

    key: ObjectKey
    cause: Cause | None = None
    detail: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    version: Hashable = None
    """Which bytes a tier gave, for its quarantine. Stays in the process."""
    copy: int = 0
    """How the object lies on that tier (:mod:`kvlayer.tier.planner.copies`). Stays, too."""

    @property
    def ok(self) -> bool:
        return self.cause is None


class Greeting(NamedTuple):
    """What a rank needs to join: the slab, and what the planner takes each rank to hold.

    ``held[r]`` describes rank r's share of each KV group (``plan.described``), for comparison.
    """

    slab: SlabHandle
    held: tuple[tuple[str, ...], ...]

    def to_bytes(self) -> bytes:
        return pack([_GREETING, VERSION, self.slab.to_wire(), self.held])

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """Raises ``MessageError`` for anything ``to_bytes`` cannot have made."""
        slab, held = _fields(packed, _GREETING, 2)
        try:
            found = SlabHandle.from_wire(slab)
        except ValueError as exc:
            raise MessageError(f"not a greeting: {exc}") from None
        words: list[tuple[str, ...]] = []
        for rank in as_list(held) or (None,):
            listed = as_list(rank)
            text = tuple(word for word in listed or () if isinstance(word, str))
            if listed is None or len(text) != len(listed):
                raise MessageError("a greeting's fields are not of the kinds they should be")
            words.append(text)
        return cls(found, tuple(words))


class Verb(StrEnum):
    """Which way the bytes of an order go."""

    GATHER = "gather"
    """Out of the rank's tensors into the slab."""
    SCATTER = "scatter"
    """Out of the slab into the rank's tensors."""


class Task(NamedTuple):
    """An order as its rank hears it.

    On the wire the slots are a table: the parts that occur, once each, and a column of unsigned
    64-bit little-endian integers for each thing that is said of a slot.
    """

    number: int
    rank: int
    verb: Verb
    view: str
    start: int
    stop: int
    slots: tuple[Slot, ...]

    def to_bytes(self) -> bytes:
        return _order(self[:-1], [str(slot.part) for slot in self.slots], self.slots)

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """Raises ``MessageError`` for anything ``to_bytes`` cannot have made."""
        number, rank, verb, view, start, stop, parts, table = _fields(packed, _ORDER, 8)
        listed = as_list(parts)
        if not (
            is_count(number)
            and is_count(rank)
            and isinstance(verb, str)
            and isinstance(view, str)
            and is_count(start)
            and is_count(stop)
            and listed is not None
            and isinstance(table, bytes)
        ):
            raise MessageError("an order's fields are not of the kinds they should be")
        try:
            slots = _slots(listed, table)
            return cls(number, rank, Verb(verb), view, start, stop, slots)
        except ValueError as exc:
            raise MessageError(f"not an order: {exc}") from None


class Order(NamedTuple):
    """What one rank is to move between its tensors and the slab.

    ``view`` is the engine's own name for the tensors and slots (a request's id, say); entry 0 of
    that view is the prompt's token ``start``, and it covers the tokens up to ``stop``. Until the
    completion arrives the slots of its pieces belong to the rank, which hears it as a
    :class:`Task`.
    """

    number: int
    rank: int
    verb: Verb
    view: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    def to_bytes(self) -> bytes:
        texts = [piece.key.rpartition("/")[2] for piece in self.pieces]
        return _order(self[:-1], texts, self.pieces)


class Missed(NamedTuple):
    """A slot that was not moved: its place in the order, and why."""

    place: int
    cause: Cause
    detail: str


class Completion(NamedTuple):
    """How an order of ``asked`` slots ended. The rank has let go of the slab.

    ``missed`` is what was not moved, by place; the rest was.
    """

    number: int
    rank: int
    asked: int
    missed: tuple[Missed, ...] = ()

    @classmethod
    def failed(cls, order: Order | Task, detail: str) -> Self:
        """Nothing of an order was moved."""
        asked = len(order[-1])
        missed = tuple(Missed(place, Cause.RANK_DOWN, detail) for place in range(asked))
        return cls(order.number, order.rank, asked, missed)

    def outcomes(self, pieces: Sequence[Piece]) -> list[Outcome]:
        """What it says of the order's pieces."""
        missed = {each.place: each for each in self.missed}
        return [
            Outcome(piece.key, *missed[place][1:])
            if place in missed
            else Outcome(piece.key, nbytes=piece.nbytes)
            for place, piece in enumerate(pieces)
        ]

    def to_bytes(self) -> bytes:
        missed = [(place, cause.value, detail) for place, cause, detail in self.missed]
        return pack([_COMPLETION, VERSION, self.number, self.rank, self.asked, missed])

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """Raises ``MessageError`` for anything ``to_bytes`` cannot have made."""
        number, rank, asked, missed = _fields(packed, _COMPLETION, 4)
        listed = as_list(missed)
        if not (is_count(number) and is_count(rank) and is_count(asked) and listed is not None):
            raise MessageError("a completion's fields are not of the kinds they should be")
        found: list[Missed] = []
        for entry in listed:
            cells = as_list(entry) or []
            place, cause, detail = cells if len(cells) == 3 else (None, None, None)
            least = found[-1].place + 1 if found else 0
            if not (
                is_count(place)
                and least <= place < asked
                and isinstance(cause, str)
                and cause in _CAUSES
                and isinstance(detail, str)
            ):
                raise MessageError(f"not a completion: {entry!r} of {asked} slots")
            found.append(Missed(place, Cause(cause), detail))
        return cls(number, rank, asked, tuple(found))


_COLUMNS = len(Slot._fields)
_CAUSES = frozenset(Cause)


def _order(head: tuple[object, ...], parts: Sequence[str], slots: Sequence[Piece | Slot]) -> bytes:
    """An order for ``slots``, of which each has a part."""
    names: dict[str, int] = {}
    cells = array("Q", [names.setdefault(part, len(names)) for part in parts])
    cells.extend([slot.first_token for slot in slots])
    cells.extend([slot.num_tokens for slot in slots])
    cells.extend([slot.offset for slot in slots])
    cells.extend([slot.nbytes for slot in slots])
    return pack([_ORDER, VERSION, *head, [*names], _table(cells).tobytes()])


def _table(cells: array[int]) -> array[int]:
    """Cells as they lie on the wire, or back."""
    if sys.byteorder == "big":
        cells.byteswap()
    return cells


def _slots(texts: Sequence[object], table: bytes) -> tuple[Slot, ...]:
    """Raises ``ValueError`` for anything ``Task.to_bytes`` cannot have made."""
    cells = array("Q")
    if len(table) % (_COLUMNS * cells.itemsize):
        raise ValueError(f"a table of {len(table)} bytes")
    cells.frombytes(table)
    count = len(cells) // _COLUMNS
    columns = [_table(cells)[at * count : (at + 1) * count] for at in range(_COLUMNS)]
    parts: list[Part] = []
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"not a part: {text!r}")
        parts.append(Part.parse(text))
    # As they were made: each part once, in the order in which they come.
    if [*dict.fromkeys(columns[0])] != [*range(len(parts))] or len({*parts}) != len(parts):
        raise ValueError("its parts are not those of its slots")
    named = [parts[number] for number in columns[0]]
    return tuple(map(Slot, named, *(column.tolist() for column in columns[1:])))


def _fields(packed: bytes, kind: str, count: int) -> list[object]:
    """What follows kind and version in a message. Raises ``MessageError``."""
    try:
        found = as_list(unpack(packed))
    except ValueError as exc:
        raise MessageError(f"expected {kind}, found something else: {exc}") from None
    if not found or found[0] != kind:
        name = found[0] if found else found
        raise MessageError(
            f"expected {kind}, found {name!r}", hint="a message of kvlayer says what it is"
        )
    version = found[1] if len(found) > 1 else None
    if version != VERSION:
        raise MessageError(
            f"expected {kind} of version {VERSION}, found version {version!r}",
            hint="install the same kvlayer-core in the planner's process and in the ranks'",
        )
    if len(found) != count + 2:
        raise MessageError(f"expected {kind} of {count + 2} fields, found {len(found)}")
    return found[2:]
