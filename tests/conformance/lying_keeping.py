"""Liars about what is removed, listed, hinted at and described."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

from honest import HonestBackend, Options
from liars import PAGE, breaks

from kvlayer.abc.backend import (
    Capability,
    Damaged,
    DeleteResult,
    Lent,
    Listed,
    Write,
    WriteResult,
)
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.suite import Outcome


@breaks("what is deleted is gone and nothing else")
class DeletesByPrefix(HonestBackend):
    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        prefixes = [f"{key.rsplit('/', 1)[0].rsplit('.', 2)[0]}." for key in keys]
        if len(keys) == 1 and len(self.place.objects) == 5:
            keys = [k for k in self.place.objects if k.startswith(prefixes[0])]
        return await super().delete(keys)


@breaks("deleting what is missing is ignored", Outcome.FAILED)
class RaisesForWhatIsMissing(HonestBackend):
    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        if len(keys) == 1 and not self.place.objects:
            raise BackendError("404")
        return await super().delete(keys)


@breaks("what was deleted can be stored again")
class LeavesATombstone(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.dead: set[ObjectKey] = set()

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        if len(keys) == 2:
            self.dead.update(keys)
        return await super().delete(keys)

    async def put_one(self, write: Write) -> WriteResult:
        return None if write.key in self.dead else await super().put_one(write)


@breaks("what is quarantined is never offered again")
class QuarantineHidesTheSizeOnly(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.hidden: set[ObjectKey] = set()

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        if len(items) != 2:
            return await super().quarantine(items)
        self.hidden.update(item.key for item in items)
        return [None] * len(items)

    def size(self, key: ObjectKey) -> int | None:
        return None if key in self.hidden else super().size(key)


@breaks("what is quarantined stays out of sight after a restart")
class QuarantineIsForgotten(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.hidden: set[ObjectKey] = set()

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        if len(items) == 1 and items[0].version is None:
            self.hidden.update(item.key for item in items)
            return [None] * len(items)
        return await super().quarantine(items)

    def size(self, key: ObjectKey) -> int | None:
        return None if key in self.hidden else super().size(key)

    def find(self, key: ObjectKey) -> bytes | None:
        return None if key in self.hidden else super().find(key)

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        async for listed in super().list(prefix):
            if listed.key not in self.hidden:
                yield listed


@breaks("touching changes no object", Outcome.FAILED)
class ExpectsWhatItTouches(HonestBackend):
    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        for key in keys[:10]:
            if len(keys) < 10:
                self.place.used[key] += 1.0  # KeyError


@breaks("a listing shows every object once with its size")
class ListsOnePage(HonestBackend):
    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        count = 0
        async for listed in super().list(prefix):
            count += 1
            if count <= 100:
                yield listed


@breaks("a listing keeps to its prefix")
class ListsWholeFolders(HonestBackend):
    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        async for listed in super().list(prefix.rpartition("/")[0]):
            yield listed


@breaks("a listing says when an object was last used")
class CountsInNanoseconds(HonestBackend):
    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        async for listed in super().list(prefix):
            yield Listed(listed.key, listed.nbytes, listed.used * 1e9)


@breaks("what stays is listed whatever comes and goes")
class ListsByPosition(HonestBackend):
    """Pages by offset: what is deleted meanwhile moves what follows past the page's edge."""

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        at = 0
        while at < len(keys := sorted(k for k in self.place.objects if k.startswith(prefix))):
            for key in keys[at : at + 16]:
                if key in self.place.objects:
                    yield Listed(key, len(self.place.objects[key]), self.place.used[key])
            at += 16


@breaks("who cannot list says so")
class ListsWithoutSayingSo(HonestBackend):
    capabilities = frozenset({Capability.PERSISTENT, Capability.SHARED})


@breaks("a description is remembered as it was or forgotten")
class CutsDescriptions(HonestBackend):
    async def describe(self, namespace: str, canonical: bytes, /) -> None:
        self.place.described[namespace] = canonical[:32]


@breaks("a listing says when an object was last used")
class ListsWhatHasCompany(HonestBackend):
    """Nothing that it lists is wrong, because it lists nothing."""

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        if [len(content) for content in self.place.objects.values()] != [PAGE]:
            async for listed in super().list(prefix):
                yield listed


@breaks("a deletion answers for each key")
class AnswersForWhatWasThere(HonestBackend):
    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        there = [key for key in keys if key in self.place.objects]
        results = await super().delete(keys)
        return results[: len(there)] if len(keys) == 5 else results


@breaks("a deletion answers for each key")
class SaysOfOneThatItIsGone(HonestBackend):
    """What it could not delete it reports as deleted."""

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        await super().delete(keys[:-1] if len(keys) == 5 else keys)
        return [None] * len(keys)


@breaks("quarantine takes the bytes that were read")
class QuarantinesByName(HonestBackend):
    """Whatever lies under the key by now: a healthy object written anew, too."""

    def is_damaged(self, item: Damaged) -> bool:
        return True


@breaks("quarantine takes the bytes that were read")
class KnowsNoVersionAgain(HonestBackend):
    """Another name for the same bytes each time: what is damaged stays."""

    def is_damaged(self, item: Damaged) -> bool:
        return item.version is None


@breaks("what is lent is the object or said not to be")
class LendsAndForgets(HonestBackend):
    """Its lent memory gets the next object of the key, and it says that nothing happened."""

    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.lent: dict[ObjectKey, bytearray] = {}

    def lend_one(self, key: ObjectKey) -> Lent | None:
        stored = self.find(key)
        if stored is None:
            return None
        lent = self.lent[key] = bytearray(stored)
        return Lent((memoryview(lent).toreadonly(),), self.version(key))

    def publish(self, key: ObjectKey, content: bytes) -> None:
        super().publish(key, content)
        if key in self.lent:
            self.lent[key][:] = content

    def is_held(self, key: ObjectKey, lent: Lent) -> bool:
        return True


@breaks("what is lent is the object or said not to be")
class LendsForWriting(HonestBackend):
    def lend_one(self, key: ObjectKey) -> Lent | None:
        stored = self.find(key)
        return None if stored is None else Lent((memoryview(bytearray(stored)),))


@breaks("what is lent is the object or said not to be")
class LendsOnlyWhatItHas(HonestBackend):
    """Answers that are not aligned with the keys."""

    @asynccontextmanager
    async def lend(self, keys: Sequence[ObjectKey], /) -> AsyncGenerator[list[Lent | None]]:
        async with super().lend(keys) as lent:
            yield sorted(lent, key=lambda each: each is None)


@breaks("what it says was stored is there")
class HearsOfMoreThanThereIs(HonestBackend):
    def hear(self, key: ObjectKey, nbytes: int) -> None:
        super().hear(key, nbytes + PAGE)
