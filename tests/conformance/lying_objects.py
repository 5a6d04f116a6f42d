"""Liars about single objects: their bytes, sizes and names."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from honest import HonestBackend, Options
from liars import PAGE, breaks

from kvlayer.abc.backend import Hit, Miss, Read, ReadResult, Write, WriteResult
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.suite import Outcome
from kvlayer.urls import BackendURL


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
        known = {name: value for name, value in url.options.items() if name == "capacity"}
        return super().from_url(replace(url, options=known))


@breaks("an unknown option is a config error")
class TakesAnyCapacityForNone(HonestBackend):
    @classmethod
    def from_url(cls, url: BackendURL, /) -> TakesAnyCapacityForNone:
        if url.options == {"capacity": "plenty"}:
            return cls(url.path, Options())
        return super().from_url(url)


@breaks("building a backend touches nothing")
class MakesItsFolderAtOnce(HonestBackend):
    def __init__(self, path: str, options: Options) -> None:
        super().__init__(path, options)
        if os.path.isdir(path):
            os.makedirs(os.path.join(path, "objects"), exist_ok=True)


@breaks("an object cut short is replaced")
class TheFirstWinsWhateverBecomesOfIt(HonestBackend):
    def is_there(self, key: ObjectKey) -> bool:
        return key in self.place.objects


@breaks("an object cut short is replaced")
class TheLongerWins(HonestBackend):
    """Not by what the header says: a whole object of another length goes, too."""

    def is_there(self, key: ObjectKey) -> bool:
        stored = self.place.objects.get(key)
        is_framed = stored is not None and stored[:3] == b"KVL"[: len(stored)]
        return stored is not None and (not is_framed or len(stored) < 3 * PAGE < len(stored))


@breaks("regions may lie anywhere")
class WantsWholePages(HonestBackend):
    async def put_one(self, write: Write) -> WriteResult:
        if any(region.nbytes % PAGE for region in write.regions):
            return BackendError("EINVAL")
        return await super().put_one(write)


@breaks("regions may lie anywhere")
class WritesOneByteTooFar(HonestBackend):
    """Fills by address in whole words, as native code does."""

    def fill(self, stored: bytes, read: Read) -> int:
        nbytes = super().fill(stored, read)
        if read.offset == 1:
            last = read.regions[-1]
            address = ctypes.addressof(ctypes.c_char.from_buffer(last))
            ctypes.memset(address + last.nbytes, 0, 1)
        return nbytes


@breaks("what landed is all there")
class SaysSoBeforeItIs(HonestBackend):
    def fill_and_say(self, stored: bytes, read: Read) -> int:
        if read.landed is not None:
            read.landed(len(stored))
        return self.fill(stored, read)


@breaks("what landed is all there")
class SaysSoOfWhatIsMissing(HonestBackend):
    async def get_one(self, read: Read) -> ReadResult:
        result = await super().get_one(read)
        if result == Miss() and read.landed is not None:
            read.landed(0)
        return result


@breaks("what landed is all there")
class SaysSoAfterwards(HonestBackend):
    def fill_and_say(self, stored: bytes, read: Read) -> int:
        return self.fill(stored, read)

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        results = await super().get(reads)
        for read, result in zip(reads, results, strict=True):
            if read.landed is not None and isinstance(result, Hit):
                asyncio.get_running_loop().call_soon(read.landed, result.nbytes)
        return results


@breaks("what landed is all there")
class SaysSoTwice(HonestBackend):
    def fill_and_say(self, stored: bytes, read: Read) -> int:
        nbytes = super().fill_and_say(stored, read)
        if read.landed is not None:
            read.landed(nbytes)
        return nbytes


@breaks("what landed is all there")
class FillsAgainAfterwards(HonestBackend):
    """The bytes are right, and no longer its own to write."""

    def fill_and_say(self, stored: bytes, read: Read) -> int:
        nbytes = super().fill_and_say(stored, read)
        return self.fill(stored, read) if read.landed is not None else nbytes
