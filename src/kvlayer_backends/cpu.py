"""``cpu://?capacity=8GiB``: host memory. Lends its slab as tier 0; below, keeps copies in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
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
)
from kvlayer.abc.host import HostMemory
from kvlayer.config.registry import POLICIES
from kvlayer.errors import BackendError, ClosedError, ConfigError
from kvlayer.eviction.order import EvictionOrder
from kvlayer.identity.keys import ObjectKey
from kvlayer.memory.extents import Extents
from kvlayer.memory.slab import Slab
from kvlayer.runtime.offload import Offload
from kvlayer.urls import BackendURL, parse_bytes

__all__ = ["CpuBackend", "CpuOptions"]


@dataclass(frozen=True, slots=True)
class CpuOptions:
    """Options of a ``cpu://`` URL."""

    capacity: int = field(default=1 << 30, metadata={"parse": parse_bytes})
    """Bytes of host memory, committed as they are first used."""
    policy: str = "prefix-lru"
    """What to give up first, where the tier is not the first and evicts by itself."""


@dataclass(slots=True, eq=False)
class _Held:
    offset: int
    nbytes: int
    used: float
    version: int
    written: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the writer has ended, well or not."""
    readers: int = 0
    row: int = -1
    """In the order of eviction, once it is ready."""

    @property
    def is_ready(self) -> bool:
        return self.row >= 0


class CpuBackend(Backend, HostMemory):
    """Objects in one memfd slab. Not persistent; at capacity the policy chooses what goes.

    An object's version is a number that no other object of this backend has had. What is lent, or
    being read, stays in its place until it comes back, also when it is deleted.
    """

    scheme: ClassVar[str] = "cpu"
    capabilities = frozenset({Capability.LIST, Capability.REVOCABLE})

    def __init__(self, options: CpuOptions) -> None:
        self._options = options
        self._order = EvictionOrder(POLICIES.load_option("policy", options.policy))
        self._keys: dict[int, ObjectKey] = {}
        """By row of the order."""
        self._slab: Slab | None = None
        self._extents = Extents(options.capacity)
        self._held: dict[ObjectKey, _Held] = {}
        self._versions = count(1)
        self._is_closing = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._copies = Offload(2, "kvlayer-cpu")

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        if url.host or url.path:
            raise ConfigError(
                f"cpu:// has no location, found {url}", hint="write cpu://?capacity=8GiB"
            )
        return cls(url.into(CpuOptions))

    @property
    def slab(self) -> Slab:
        if self._slab is None:
            raise ClosedError("cpu:// is not open")
        return self._slab

    @property
    def capacity_nbytes(self) -> int:
        """Bytes the tier may hold."""
        return self._extents.capacity

    @property
    def used_nbytes(self) -> int:
        """Bytes held, as a lower tier."""
        return self._extents.used

    @property
    def policies_replaced(self) -> int:
        """How often the eviction policy broke its contract and was replaced."""
        return self._order.replaced

    async def open(self) -> None:
        if self._slab is None:
            self._slab = Slab(self._options.capacity)
            self._copies = Offload(2, "kvlayer-cpu")
            self._is_closing = False

    async def aclose(self) -> None:
        self._is_closing = True  # calls that begin from now on are refused
        await self._idle.wait()
        self._copies.close()
        if self._slab is not None:
            self._slab.close()
            self._slab = None
        for key, held in list(self._held.items()):
            self._drop(key, held)

    @contextmanager
    def _call(self) -> Generator[Slab]:
        """A running call; closing waits until it has ended. Raises ``ClosedError``."""
        if self._is_closing:
            raise ClosedError("cpu:// is closed")
        slab = self.slab
        self._running += 1
        self._idle.clear()
        try:
            yield slab
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        found = [self._held.get(key) for key in keys]
        return [held.nbytes if held is not None and held.is_ready else None for held in found]

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        with self._call() as slab:
            return [await self._get(slab, read) for read in reads]

    async def _get(self, slab: Slab, read: Read) -> ReadResult:
        held = self._held.get(read.key)
        if held is None or not held.is_ready:
            return Miss()
        start = min(read.offset, held.nbytes)
        nbytes = min(held.nbytes - start, read.nbytes)
        source = slab.view(held.offset + start, nbytes)
        self._hold(held)
        try:
            await self._copies.run(_copy_out, source, read)
        finally:
            source.release()
            self._let_go(read.key, held)
        return Hit(nbytes, held.version)

    @asynccontextmanager
    async def lend(self, keys: Sequence[ObjectKey], /) -> AsyncGenerator[list[Lent | None]]:
        with self._call() as slab:
            lent: list[Lent | None] = []
            holds: list[tuple[ObjectKey, _Held, Lent]] = []
            for key in keys:
                held = self._held.get(key)
                if held is None or not held.is_ready:
                    lent.append(None)
                    continue
                self._hold(held)
                view = slab.view(held.offset, held.nbytes)
                each = Lent((view.toreadonly(),), held.version)
                view.release()
                lent.append(each)
                holds.append((key, held, each))
            try:
                yield lent
            finally:
                for key, held, each in holds:
                    each.was_held = True  # nothing takes a place that is held
                    for region in each.regions:
                        region.release()
                    self._let_go(key, held)

    def _hold(self, held: _Held) -> None:
        """Somebody reads these bytes: they stay where they are until :meth:`_let_go`."""
        held.readers += 1
        self._order.pin((held.row,))

    def _let_go(self, key: ObjectKey, held: _Held) -> None:
        held.readers -= 1
        held.used = time()
        if held.readers:
            return
        if self._held.get(key) is held:
            self._order.unpin((held.row,), used=True)
        else:  # deleted meanwhile
            self._extents.release(held.offset)

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        with self._call() as slab:
            return [await self._put(slab, write) for write in writes]

    async def _put(self, slab: Slab, write: Write) -> WriteResult:
        while (other := self._held.get(write.key)) is not None:
            if other.is_ready:
                return None
            await other.written.wait()
        offset = self._make_room(write.nbytes)
        if offset is None:
            return BackendError(
                f"cpu:// has no room for {write.nbytes} of {self._extents.capacity} bytes",
                hint="raise its capacity",
            )
        held = _Held(offset, write.nbytes, time(), next(self._versions))
        self._held[write.key] = held
        target = slab.view(offset, write.nbytes)
        try:
            await self._copies.run(_copy_in, write.regions, target)
            held.row = self._order.add(
                hash(write.key),
                write.nbytes,
                first_token=write.first_token,
                tokens=write.tokens,
                retention=write.retention,
            )
            self._keys[held.row] = write.key
        finally:
            target.release()
            held.written.set()
            if not held.is_ready:
                self._drop(write.key, held)
        return None

    def _make_room(self, nbytes: int) -> int | None:
        if nbytes > self._extents.capacity:
            return None
        gone: list[tuple[ObjectKey, int]] = []
        offset = self._extents.allocate(nbytes)
        while offset is None and (row := self._order.victim(time())) is not None:
            key = self._keys[row]
            held = self._held[key]
            self._drop(key, held, evicted=True)
            gone.append((key, held.nbytes))
            offset = self._extents.allocate(nbytes)
        if gone and self.on_evicted is not None:
            self.on_evicted(gone, self._order.name)
        return offset

    def _drop(self, key: ObjectKey, held: _Held, *, evicted: bool = False) -> None:
        self._hide(key, held, evicted=evicted)
        self._extents.release(held.offset)

    def _hide(self, key: ObjectKey, held: _Held, *, evicted: bool = False) -> None:
        """Nobody finds it any more; its bytes are still taken."""
        del self._held[key]
        if held.row >= 0:
            del self._keys[held.row]
            self._order.remove(held.row, evicted=evicted)
            held.row = -1

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        for key in keys:
            held = self._held.get(key)
            if held is None or not held.is_ready:
                continue
            if held.readers:  # its bytes go when the last reader leaves
                self._hide(key, held)
            else:
                self._drop(key, held)
        return [None] * len(keys)

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        for key, version in items:
            held = self._held.get(key)
            if held is not None and version in (None, held.version):
                await self.delete([key])
        return [None] * len(items)

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        found = [self._held.get(key) for key in reversed(keys)]
        self._order.touch([held.row for held in found if held is not None and held.is_ready])

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        for key, held in list(self._held.items()):
            if held.is_ready and key.startswith(prefix):
                yield Listed(key, held.nbytes, held.used)


def _copy_out(source: memoryview, read: Read) -> None:
    at = 0
    for region in read.regions:
        nbytes = min(region.nbytes, source.nbytes - at)
        region[:nbytes] = source[at : at + nbytes]
        at += nbytes
    if read.landed is not None:
        read.landed(at)


def _copy_in(regions: Sequence[memoryview], target: memoryview) -> None:
    at = 0
    for region in regions:
        target[at : at + region.nbytes] = region
        at += region.nbytes
