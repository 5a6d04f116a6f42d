"""Liars about batches, and about calls that run side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from honest import HonestBackend
from liars import PAGE, breaks

from kvlayer.abc.backend import (
    Hit,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey, ObjectName
from kvlayer.testing.suite import Outcome


@breaks("a batch is answered in its own order")
class AnswersInTheOrderOfItsIndex(HonestBackend):
    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        if len(keys) == 27:
            return await super().contains(sorted(keys))
        return await super().contains(keys)


@breaks("a batch of writes stores every one")
class LosesTheTailOfABatch(HonestBackend):
    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        if len(writes) == 25:
            return [*(await super().put(writes[:16])), *([None] * 9)]
        return await super().put(writes)


@breaks("an empty batch is answered", Outcome.FAILED)
class AssumesOneItem(HonestBackend):
    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        assert reads[0].regions
        return await super().get(reads)


@breaks("a batch of thousands is answered", Outcome.FAILED)
class HasALimitOfVariables(HonestBackend):
    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        if len(keys) > 130:
            raise BackendError("too many SQL variables")
        return await super().contains(keys)


@breaks("a bad item does not spoil its batch", Outcome.FAILED)
class ParsesEveryKeyFirst(HonestBackend):
    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        for write in writes:
            ObjectName.parse(write.key)
        return await super().put(writes)


@breaks("an object larger than the tier is refused as a value", Outcome.FAILED)
class RaisesWhenItIsFull(HonestBackend):
    async def put_one(self, write: Write) -> WriteResult:
        if write.nbytes > self.capacity:
            raise BackendError("full")
        return await super().put_one(write)


@breaks("many calls at once are each answered")
class SharesOneBufferBetweenCalls(HonestBackend):
    """Two calls that overlap find each other's bytes in it; a batch never overlaps itself."""

    async def get_one(self, read: Read) -> ReadResult:
        stored = self.find(read.key)
        if stored is None or len(stored) != 2 * PAGE or len(self.running) < 8:
            return await super().get_one(read)
        self.buffer = stored
        await asyncio.sleep(0)
        return Hit(self.fill(self.buffer, read))


@breaks("of many writers of one key one wins whole")
class WritersMeetInOneFile(HonestBackend):
    async def put_one(self, write: Write) -> WriteResult:
        if write.nbytes != 16 * PAGE or len(self.running) < 4:
            return await super().put_one(write)
        content, half = self.take(write), 8 * PAGE
        file = self.place.objects
        file[write.key] = content[:half] + file.get(write.key, content)[half:]
        for _ in range(20 - len(self.running)):  # who came first ends last
            await asyncio.sleep(0)
        file[write.key] = file[write.key][:half] + content[half:]
        return None


@breaks("an object being written is absent or whole")
class ShowsWhatItHasSoFar(HonestBackend):
    async def put_one(self, write: Write) -> WriteResult:
        if write.nbytes != 64 * PAGE or len(write.regions) > 1 or self.place.objects:
            return await super().put_one(write)
        self.place.objects[write.key] = bytes(write.nbytes)
        for _ in range(4):
            await asyncio.sleep(0)
        self.place.objects[write.key] = self.take(write)
        return None
