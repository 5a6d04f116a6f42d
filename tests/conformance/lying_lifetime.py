"""Liars about opening and closing, restarts, sharing, and the room a tier has."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from honest import HonestBackend, Options
from liars import PAGE, breaks

from kvlayer.abc.backend import (
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.suite import Outcome


@breaks("closing twice is closing once", Outcome.FAILED)
class ClosesWhatIsClosed(HonestBackend):
    async def aclose(self) -> None:
        if not self.is_open:
            raise RuntimeError("close of a closed connection")
        await super().aclose()


@breaks("closing waits for the calls that run")
class ClosesUnderItsCalls(HonestBackend):
    """Returns at once; its calls end by themselves, some time."""

    async def put_one(self, write: Write) -> WriteResult:
        result = await super().put_one(write)
        if not self.is_open:
            for _ in range(100):
                await asyncio.sleep(0)
        return result

    async def aclose(self) -> None:
        self.is_open = False
        if not self.running:
            await super().aclose()


@breaks("a closed backend says so")
class ServesWhenItIsClosed(HonestBackend):
    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        return [self.size(key) for key in keys]


@breaks("objects survive a restart")
class LivesInMemory(HonestBackend):
    """Says that it is persistent, and shares its objects while anybody is there."""

    async def aclose(self) -> None:
        if self.is_open and len(self.place.objects) == 5:
            self.place.objects.clear()
        await super().aclose()


@breaks("what one instance stores the other finds")
class RemembersMisses(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.missed: set[ObjectKey] = set()

    def size(self, key: ObjectKey) -> int | None:
        size = super().size(key)
        if size is None:
            self.missed.add(key)
        return None if key in self.missed else size

    def publish(self, key: ObjectKey, content: bytes) -> None:
        self.missed.discard(key)
        super().publish(key, content)


@breaks("what one instance deletes the other misses")
class RemembersHits(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.read: dict[ObjectKey, bytes] = {}

    def find(self, key: ObjectKey) -> bytes | None:
        found = super().find(key)
        if found is not None and len(found) == PAGE:
            self.read[key] = found
        return found or self.read.get(key)

    def forget(self, key: ObjectKey) -> None:
        self.read.pop(key, None)
        super().forget(key)


@breaks("closing one instance leaves the other open")
class ClosesForEverybody(HonestBackend):
    async def open(self) -> None:
        await super().open()
        self.place.described["instances"] = b"x" * (
            len(self.place.described.get("instances", b"")) + 1
        )

    async def aclose(self) -> None:
        if self.is_open and self.place.described.get("instances") == b"xx":
            self.place.objects.clear()
        await super().aclose()

    async def namespaces(self) -> Mapping[str, bytes]:
        return {}


@breaks("a full tier stays within its capacity")
class CountsWhatItHasAfterwards(HonestBackend):
    async def open(self) -> None:
        await super().open()
        self.is_fresh = not self.place.objects

    def make_room(self, nbytes: int) -> None:
        super().make_room(0 if self.is_fresh else nbytes)


@breaks("a full tier takes writes after a restart and stays within bounds")
class CountsNothingAfterARestart(HonestBackend):
    async def open(self) -> None:
        await super().open()
        self.is_fresh = not self.place.objects

    def make_room(self, nbytes: int) -> None:
        if self.is_fresh:
            super().make_room(nbytes)


@breaks("a full tier takes writes after a restart and stays within bounds")
class RefusesUntilItHasFoundOut(HonestBackend):
    async def open(self) -> None:
        await super().open()
        self.left = len(self.place.objects) // 32  # a look at each takes a while

    async def put_one(self, write: Write) -> WriteResult:
        self.left -= 1
        return BackendError("not yet") if self.left >= 0 else await super().put_one(write)


@breaks("who evicts tells the owner")
class EvictsInSilence(HonestBackend):
    def tell(self, gone: list[tuple[ObjectKey, int]]) -> None: ...


@breaks("a full tier serves right bytes or misses")
class ReusesASlotTooEarly(HonestBackend):
    """What was evicted is still found, with bytes that are not its own."""

    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.ghosts: dict[ObjectKey, bytes] = {}

    def make_room(self, nbytes: int) -> None:
        before = dict(self.place.objects)
        super().make_room(nbytes)
        gone = before.keys() - self.place.objects.keys()
        self.ghosts.update({key: bytes(len(before[key])) for key in gone})

    def find(self, key: ObjectKey) -> bytes | None:
        return super().find(key) or self.ghosts.get(key)


@breaks("closing waits for the calls that run")
class DropsWhatItWasWriting(HonestBackend):
    """Its calls end before it is closed, and say that they stored what it no longer took."""

    def publish(self, key: ObjectKey, content: bytes) -> None:
        if self.is_open:
            super().publish(key, content)


@breaks("a full tier stays within its capacity")
class HoldsNothingAtAll(HonestBackend):
    """Within any capacity."""

    def size(self, key: ObjectKey) -> int | None:
        size = super().size(key)
        is_first = len(self.place.objects) == 1 and self.capacity == 64 * PAGE
        return None if is_first and size == 4 * PAGE else size


@breaks("who evicts tells the owner")
class TellsOfTheNextOneToo(HonestBackend):
    """Of what it means to evict, which stays until it must go."""

    def tell(self, gone: list[tuple[ObjectKey, int]]) -> None:
        oldest = min(self.place.objects, key=lambda key: self.place.used[key])
        super().tell([*gone, (oldest, len(self.place.objects[oldest]))])
