"""One backend on trial: opened for one promise, with keys of its own, and cleared up after it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256
from typing import Any, TypeVar

from kvlayer._pack import pack
from kvlayer.abc.backend import (
    Backend,
    Capability,
    Damaged,
    Hit,
    Miss,
    Read,
    ReadResult,
    Write,
    WriteResult,
)
from kvlayer.errors import BackendError
from kvlayer.identity.keys import PUBLIC_ZONE, RAW, Encoding, ObjectKey, ObjectName, Part
from kvlayer.testing.loan import Loan, noise
from kvlayer.testing.promise import broken, expect

__all__ = ["PART", "Trial", "side_by_side"]

T = TypeVar("T")

PART = Part(0, (0, 4), (0, 2))


class Trial:
    """``backend`` is open. ``build`` makes another unopened instance of the same place.

    Every key comes from :meth:`key` and lies in one namespace that nobody else has; its
    ``canonical`` form hashes to it.
    """

    def __init__(self, build: Callable[[], Backend]) -> None:
        self._build = build
        self._open = AsyncExitStack()
        self.backend: Backend = build()
        self._closed: list[Backend] = []
        self.canonical = pack({"made by": "kvlayer.testing", "for one trial": os.urandom(16).hex()})
        self.namespace = sha256(self.canonical).hexdigest()
        self.keys: set[ObjectKey] = set()

    @classmethod
    @asynccontextmanager
    async def opened(
        cls, build: Callable[[], Backend], *, clears: bool = False
    ) -> AsyncGenerator[Trial]:
        """A trial whose instances are closed at the end; ``clears`` deletes its objects, too."""
        trial = cls(build)
        try:
            async with trial._open:
                await trial.start(trial.backend)
                yield trial
        except BaseException as exc:
            if clears:
                await trial._clear_after(exc)
            raise
        else:
            if clears:
                await trial._clear()

    async def _clear_after(self, error: BaseException) -> None:
        """Clear up behind a broken promise, which stays the finding whatever comes of that."""
        try:
            await self._clear()
        except Exception as exc:  # noqa: BLE001  # of a backend that is broken already
            error.add_note(f"and clearing up after it failed: {type(exc).__name__}: {exc}")

    async def _clear(self) -> None:
        if not self.keys:
            return
        async with self._build() as cleaner:
            keys = sorted(self.keys)
            refused = [error for error in await cleaner.delete(keys) if error is not None]
            if refused:
                raise refused[0]
            left = [size for size in await cleaner.contains(keys) if size is not None]
            expect(len(left), 0, "what is left behind")

    async def start(self, backend: Backend) -> Backend:
        """Open an instance that is closed when the trial ends, unless :meth:`close` did."""
        await backend.open()
        self._open.push_async_callback(self.close, backend)
        return backend

    async def close(self, backend: Backend | None = None) -> None:
        """Close an instance, once."""
        backend = backend or self.backend
        if backend not in self._closed:
            self._closed.append(backend)
            await backend.aclose()

    async def another(self) -> Backend:
        """A second instance of the same place, open beside the first."""
        return await self.start(self._build())

    async def reopen(self) -> None:
        """Close the backend and go on with a new instance, as a new process would."""
        await self.close()
        self.backend = await self.another()

    # -- names and bytes -------------------------------------------------------------------------

    def key(
        self,
        number: int,
        *,
        zone: str = PUBLIC_ZONE,
        part: Part = PART,
        tokens: int = 16,
        encoding: Encoding = RAW,
    ) -> ObjectName:
        """One object's name: the same for the same arguments."""
        end_hash = sha256(b"%d" % number).digest()
        key = ObjectName.made(ObjectKey.of(self.namespace, zone, end_hash, tokens, part), encoding)
        self.keys.add(key)
        return key

    def numbered(self, numbers: Iterable[int]) -> list[ObjectKey]:
        return [self.key(number) for number in numbers]

    # -- one object ------------------------------------------------------------------------------

    async def put(
        self,
        key: ObjectKey,
        content: bytes,
        *,
        pages: Iterable[int] = (),
        on: Backend | None = None,
    ) -> WriteResult:
        """Store bytes from regions of so many pages."""
        loan = Loan(len(content), content)
        (result,) = await self._put(on or self.backend, [Write(key, loan.regions(pages))])
        return result

    async def store(self, number: int, nbytes: int, *, on: Backend | None = None) -> bytes:
        """Store noise under a numbered key and return it. Raises ``Broken`` when that fails."""
        content = noise(number, nbytes)
        expect(
            await self.put(self.key(number), content, on=on), None, f"the result of put({number})"
        )
        return content

    async def store_all(self, numbers: Iterable[int], nbytes: int) -> None:
        """Store noise under many numbered keys, in one batch."""
        writes = [Write(self.key(n), Loan(nbytes, noise(n, nbytes)).regions()) for n in numbers]
        results = await self._put(self.backend, writes)
        expect(results, [None] * len(writes), f"the results of put() of {len(writes)} objects")

    async def get(
        self,
        key: ObjectKey,
        nbytes: int,
        *,
        offset: int = 0,
        pages: Iterable[int] = (),
        on: Backend | None = None,
    ) -> tuple[ReadResult, Loan]:
        """Read up to ``nbytes`` into regions of so many pages."""
        loan = Loan(nbytes)
        read = Read(key, loan.regions(pages), offset)
        (result,) = await self._get(on or self.backend, [read])
        return result, loan

    async def load(
        self, key: ObjectKey, nbytes: int, *, offset: int = 0, on: Backend | None = None
    ) -> bytes | None:
        """What a read of ``nbytes`` finds, None for a miss. Raises the error it answers with."""
        result, loan = await self.get(key, nbytes, offset=offset, on=on)
        if isinstance(result, BackendError):
            raise result
        return loan.content(result.nbytes) if isinstance(result, Hit) else None

    async def is_absent(self, keys: Sequence[ObjectKey], nbytes: int, what: str) -> None:
        """Raise ``Broken`` when any way of asking still finds one of the objects."""
        sizes = await self.backend.contains(keys)
        expect(sizes, [None] * len(keys), f"contains() of {what}")
        for key in keys:
            result, _ = await self.get(key, nbytes)
            expect(result, Miss(), f"get() of {what}")
        if self.lists:
            expect(sorted(set(await self.listed()) & set(keys)), [], f"{what} in list()")

    async def delete(self, keys: Sequence[ObjectKey]) -> None:
        """Remove objects. Raises ``Broken`` unless each is gone, or was missing."""
        results = await self.backend.delete(keys)
        expect(results, [None] * len(keys), f"the results of delete() of {len(keys)} keys")

    async def quarantine(self, items: Sequence[Damaged]) -> None:
        """Take objects out of sight. Raises ``Broken`` unless that is what it answers."""
        results = await self.backend.quarantine(items)
        expect(results, [None] * len(items), f"the results of quarantine() of {len(items)} items")

    # -- the listing -----------------------------------------------------------------------------

    @property
    def lists(self) -> bool:
        return Capability.LIST in self.backend.capabilities

    async def listed(
        self, prefix: str | None = None, *, on: Backend | None = None
    ) -> dict[ObjectKey, int]:
        """Key -> bytes of what ``list`` shows, by default of this trial's namespace."""
        found: dict[ObjectKey, int] = {}
        async for listed in (on or self.backend).list(self.namespace if prefix is None else prefix):
            if listed.key in found:
                broken("each object to be listed once", f"{listed.key} twice")
            found[listed.key] = listed.nbytes
        return found

    # -- batches, with the promises about their shape ---------------------------------------------

    async def _put(self, backend: Backend, writes: Sequence[Write]) -> list[WriteResult]:
        return _aligned(await backend.put(writes), len(writes), "put", (type(None), BackendError))

    async def _get(self, backend: Backend, reads: Sequence[Read]) -> list[ReadResult]:
        return _aligned(await backend.get(reads), len(reads), "get", (Hit, Miss, BackendError))


async def side_by_side(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines at once and answer with their results, or with the first error alone."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _aligned(results: Any, count: int, call: str, kinds: tuple[type, ...]) -> list[Any]:
    """The results of a batch, after a look at their number and kinds."""
    expect(len(results), count, f"the number of results of {call}() of {count} items")
    for result in results:
        if not isinstance(result, kinds):
            names = " | ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            broken(f"every result of {call}() to be {names}", result)
    return list(results)
