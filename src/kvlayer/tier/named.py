"""A tier's backend, seen by key: it stores each object under a name that says how it is coded.

Between :class:`~kvlayer.tier.objects.Objects` and the backend; nothing above it knows of encodings.
There is one yet, raw. What another release has coded otherwise is counted and never offered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, cast

from kvlayer.abc.backend import (
    Backend,
    Damaged,
    DeleteResult,
    Lent,
    Listed,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.errors import UnsupportedError
from kvlayer.keys import ObjectKey, ObjectName
from kvlayer.urls import BackendURL

__all__ = ["Named"]


class Named(Backend):
    """``backend`` under the names of this build's encoding; it is open when that is."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        """What it stands before."""
        self.scheme = backend.scheme  # type: ignore[misc]  # as is what it stands for
        self.capabilities = backend.capabilities
        self.foreign = 0
        """Objects listed in an encoding that this build cannot read."""
        backend.on_evicted = self._evicted
        backend.on_stored = self._stored

    def __getattr__(self, name: str) -> Any:
        """What a backend has beyond the interface: figures, a slab."""
        return getattr(self.backend, name)

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        """Nothing is named so in a URL."""
        raise UnsupportedError(f"a name is no backend: {url}")

    def _evicted(self, gone: list[tuple[ObjectKey, int]], policy: str) -> None:
        if self.on_evicted is not None and (ours := _readable(gone)):
            self.on_evicted(ours, policy)

    def _stored(self, found: list[tuple[ObjectKey, int]]) -> None:
        if self.on_stored is not None and (ours := _readable(found)):
            self.on_stored(ours)

    async def open(self) -> None:
        await self.backend.open()

    async def aclose(self) -> None:
        await self.backend.aclose()

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        return await self.backend.contains(_names(keys))

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        return await self.backend.get(
            [Read(ObjectName.raw(r.key), r.regions, r.offset, r.landed) for r in reads]
        )

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        return await self.backend.put(
            [
                Write(
                    ObjectName.raw(w.key),
                    w.regions,
                    w.first_token,
                    w.tokens,
                    w.retention,
                    w.parent,
                )
                for w in writes
            ]
        )

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        return await self.backend.delete(_names(keys))

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        return await self.backend.quarantine(
            [Damaged(ObjectName.raw(item.key), item.version) for item in items]
        )

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        await self.backend.touch(_names(keys))

    async def describe(self, namespace: str, canonical: bytes, /) -> None:
        await self.backend.describe(namespace, canonical)

    async def namespaces(self) -> Mapping[str, bytes]:
        return await self.backend.namespaces()

    async def introduce(self, region: memoryview, /) -> None:
        await self.backend.introduce(region)

    async def withdraw(self, region: memoryview, /) -> None:
        await self.backend.withdraw(region)

    def lend(
        self, keys: Sequence[ObjectKey], /
    ) -> AbstractAsyncContextManager[Sequence[Lent | None]]:
        return self.backend.lend(_names(keys))

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        async for entry in self.backend.list(prefix):
            found = cast("object", entry)  # foreign code: it may be anything
            if not isinstance(found, Listed):
                yield entry  # whoever reads the listing says what is wrong with it
            elif (key := ObjectName.readable(ObjectName(found.key))) is None:
                self.foreign += 1
            else:
                yield Listed(key, found.nbytes, found.used)


def _names(keys: Iterable[ObjectKey]) -> list[ObjectKey]:
    return [*map(ObjectName.raw, keys)]


def _readable(names: Iterable[tuple[ObjectKey, int]]) -> list[tuple[ObjectKey, int]]:
    found = ((ObjectName.readable(name), nbytes) for name, nbytes in names)
    return [(key, nbytes) for key, nbytes in found if key is not None]
