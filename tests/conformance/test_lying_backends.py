"""Every liar fails exactly the promise it breaks, and every promise has a liar that breaks it."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
from honest import HonestBackend, Options, Place

from kvlayer.abc.backend import Capability, Hit, Listed, Read, ReadResult, Write, WriteResult
from kvlayer.errors import BackendError
from kvlayer.keys import ObjectKey
from kvlayer.registry import BACKENDS
from kvlayer.testing.bounded import Patience
from kvlayer.testing.suite import Outcome
from kvlayer.testing.suites.backend import BackendSuite
from kvlayer.urls import BackendURL

PAGE = 4096
LIARS: dict[type[HonestBackend], tuple[str, Outcome]] = {}
"""Liar -> the promise it breaks, and how that looks."""


def breaks(
    name: str, outcome: Outcome = Outcome.BROKEN
) -> Callable[[type[HonestBackend]], type[HonestBackend]]:
    def register(liar: type[HonestBackend]) -> type[HonestBackend]:
        LIARS[liar] = (name, outcome)
        return liar

    return register


class HonestSuite(BackendSuite):
    """All promises, in small."""

    backends = BACKENDS.extended({"honest": HonestBackend})
    url = "honest://{directory}"
    small_url = "honest://{directory}?capacity=256KiB"
    large_nbytes = 64 * PAGE
    many_objects = 110
    many_keys = 200
    many_regions = 40

    def truncate(self, key: ObjectKey, nbytes: int, /) -> None:
        objects = Place.at(str(self.directory)).objects
        objects[key] = objects[key][:nbytes]


class HeldUp:
    """A point at which a liar stays for ever; patience with it ends when it gets there."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def patience(self) -> Patience:
        self.reached.clear()

        def wait(done: threading.Event) -> bool:
            while not done.wait(0.005):
                if self.reached.is_set():
                    return False
            return True

        return wait


HELD_UP = HeldUp()


class LiarSuite(HonestSuite):
    def patience(self) -> Patience:
        return HELD_UP.patience()


def found_in(liar: type[HonestBackend]) -> dict[str, Outcome]:
    class Asked(LiarSuite):
        backends = BACKENDS.extended({"honest": liar})

    return {v.promise.name: v.outcome for v in Asked().run() if not v.is_good}


# -- objects -------------------------------------------------------------------------------------


@breaks("what was put is read back to the byte")
class DropsNewlines(HonestBackend):
    """Text mode: one byte more or less, in the only content that has the pair."""

    def take(self, write: Write) -> bytes:
        content = super().take(write)
        return content.replace(b"\xff\0\r\n", b"\xff\0\n\n")


@breaks("a large object is read back to the byte")
class ForgetsTheEnd(HonestBackend):
    """Writes a large object in pieces and loses the last of them when the first is a page."""

    def take(self, write: Write) -> bytes:
        content = super().take(write)
        if len(content) == 64 * PAGE and write.regions[0].nbytes == PAGE:
            return content[:-1] + b"\0"
        return content


@breaks("regions are one object however it is cut")
class FillsTheFirstRegionAgain(HonestBackend):
    def fill(self, stored: bytes, read: Read) -> int:
        filled = super().fill(stored, read)
        if len(read.regions) == 4 and len(stored) == 9 * PAGE:
            read.regions[1][:] = read.regions[0][:PAGE]
        return filled


@breaks("more regions than a system call takes are moved", Outcome.FAILED)
class PassesRegionsToOneSystemCall(HonestBackend):
    def take(self, write: Write) -> bytes:
        if len(write.regions) > 32:
            raise OSError(errno.EINVAL, "Invalid argument")
        return super().take(write)


@breaks("a read starts at its offset")
class StartsAtWholeSectors(HonestBackend):
    """Rounds an offset down to what its store reads at once."""

    def fill(self, stored: bytes, read: Read) -> int:
        if len(stored) != 6 * PAGE:
            return super().fill(stored, read)
        return super().fill(
            stored, Read(read.key, read.regions, read.offset // (2 * PAGE) * 2 * PAGE)
        )


@breaks("a read ends with the object")
class ClaimsWhatWasAsked(HonestBackend):
    def fill(self, stored: bytes, read: Read) -> int:
        filled = super().fill(stored, read)
        return read.nbytes if filled < read.nbytes and len(stored) == 3 * PAGE else filled


@breaks("a miss is a value")
class HasNoBucketYet(HonestBackend):
    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        if not self.place.described and len(reads) == 1:
            return [BackendError("no bucket yet")]
        return await super().get(reads)

    def publish(self, key: ObjectKey, content: bytes) -> None:
        self.place.described["has a bucket"] = b""
        super().publish(key, content)

    async def namespaces(self) -> Mapping[str, bytes]:
        return {}


@breaks("contains says the exact size")
class SaysTheSizeOfItsBlocks(HonestBackend):
    def size(self, key: ObjectKey) -> int | None:
        size = super().size(key)
        return 36 * PAGE if size == 33 * PAGE else size


@breaks("a present object is not written again")
class TheLastWriterWins(HonestBackend):
    """By replacing the file: right as long as names are content, and nobody is reading."""

    async def put_one(self, write: Write) -> WriteResult:
        if len(self.place.objects) == 1 and self.size(write.key) == 2 * PAGE:
            self.place.objects[write.key] = self.take(write)
        return await super().put_one(write)


@breaks("keys that differ anywhere name different objects")
class CutsLongNames(HonestBackend):
    def find(self, key: ObjectKey) -> bytes | None:
        short = str(key).split(".native:a")[0]
        return next(
            (
                v
                for k, v in self.place.objects.items()
                if k == key or k.startswith(f"{short}.native")
            ),
            None,
        )


@breaks("a truncated object reads short")
class PadsWhatIsShort(HonestBackend):
    """A buffer of its own, as large as the index says the object is."""

    def fill(self, stored: bytes, read: Read) -> int:
        return super().fill(stored + bytes(-len(stored) % PAGE), read)


@breaks("a read writes inside its regions only")
class WritesThroughTheBuffersOwner(HonestBackend):
    def fill(self, stored: bytes, read: Read) -> int:
        filled = super().fill(stored, read)
        if read.nbytes > len(stored) == 4 * PAGE:
            read.regions[0].obj[-PAGE:] = b"!" * PAGE  # type: ignore[index]
        return filled


@breaks("a put leaves the callers bytes alone")
class EncryptsInPlace(HonestBackend):
    def take(self, write: Write) -> bytes:
        content = super().take(write)
        if not self.place.objects and len(content) == 4 * PAGE and len(write.regions) == 2:
            write.regions[0][:16] = bytes(16)
        return content


@breaks("an unknown option is a config error")
class TakesAnyOption(HonestBackend):
    @classmethod
    def from_url(cls, url: BackendURL, /) -> TakesAnyOption:
        capacity = int(url.options.get("capacity", "1024KiB").removesuffix("KiB")) * 1024
        return cls(url.path, Options(capacity if "capacity" in url.options else 1 << 30))


@breaks("building a backend touches nothing")
class MakesItsFolderAtOnce(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        if os.path.isdir(path):
            os.makedirs(os.path.join(path, "objects"), exist_ok=True)


# -- batches -------------------------------------------------------------------------------------


@breaks("a batch is answered in its own order")
class AnswersInTheOrderOfItsIndex(HonestBackend):
    async def contains(self, keys: Sequence[ObjectKey], /) -> list[int | None]:
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
    async def contains(self, keys: Sequence[ObjectKey], /) -> list[int | None]:
        if len(keys) > 130:
            raise BackendError("too many SQL variables")
        return await super().contains(keys)


@breaks("a bad item does not spoil its batch", Outcome.FAILED)
class ParsesEveryKeyFirst(HonestBackend):
    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        for write in writes:
            ObjectKey.parse(write.key)
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


# -- lent memory and cancelling ------------------------------------------------------------------


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
            assert self.gate.wait(30)
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

    async def delete(self, keys: Sequence[ObjectKey], /) -> None:
        if len(keys) != 4:
            return await super().delete(keys)
        for key in keys:
            if key in self.place.objects:
                self.place.objects[key] = b""
                await asyncio.sleep(0)
                self.forget(key)
        return None


@breaks("after many cancelled calls the backend still serves", Outcome.HUNG)
class LosesATurnPerCancellation(HonestBackend):
    async def open(self) -> None:
        self.turns = 12
        self.freed = asyncio.Event()
        await super().open()

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[int | None]:
        return await super().contains(keys)

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


# -- what is removed, listed, hinted and described -----------------------------------------------


@breaks("what is deleted is gone and nothing else")
class DeletesByPrefix(HonestBackend):
    async def delete(self, keys: Sequence[ObjectKey], /) -> None:
        prefixes = [f"{key.rsplit('.', 2)[0]}." for key in keys]
        if len(keys) == 1 and len(self.place.objects) == 5:
            keys = [k for k in self.place.objects if k.startswith(prefixes[0])]
        await super().delete(keys)


@breaks("deleting what is missing is ignored", Outcome.FAILED)
class RaisesForWhatIsMissing(HonestBackend):
    async def delete(self, keys: Sequence[ObjectKey], /) -> None:
        if len(keys) == 1 and not self.place.objects:
            raise BackendError("404")
        await super().delete(keys)


@breaks("what was deleted can be stored again")
class LeavesATombstone(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.dead: set[ObjectKey] = set()

    async def delete(self, keys: Sequence[ObjectKey], /) -> None:
        await super().delete(keys)
        if len(keys) == 2:
            self.dead.update(keys)

    async def put_one(self, write: Write) -> WriteResult:
        return None if write.key in self.dead else await super().put_one(write)


@breaks("what is quarantined is never offered again")
class QuarantineHidesTheSizeOnly(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.hidden: set[ObjectKey] = set()

    async def quarantine(self, keys: Sequence[ObjectKey], /) -> None:
        if len(keys) == 2:
            self.hidden.update(keys)
        else:
            await super().quarantine(keys)

    def size(self, key: ObjectKey) -> int | None:
        return None if key in self.hidden else super().size(key)


@breaks("what is quarantined stays out of sight after a restart")
class QuarantineIsForgotten(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        self.hidden: set[ObjectKey] = set()

    async def quarantine(self, keys: Sequence[ObjectKey], /) -> None:
        self.hidden.update(keys)

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


# -- life, sharing and room ----------------------------------------------------------------------


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
    async def contains(self, keys: Sequence[ObjectKey], /) -> list[int | None]:
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
    def make_room(self, nbytes: int) -> None:
        super().make_room(0)


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


# -- the verdicts --------------------------------------------------------------------------------


def test_the_honest_backend_keeps_every_promise() -> None:
    verdicts = list(HonestSuite().run())
    assert [
        (v.promise.name, v.outcome, v.found) for v in verdicts if v.outcome is not Outcome.KEPT
    ] == []


@pytest.mark.parametrize("liar", LIARS, ids=lambda liar: liar.__name__)
def test_a_liar_fails_exactly_the_promise_it_breaks(liar: type[HonestBackend]) -> None:
    name, outcome = LIARS[liar]
    assert found_in(liar) == {name: outcome}


def test_every_promise_has_a_liar() -> None:
    assert {name for name, _ in LIARS.values()} == {p.name for p in HonestSuite.promises()}
