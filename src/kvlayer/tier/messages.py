"""What a Planner and a Mover say to each other: plain values that cross a process boundary.

Every message is a tuple of integers, strings, bytes and lists of such: msgpack carries it as it is
(``to_wire``) and rebuilds it (``from_wire``). Memory is named by its offset in the shared slab.
"""

from __future__ import annotations

from typing import NamedTuple, Self

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
        key, *numbers = wire
        if not isinstance(key, str) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError(f"not a piece: {wire!r}")
        first, tokens, offset, nbytes = (int(n) for n in numbers)
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
        key, cause, detail, nbytes, seconds = wire
        return cls(
            ObjectKey.parse(str(key)),
            None if cause is None else Cause(str(cause)),
            str(detail),
            int(nbytes or 0),
            float(seconds or 0.0),
        )
