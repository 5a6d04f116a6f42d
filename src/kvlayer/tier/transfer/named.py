"""A tier's backend, seen by key: it stores each object under a name that says how it is coded.

Between :class:`~kvlayer.tier.transfer.objects.Objects` and the backend; nothing above knows of
encodings. A key stands for the object in the encoding that the tier writes; a name for itself. What
this process cannot read is counted and never offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar, cast

from kvlayer._masked import Mask
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
from kvlayer.identity.keys import RAW, Encoding, ObjectKey, ObjectName
from kvlayer.urls import BackendURL

__all__ = ["ListedAs", "Named"]

T = TypeVar("T")

Answers = list

_MAX_ENCODINGS = 64  # a listing may name any number


@dataclass(frozen=True, slots=True)
class ListedAs(Listed):
    """A stored object by its key, and in which of the tier's encodings it lies, from 1 on."""

    encoding: int = 0


class Named(Backend):
    """``backend`` under the names of ``encodings``; it is open when that is.

    The first is written; the others, one at most, may be there from before. ``mask`` hides in its
    errors what the URL must not tell.
    """

    def __init__(
        self,
        backend: Backend,
        mask: Mask | None = None,
        encodings: Sequence[Encoding] = (RAW,),
    ) -> None:
        self._mask = mask or Mask()
        self.backend = backend
        """What it stands before."""
        self._encodings = {str(encoding): encoding for encoding in encodings}
        self._numbers = {text: number for number, text in enumerate(self._encodings, 1)}
        written, *self._others = encodings
        self._written = str(written)
        self.scheme = backend.scheme  # type: ignore[misc]  # as is what it stands for
        self.capabilities = backend.capabilities
        self.foreign = 0
        """Objects listed in an encoding that this cache does not read."""
        self.foreign_encodings: Counter[str] = Counter()
        """Those by their encoding, of the first few."""
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
        if self.on_evicted is not None and (ours := self._readable(gone)):
            self.on_evicted(ours, policy)

    def _stored(self, found: list[tuple[ObjectKey, int]]) -> None:
        if self.on_stored is not None and (ours := self._readable(found)):
            self.on_stored(ours)

    async def open(self) -> None:
        with self._mask.hiding():
            await self.backend.open()

    async def aclose(self) -> None:
        with self._mask.hiding():
            await self.backend.aclose()

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        sizes = await self._answers(lambda: self.backend.contains(self._names(keys)))
        for encoding in self._others:
            absent = [at for at, size in enumerate(sizes) if size is None and _is_key(keys[at])]
            names = [ObjectName.made(keys[at], encoding) for at in absent]
            others = await self._contained(names) if names else []
            for at, size in zip(absent, others, strict=True):
                sizes[at] = size
        return sizes

    async def _contained(self, names: Sequence[ObjectName]) -> Answers[SizeResult]:
        return await self._answers(lambda: self.backend.contains(names))

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        named = [Read(self._name(r.key), r.regions, r.offset, r.landed) for r in reads]
        return await self._answers(lambda: self.backend.get(named))

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        named = [replace(w, key=self._name(w.key)) for w in writes]
        return await self._answers(lambda: self.backend.put(named))

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        errors = await self._deleted(self._names(keys))
        for encoding in self._others:
            some = [at for at, key in enumerate(keys) if _is_key(key)]
            names = [ObjectName.made(keys[at], encoding) for at in some]
            others = await self._deleted(names) if names else []
            for at, error in zip(some, others, strict=True):
                errors[at] = errors[at] or error
        return errors

    async def _deleted(self, names: Sequence[ObjectKey]) -> Answers[DeleteResult]:
        return await self._answers(lambda: self.backend.delete(names))

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        named = [Damaged(self._name(item.key), item.version) for item in items]
        return await self._answers(lambda: self.backend.quarantine(named))

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        others = self._others
        names = [ObjectName.made(key, other) for key in keys if _is_key(key) for other in others]
        with self._mask.hiding():
            await self.backend.touch([*names, *self._names(keys)])

    async def describe(self, namespace: str, canonical: bytes, /) -> None:
        with self._mask.hiding():
            await self.backend.describe(namespace, canonical)

    async def namespaces(self) -> Mapping[str, bytes]:
        with self._mask.hiding():
            return await self.backend.namespaces()

    async def introduce(self, region: memoryview, /) -> None:
        with self._mask.hiding():
            await self.backend.introduce(region)

    async def withdraw(self, region: memoryview, /) -> None:
        with self._mask.hiding():
            await self.backend.withdraw(region)

    def lend(
        self, keys: Sequence[ObjectKey], /
    ) -> AbstractAsyncContextManager[Sequence[Lent | None]]:
        return self.backend.lend(self._names(keys))

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        with self._mask.hiding():
            async for entry in self.backend.list(prefix):
                found = cast("object", entry)  # foreign code: it may be anything
                if not isinstance(found, Listed):
                    yield entry  # whoever reads the listing says what is wrong with it
                elif (key := self._key(found.key)) is None:
                    self._count_foreign(found.key)
                else:
                    encoding = self._numbers[found.key.rpartition("/")[2]]
                    yield ListedAs(key, found.nbytes, found.used, encoding)

    def _count_foreign(self, name: ObjectKey) -> None:
        self.foreign += 1
        encoding, counts = name.rpartition("/")[2], self.foreign_encodings
        if encoding in counts or len(counts) < _MAX_ENCODINGS:
            counts[encoding] += 1

    async def _answers(self, call: Callable[[], Awaitable[Answers[T]]]) -> Answers[T]:
        """What the backend answers; its errors without what the URL must not tell."""
        with self._mask.hiding():
            answers = await call()
        given: object = answers
        if not self._mask or not isinstance(given, Answers):  # pyright: ignore[reportUnnecessaryIsInstance]
            return answers  # whoever asked says what is wrong with it
        return cast("Answers[T]", [self._mask.cleaned(answer) for answer in answers])

    def _name(self, key: ObjectKey) -> ObjectKey:
        return key if isinstance(key, ObjectName) else ObjectName(f"{key}/{self._written}")

    def _names(self, keys: Iterable[ObjectKey]) -> Answers[ObjectKey]:
        return [self._name(key) for key in keys]

    def _key(self, name: ObjectKey) -> ObjectKey | None:
        """The object that a name stands for; None where this process cannot read it."""
        key, _, encoding = name.rpartition("/")
        return ObjectKey(key) if encoding in self._encodings else None

    def _readable(self, names: Iterable[tuple[ObjectKey, int]]) -> Answers[tuple[ObjectKey, int]]:
        found = ((self._key(name), nbytes) for name, nbytes in names)
        return [(key, nbytes) for key, nbytes in found if key is not None]


def _is_key(key: ObjectKey) -> bool:
    """Whether it stands for an object in any encoding, not for one of those."""
    return not isinstance(key, ObjectName)
