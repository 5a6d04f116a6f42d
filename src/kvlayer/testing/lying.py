"""The backend in front of another one that says what is not so; beside those of ``faults``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from random import Random

from kvlayer.abc.backend import (
    Backend,
    Hit,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.faults import Injected, Wrapper

__all__ = ["Lie", "Lying"]


class Lie(StrEnum):
    """What a backend may say that is not so."""

    FLIPPED = "flipped"
    """A read has one bit wrong."""
    SHORTENED = "shortened"
    """A read says it filled less than it did."""
    LENGTHENED = "lengthened"
    """A read says it filled a page more than the object has, or than it was lent."""
    EMPTY = "empty"
    """A read fills nothing and says it filled all."""
    SWAPPED = "swapped"
    """A read fills in another object."""
    DENIED = "denied"
    """It says that it lacks what it has."""
    CLAIMED = "claimed"
    """It says that it has what it lacks."""
    DROPPED = "dropped"
    """A write says it stored the object, and did not."""


class Lying(Wrapper):
    """A ``share`` of what can be lied about is: one of ``lies``, drawn.

    Bytes are spoiled within what was lent, and sizes are those of the object's neighbourhood: it
    is plausible, and wrong.
    """

    def __init__(
        self,
        inner: Backend,
        chance: Random,
        log: list[Injected] | None = None,
        *,
        share: float = 0.1,
        lies: Sequence[Lie] = tuple(Lie),
    ) -> None:
        super().__init__(inner, chance, log)
        self.share = share
        self.lies = lies
        self._seen: list[ObjectKey] = []
        """Some keys that were written, to swap."""

    def _draw(self, *possible: Lie) -> Lie | None:
        lies = [lie for lie in possible if lie in self.lies]
        return self.chance.choice(lies) if lies and self.strikes(self.share) else None

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        sizes = await super().contains(keys)
        for at, key in enumerate(keys):
            lie = self._draw(Lie.CLAIMED if sizes[at] is None else Lie.DENIED)
            if lie is not None:
                self.note("contains", lie, key)
                sizes[at] = 8192 if lie is Lie.CLAIMED else None
        return sizes

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        return [await self._get(read) for read in reads]

    async def _get(self, read: Read) -> ReadResult:
        lie = self._draw(
            Lie.FLIPPED, Lie.SHORTENED, Lie.LENGTHENED, Lie.EMPTY, Lie.SWAPPED, Lie.DENIED
        )
        if lie is Lie.EMPTY:
            self.note("get", lie, read.key)
            return Hit(read.nbytes)
        (result,) = await super().get([read])
        if lie is None or not isinstance(result, Hit) or not result.nbytes:
            return result
        self.note("get", lie, read.key)
        match lie:
            case Lie.FLIPPED:
                self._flip(read, result.nbytes)
            case Lie.SHORTENED:
                return Hit(self.chance.randrange(result.nbytes))
            case Lie.LENGTHENED:
                return Hit(result.nbytes + 4096)
            case Lie.SWAPPED:
                other = self.chance.choice(self._seen) if self._seen else read.key
                await super().get([Read(other, read.regions, read.offset)])
            case _:
                return Miss()
        return result

    def _flip(self, read: Read, nbytes: int) -> None:
        at = self.chance.randrange(nbytes)
        for region in read.regions:
            if at < region.nbytes:
                region[at] ^= 1 << self.chance.randrange(8)
                return
            at -= region.nbytes

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        todo: list[Write] = []
        for write in writes:
            lie = self._draw(Lie.DROPPED)
            if lie is None:
                todo.append(write)
            else:
                self.note("put", lie, write.key)
        done = dict(zip([w.key for w in todo], await super().put(todo), strict=True))
        self._seen = [*self._seen[-15:], *done]
        return [done.get(write.key) for write in writes]
