"""Liars about lent memory, and about what a cancelled call leaves behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from hang import HANG
from honest import HonestBackend, Options
from liars import HELD_UP, PAGE, breaks

from kvlayer.abc.backend import (
    DeleteResult,
    Hit,
    Read,
    ReadResult,
    Write,
    WriteResult,
)
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.suite import Outcome


@breaks("memory is the callers again when a call returns")
class WritesBehind(HonestBackend):
    """Stores when something else happens, from memory that is no longer its own."""

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        results = await super().put(writes)
        if len(writes) == 2 and writes[0].nbytes == 4 * PAGE:
            self.later = [write.regions for write in writes]
        return results


class Careless(HonestBackend):
    """Uses the loop's own executor, which goes on with what nobody waits for any more."""

    undisturbed: ClassVar[int] = 1
    """Nobody cancels the first call."""

    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.calls = 0
        self.gate = threading.Event()

    async def aclose(self) -> None:
        self.gate.set()
        await super().aclose()

    async def abandon(self, work: Callable[..., Any], *arguments: object) -> Any:
        self.calls += 1
        if self.calls <= self.undisturbed:
            return work(*arguments)

        def wait() -> object:
            assert self.gate.wait(HANG)
            return arguments

        return await asyncio.get_running_loop().run_in_executor(None, wait)


@breaks("a cancelled get has let go of its memory")
class ReadsOnAfterACancellation(Careless):
    undisturbed = 2  # reads

    async def get_one(self, read: Read) -> ReadResult:
        stored = self.find(read.key)
        if stored is None or len(stored) != 16 * PAGE or read.regions[0].nbytes != PAGE:
            return await super().get_one(read)
        return Hit(await self.abandon(self.fill, stored, read))


@breaks("a cancelled put has let go of its memory")
class WritesOnAfterACancellation(Careless):
    async def put_one(self, write: Write) -> WriteResult:
        if write.nbytes != 16 * PAGE or len(write.regions) == 1:
            return await super().put_one(write)
        self.publish(write.key, await self.abandon(self.take, write))
        return None


@breaks("a cancelled put leaves each object whole or absent")
class LeavesHalfAnObject(HonestBackend):
    async def put_one(self, write: Write) -> WriteResult:
        if write.nbytes != 8 * PAGE:
            return await super().put_one(write)
        content = self.take(write)
        self.place.objects[write.key] = content[: len(content) // 2]
        await asyncio.sleep(0)
        self.place.objects[write.key] = content
        return None


@breaks("a cancelled delete leaves each object whole or absent")
class DeletesInTwoSteps(HonestBackend):
    """The bytes, then the entry: in between the entry names nothing."""

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        if len(keys) != 4:
            return await super().delete(keys)
        for key in keys:
            if key in self.place.objects:
                self.place.objects[key] = b""
                await asyncio.sleep(0)
                self.forget(key)
        return [None] * len(keys)


@breaks("after many cancelled calls the backend still serves", Outcome.HUNG)
class LosesATurnPerCancellation(HonestBackend):
    async def open(self) -> None:
        self.turns = 12
        await super().open()

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        if len(reads) != 1 or len(reads[0].regions) != 1 or reads[0].nbytes != 2 * PAGE:
            return await super().get(reads)
        if not self.turns:
            HELD_UP.reached.set()
            await asyncio.Event().wait()
        self.turns -= 1
        await asyncio.sleep(0)
        found = await super().get(reads)
        self.turns += 1  # not in a finally
        return found


@breaks("a cancelled put has let go of its memory")
class StoresNothingOfTheFirst(HonestBackend):
    """Has let go of everything, and kept nothing."""

    async def put_one(self, write: Write) -> WriteResult:
        if write.nbytes == 16 * PAGE and len(write.regions) == 2 and not self.place.objects:
            return None
        return await super().put_one(write)


@breaks("a cancelled delete leaves each object whole or absent")
class DeletesAtNight(HonestBackend):
    """Whole they are, and there for good."""

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        if [self.size(key) for key in keys] != [4 * PAGE] * 4:
            await super().delete(keys)
        return [None] * len(keys)


@breaks("a revoked call returns at once")
class FinishesWhatItBegan(HonestBackend):
    """Says it can be revoked, and sees each call through."""

    async def get_one(self, read: Read) -> ReadResult:
        try:
            return await super().get_one(read)
        except asyncio.CancelledError:
            if read.nbytes == 16 * PAGE and len(read.regions) == 1:
                await asyncio.sleep(0.15)
            raise


@breaks("a revoked call returns at once")
class StoresWhatItBegan(HonestBackend):
    async def put_one(self, write: Write) -> WriteResult:
        try:
            return await super().put_one(write)
        except asyncio.CancelledError:
            if write.nbytes == 16 * PAGE and len(write.regions) == 1:
                await asyncio.sleep(0.15)
            raise


@breaks("withdrawn memory is in no calls hands")
class ForgetsAtOnce(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.turns = 0

    async def introduce(self, region: memoryview, /) -> None:
        self.turns = 50  # or a quick machine has read before anybody looks

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        return await super().get(reads)

    async def withdraw(self, region: memoryview, /) -> None:
        """Whoever uses it."""


@breaks("memory comes and goes at any time", Outcome.FAILED)
class KnowsWhatItWasTold(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.regions: list[int] = []

    async def introduce(self, region: memoryview, /) -> None:
        self.regions.append(id(region))

    async def withdraw(self, region: memoryview, /) -> None:
        await super().withdraw(region)
        self.regions.remove(id(region))
