"""What a Planner and a Mover say to each other: plain values that cross a process boundary.

Every message is a tuple of integers, strings, bytes and lists of such: msgpack carries it as it is
(``to_wire``) and rebuilds it (``from_wire``). Memory is named by its offset in the shared slab.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple, Self, TypeGuard

from kvlayer._pack import as_list
from kvlayer.keys import ObjectKey
from kvlayer.results import Cause

__all__ = ["Outcome", "Piece"]


class Piece(NamedTuple):
    """One object and its place in the slab: what to gather, scatter, spill or fetch.

    ``first_token`` is the position of the object's first token in the prompt, ``num_tokens`` how
    many it holds, ``offset`` and ``nbytes`` its slot.
    """

    key: ObjectKey
    first_token: int
    num_tokens: int
    offset: int
    nbytes: int

    def to_wire(self) -> list[str | int]:
        return [str(self.key), *self[1:]]

    @classmethod
    def from_wire(cls, wire: list[str | int]) -> Self:
        """Raises ``ValueError`` for anything ``to_wire`` cannot have made."""
        if not _is_list(wire, 5):
            raise ValueError(f"not a piece: {wire!r}")
        key, first, tokens, offset, nbytes = wire
        if not isinstance(key, str) or not (
            _is_count(first) and _is_count(tokens) and _is_count(offset) and _is_count(nbytes)
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

    @property
    def ok(self) -> bool:
        return self.cause is None

    def to_wire(self) -> list[str | int | float | None]:
        cause = None if self.cause is None else self.cause.value
        return [str(self.key), cause, self.detail, self.nbytes, self.seconds]

    @classmethod
    def from_wire(cls, wire: list[str | int | float | None]) -> Self:
        """Raises ``ValueError`` for anything ``to_wire`` cannot have made."""
        if not _is_list(wire, 5):
            raise ValueError(f"not an outcome: {wire!r}")
        key, cause, detail, nbytes, seconds = wire
        if not (
            isinstance(key, str)
            and (cause is None or isinstance(cause, str))
            and isinstance(detail, str)
            and _is_count(nbytes)
            and isinstance(seconds, float)
            and isfinite(seconds)
            and seconds >= 0
        ):
            raise ValueError(f"not an outcome: {wire!r}")
        reason = None if cause is None else Cause(cause)
        return cls(ObjectKey.parse(key), reason, detail, nbytes, seconds)


def _is_list(wire: object, count: int) -> TypeGuard[list[object]]:
    return len(as_list(wire) or ()) == count


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
