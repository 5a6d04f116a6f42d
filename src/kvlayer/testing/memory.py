"""A backend that keeps objects in a dictionary: the honest one that faults are put in front of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import ClassVar, Self

from kvlayer.abc.backend import (
    Backend,
    Capability,
    DeleteResult,
    Hit,
    Listed,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.identity.keys import ObjectKey
from kvlayer.urls import BackendURL

__all__ = ["MemoryBackend"]


class MemoryBackend(Backend):
    """Objects in ``objects``, which the test may look at and change: a dictionary of its own, or
    one that several backends share as processes share a directory.

    Never waits and never fails: it has no clock (what it lists was last used at 0), and one that
    was closed answers on, for a test that looks afterwards. All else of the contract it keeps.
    ``capabilities`` are what it is to pass for: with ``SHARED`` a
    cache asks it about what it does not know, with ``LIST`` it is listed when a cache opens.
    """

    scheme: ClassVar[str] = "memory"

    def __init__(
        self,
        objects: dict[ObjectKey, bytes] | None = None,
        capabilities: Iterable[Capability] = (Capability.LIST,),
    ) -> None:
        self.objects: dict[ObjectKey, bytes] = {} if objects is None else objects
        self.capabilities = frozenset(capabilities)

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        return cls()

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        return [len(self.objects[key]) if key in self.objects else None for key in keys]

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        return [self.fill(read) for read in reads]

    def fill(self, read: Read) -> ReadResult:
        """Copy what is stored into the regions of one read."""
        stored = self.objects.get(read.key)
        if stored is None:
            return Miss()
        at = read.offset
        for region in read.regions:
            part = stored[at : at + region.nbytes]
            region[: len(part)] = part
            at += len(part)
        return Hit(max(at - read.offset, 0))

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        for write in writes:
            self.objects.setdefault(write.key, b"".join(write.regions))
        return [None] * len(writes)

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        for key in keys:
            self.objects.pop(key, None)
        return [None] * len(keys)

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        for key, stored in list(self.objects.items()):
            if key.startswith(prefix) and key in self.objects:
                yield Listed(key, len(stored), 0.0)
