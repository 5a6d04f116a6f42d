"""A backend in memory that keeps every promise, for liars to break one of: each overrides a step.

Its objects lie in a :class:`Place` that outlives it and is shared by its instances, as a directory
is, and it copies on threads, so that cancelling means something.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import time
from typing import ClassVar, Self

from kvlayer.abc.backend import (
    Backend,
    Capability,
    Damaged,
    DeleteResult,
    Hit,
    Lent,
    Listed,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
    contradicts_header,
)
from kvlayer.abc.offload import Offload
from kvlayer.errors import BackendError, ClosedError
from kvlayer.identity.keys import ObjectKey
from kvlayer.urls import BackendURL, parse_bytes

__all__ = ["HonestBackend", "Place"]

_PLACES: dict[str, Place] = {}


@dataclass(slots=True)
class Place:
    """What a directory would hold. Gone when the directory of its name is."""

    objects: dict[ObjectKey, bytes] = field(default_factory=dict[ObjectKey, bytes])
    used: dict[ObjectKey, float] = field(default_factory=dict[ObjectKey, float])
    described: dict[str, bytes] = field(default_factory=dict[str, bytes])
    versions: dict[ObjectKey, int] = field(default_factory=dict[ObjectKey, int])
    """How often an object was stored here under its key, the last time included."""
    hearers: list[HonestBackend] = field(default_factory=list["HonestBackend"])
    """Open instances, which are told of what another stores."""

    @classmethod
    def at(cls, path: str) -> Place:
        for gone in [known for known in _PLACES if not os.path.isdir(known)]:
            del _PLACES[gone]
        return _PLACES.setdefault(path, cls())


@dataclass(frozen=True, slots=True)
class Options:
    capacity: int = field(default=1 << 30, metadata={"parse": parse_bytes})


class HonestBackend(Backend):
    """Every step a liar may want to get wrong is a method of its own."""

    scheme: ClassVar[str] = "honest"
    capabilities = frozenset(Capability)

    def __init__(self, path: str, options: Options) -> None:
        self.path, self.capacity = path, options.capacity
        self.place = Place()
        self.threads = Offload(2, "honest")
        self.is_open = False
        self.running: set[asyncio.Event] = set()
        self.idle = asyncio.Event()
        self.idle.set()

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        return cls(url.path, url.into(Options))

    async def open(self) -> None:
        self.place = Place.at(self.path)
        self.place.hearers.append(self)
        self.is_open = True

    async def aclose(self) -> None:
        self.is_open = False
        if self in self.place.hearers:
            self.place.hearers.remove(self)
        await self.idle.wait()
        self.threads.close()

    def begin(self) -> asyncio.Event:
        """A call that closing waits for."""
        if not self.is_open:
            raise ClosedError("honest:// is not open")
        call = asyncio.Event()
        self.running.add(call)
        self.idle.clear()
        return call

    def end(self, call: asyncio.Event) -> None:
        call.set()
        self.running.discard(call)
        if not self.running:
            self.idle.set()

    # -- reading ---------------------------------------------------------------------------------

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        self.end(self.begin())
        return [self.size(key) for key in keys]

    def size(self, key: ObjectKey) -> int | None:
        found = self.place.objects.get(key)
        return None if found is None else len(found)

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        call = self.begin()
        try:
            return [await self.get_one(read) for read in reads]
        finally:
            self.end(call)

    async def get_one(self, read: Read) -> ReadResult:
        stored = self.find(read.key)
        if stored is None:
            return Miss()
        self.place.used[read.key] = time()
        version = self.version(read.key)
        return Hit(await self.threads.run(self.fill_and_say, stored, read), version)

    def find(self, key: ObjectKey) -> bytes | None:
        return self.place.objects.get(key)

    def version(self, key: ObjectKey) -> int | None:
        return self.place.versions.get(key)

    def fill_and_say(self, stored: bytes, read: Read) -> int:
        nbytes = self.fill(stored, read)
        if read.landed is not None:
            read.landed(nbytes)
        return nbytes

    @asynccontextmanager
    async def lend(self, keys: Sequence[ObjectKey], /) -> AsyncGenerator[list[Lent | None]]:
        call = self.begin()
        try:
            lent = [self.lend_one(key) for key in keys]
            yield lent
            for key, each in zip(keys, lent, strict=True):
                if each is not None:
                    each.was_held = self.is_held(key, each)
        finally:
            self.end(call)

    def lend_one(self, key: ObjectKey) -> Lent | None:
        stored = self.find(key)
        return None if stored is None else Lent((memoryview(stored),), self.version(key))

    def is_held(self, key: ObjectKey, lent: Lent) -> bool:
        return self.version(key) == lent.version and key in self.place.objects

    # -- memory it is told of ----------------------------------------------------------------------

    async def introduce(self, region: memoryview, /) -> None:
        """Nothing is registered here; what counts is :meth:`withdraw`."""

    async def withdraw(self, region: memoryview, /) -> None:
        for call in tuple(self.running):
            await call.wait()

    def fill(self, stored: bytes, read: Read) -> int:
        at = read.offset
        for region in read.regions:
            part = stored[at : at + region.nbytes]
            region[: len(part)] = part
            at += len(part)
        return at - read.offset

    # -- writing ---------------------------------------------------------------------------------

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        call = self.begin()
        try:
            return [await self.put_one(write) for write in writes]
        finally:
            self.end(call)

    async def put_one(self, write: Write) -> WriteResult:
        if write.nbytes > self.capacity:
            return BackendError(f"{write.nbytes} bytes are more than {self.capacity}")
        if self.is_there(write.key):
            return None
        content = await self.threads.run(self.take, write)
        self.publish(write.key, content)
        return None

    def take(self, write: Write) -> bytes:
        return b"".join(write.regions)

    def publish(self, key: ObjectKey, content: bytes) -> None:
        if not self.is_there(key):
            self.forget(key)
            self.make_room(len(content))
            self.place.objects[key] = content
            self.place.used[key] = time()
            self.place.versions[key] = self.place.versions.get(key, 0) + 1
            for other in self.place.hearers:
                if other is not self:
                    other.hear(key, len(content))

    def is_there(self, key: ObjectKey) -> bool:
        stored = self.place.objects.get(key)
        return stored is not None and not contradicts_header(stored, len(stored))

    def hear(self, key: ObjectKey, nbytes: int) -> None:
        if self.on_stored is not None:
            self.on_stored([(key, nbytes)])

    def make_room(self, nbytes: int) -> None:
        gone: list[tuple[ObjectKey, int]] = []
        while sum(map(len, self.place.objects.values())) + nbytes > self.capacity:
            oldest = min(self.place.objects, key=lambda key: self.place.used[key])
            gone.append((oldest, len(self.place.objects[oldest])))
            self.forget(oldest)
        if gone:
            self.tell(gone)

    def tell(self, gone: list[tuple[ObjectKey, int]]) -> None:
        if self.on_evicted is not None:
            self.on_evicted(gone, "lru")

    # -- keeping ---------------------------------------------------------------------------------

    def forget(self, key: ObjectKey) -> None:
        self.place.objects.pop(key, None)
        self.place.used.pop(key, None)

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        self.end(self.begin())
        for key in keys:
            self.forget(key)
            if len(keys) < 100:
                await asyncio.sleep(0)
        return [None] * len(keys)

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        await self.delete([item.key for item in items if self.is_damaged(item)])
        return [None] * len(items)

    def is_damaged(self, item: Damaged) -> bool:
        return item.version in (None, self.version(item.key))

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        for key in keys:
            if key in self.place.used:
                self.place.used[key] = time()

    async def describe(self, namespace: str, canonical: bytes, /) -> None:
        self.place.described[namespace] = canonical

    async def namespaces(self) -> Mapping[str, bytes]:
        return dict(self.place.described)

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        for key, stored in tuple(self.place.objects.items()):
            if key.startswith(prefix):
                yield Listed(key, len(stored), self.place.used.get(key, time()))
