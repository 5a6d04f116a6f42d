"""The interface of a codec without loss: it codes an object's segments, each by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from kvlayer.payload import Payload, Segment

__all__ = ["Codec", "Coded"]


class Coded(NamedTuple):
    """A segment that was coded: its bytes in all, and how many of those come first and are the
    codec's own, to decode the rest with.
    """

    nbytes: int
    meta_nbytes: int = 0


class Codec(ABC):
    """Codes segments, and gives back what was coded to the bit.

    Called on threads, several at once. It allocates nothing that grows with a segment beyond the
    memory it is lent, keeps none of that, and lets go of the interpreter's lock where it takes
    long. What a codec of one ``name`` has coded every codec of that name can read, for good.
    """

    name: ClassVar[str]
    """``[a-z0-9][a-z0-9_-]{0,31}``: stands in the names of the objects, with its version."""

    @abstractmethod
    def bound(self, payload: Payload, segment: Segment, /) -> int:
        """At most so many bytes are written for a segment, whatever it holds."""

    @abstractmethod
    def encode(
        self, payload: Payload, segment: Segment, raw: Sequence[memoryview], into: memoryview, /
    ) -> Coded:
        """Code the bytes that ``raw`` are together into the beginning of ``into``.

        ``into`` has :meth:`bound` bytes; ``raw`` is the caller's: views that cannot be written.
        """

    @abstractmethod
    def decode(
        self,
        payload: Payload,
        segment: Segment,
        coded: memoryview,
        meta_nbytes: int,
        into: Sequence[memoryview],
        /,
    ) -> None:
        """Fill ``into``, which have ``segment.nbytes`` bytes together; nothing else is written.

        The checksum of ``coded`` was compared. Raises ``ValueError`` for what :meth:`encode` cannot
        have made.
        """
