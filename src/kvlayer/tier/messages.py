"""What a Planner and its movers say to each other: plain values that cross a process boundary.

A Planner greets its ranks once (:class:`Greeting`) and then sends them orders (:class:`Order`); a
rank answers each with a :class:`Completion`. All are tuples of integers, strings and lists of such
and travel as bytes (``to_bytes``, ``from_bytes``); the transport is the engine's. Memory is named
by its offset in the shared slab.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import StrEnum
from math import isfinite
from typing import NamedTuple, Self, TypeGuard

from kvlayer._pack import as_list, is_count, pack, unpack
from kvlayer.errors import MessageError
from kvlayer.identity.keys import ObjectKey
from kvlayer.memory.handle import SlabHandle
from kvlayer.results import Cause
from kvlayer.retention import ORDINARY, Retention

__all__ = ["MAX_PIECES", "VERSION", "Completion", "Greeting", "Order", "Outcome", "Piece", "Verb"]

VERSION = 1
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

    def to_wire(self) -> list[str | int]:
        return [str(self.key), self.first_token, self.num_tokens, self.offset, self.nbytes]

    @classmethod
    def from_wire(cls, wire: object) -> Self:
        """Raises ``ValueError`` for anything ``to_wire`` cannot have made."""
        if not _is_list(wire, 5):
            raise ValueError(f"not a piece: {wire!r}")
        key, first, tokens, offset, nbytes = wire
        if not isinstance(key, str) or not (
            is_count(first) and is_count(tokens) and is_count(offset) and is_count(nbytes)
        ):
            raise ValueError(f"not a piece: {wire!r}")
        return cls(ObjectKey.parse(key), first, tokens, offset, nbytes)


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

    def to_wire(self) -> list[str | int | float | None]:
        cause = None if self.cause is None else self.cause.value
        return [str(self.key), cause, self.detail, self.nbytes, self.seconds]

    @classmethod
    def from_wire(cls, wire: object) -> Self:
        """Raises ``ValueError`` for anything ``to_wire`` cannot have made."""
        if not _is_list(wire, 5):
            raise ValueError(f"not an outcome: {wire!r}")
        key, cause, detail, nbytes, seconds = wire
        if not (
            isinstance(key, str)
            and (cause is None or isinstance(cause, str))
            and isinstance(detail, str)
            and is_count(nbytes)
            and isinstance(seconds, float)
            and isfinite(seconds)
            and seconds >= 0
        ):
            raise ValueError(f"not an outcome: {wire!r}")
        reason = None if cause is None else Cause(cause)
        return cls(ObjectKey.parse(key), reason, detail, nbytes, seconds)


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


class Order(NamedTuple):
    """What one rank is to move between its tensors and the slab.

    ``view`` is the engine's own name for the tensors and slots (a request's id, say); entry 0 of
    that view is the prompt's token ``start``, and it covers the tokens up to ``stop``. Until the
    completion arrives the slots of its pieces belong to the rank.
    """

    number: int
    rank: int
    verb: Verb
    view: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    def to_bytes(self) -> bytes:
        return pack([_ORDER, VERSION, *self[:-1], [piece.to_wire() for piece in self.pieces]])

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """Raises ``MessageError`` for anything ``to_bytes`` cannot have made."""
        number, rank, verb, view, start, stop, pieces = _fields(packed, _ORDER, 7)
        listed = as_list(pieces)
        if not (
            is_count(number)
            and is_count(rank)
            and isinstance(verb, str)
            and isinstance(view, str)
            and is_count(start)
            and is_count(stop)
            and listed is not None
        ):
            raise MessageError("an order's fields are not of the kinds they should be")
        try:
            found = tuple(Piece.from_wire(piece) for piece in listed)
            return cls(number, rank, Verb(verb), view, start, stop, found)
        except ValueError as exc:
            raise MessageError(f"not an order: {exc}") from None


class Completion(NamedTuple):
    """How an order ended, for each of its pieces. The rank has let go of the slab."""

    number: int
    rank: int
    outcomes: tuple[Outcome, ...]

    def to_bytes(self) -> bytes:
        wire = [outcome.to_wire() for outcome in self.outcomes]
        return pack([_COMPLETION, VERSION, self.number, self.rank, wire])

    @classmethod
    def from_bytes(cls, packed: bytes) -> Self:
        """Raises ``MessageError`` for anything ``to_bytes`` cannot have made."""
        number, rank, outcomes = _fields(packed, _COMPLETION, 3)
        listed = as_list(outcomes)
        if not (is_count(number) and is_count(rank) and listed is not None):
            raise MessageError("a completion's fields are not of the kinds they should be")
        try:
            return cls(number, rank, tuple(Outcome.from_wire(each) for each in listed))
        except ValueError as exc:
            raise MessageError(f"not a completion: {exc}") from None


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


def _is_list(wire: object, count: int) -> TypeGuard[list[object]]:
    return len(as_list(wire) or ()) == count
