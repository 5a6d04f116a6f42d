"""Objects are coded anew where they lie, and whatever happens meanwhile none is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from codecs_of_tests import DOUBLES, FAILS, SHRINKS, Doubles, Shrinks
from hang import HANG
from stacks import CHUNK, MemoryBackend
from transcoding_process import (
    CODINGS,
    COUNT,
    PAYLOAD,
    content,
    key,
    objects_of,
    opened,
    store,
    transcode,
)

from kvlayer.abc.backend import Write, WriteResult
from kvlayer.abc.codec import Coded
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey, ObjectName
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload, Segment
from kvlayer.results import Cause
from kvlayer.testing.loan import Loan
from kvlayer.tier.planner.copies import Copy
from kvlayer.tier.transfer.encodings import Coding, Raw, Segments
from kvlayer.tier.transfer.named import Named
from kvlayer.tier.transfer.objects import Item, Objects
from kvlayer.tier.transfer.relay import Relayed

SCRIPT = Path(__file__).parents[2] / "support" / "transcoding_process.py"
CALLS_PER_OBJECT = 4  # the old is read, the new is put, read, and the old is deleted


@pytest.fixture
def slab() -> Iterator[Slab]:
    slab = Slab(4096)
    yield slab
    slab.close()


def files(directory: Path) -> dict[Path, int]:
    found = [p for p in (directory / "v2").rglob("*-16.*") if "quarantine" not in p.parts]
    return {path: path.stat().st_size for path in found}


def by_object(directory: Path) -> Counter[str]:
    return Counter(path.name[:64] for path in files(directory))


def killed(directory: Path, codec: str, call: int) -> None:
    """A process that codes all objects anew, and is killed when it calls its backend."""
    path = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(directory), codec, str(call)],
        env={**os.environ, "PYTHONPATH": path},
        timeout=HANG,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


async def holds(objects: Objects, number: int) -> None:
    into = Loan(PAYLOAD.body_nbytes)
    item = Item(key(number), PAYLOAD, CHUNK * number, into.regions())
    assert (await objects.get(1, item)).ok
    into.holds(content(number), f"object {number}")


@pytest.mark.parametrize("codec", CODINGS)
@pytest.mark.parametrize("call", range(CALLS_PER_OBJECT + 1))
@pytest.mark.asyncio
async def test_a_process_that_is_killed_in_between_loses_nothing(
    tmp_path: Path, codec: str, call: int
) -> None:
    codings = (CODINGS[codec], Raw())
    async with opened(str(tmp_path), (Raw(),)) as (_, objects):
        for number in range(COUNT):
            assert (await store(objects, number)).ok
    await asyncio.to_thread(killed, tmp_path, codec, CALLS_PER_OBJECT + call)
    counts = by_object(tmp_path)  # the first object is done, the second was under way
    both = {2, 3}  # after the new was put, before the old was deleted
    assert len(counts) == COUNT and sum(counts.values()) == COUNT + (call in both)
    async with opened(str(tmp_path), codings) as (backend, objects):
        await backend.recovered()
        sizes = files(tmp_path)
        assert (backend.objects, backend.used_nbytes) == (len(sizes), sum(sizes.values()))
        for number in range(COUNT):
            await holds(objects, number)
        outcomes = await transcode(objects)  # again: it goes on where it was
        assert [outcome.cause for outcome in outcomes] == [None] * COUNT
        sizes = files(tmp_path)
        assert all(p.name.endswith(str(codings[0].encoding)) for p in sizes)
        assert set(by_object(tmp_path).values()) == {1} and len(sizes) == COUNT
        assert [Copy.read(outcome.copy) for outcome in outcomes] == [
            (1, outcome.nbytes) for outcome in outcomes
        ]
        assert sum(outcome.nbytes for outcome in outcomes) == sum(sizes.values())
        assert (backend.objects, backend.used_nbytes) == (COUNT, sum(sizes.values()))
        for number in range(COUNT):
            await holds(objects, number)


@pytest.mark.parametrize("codec", CODINGS)
@pytest.mark.asyncio
async def test_where_both_lie_after_a_kill_either_may_be_evicted_and_the_beginning_stays(
    tmp_path: Path, codec: str
) -> None:
    codings = (CODINGS[codec], Raw())
    for which in ((Raw(),), codings):  # each object twice, as when nothing had been deleted
        async with opened(str(tmp_path), which) as (_, objects):
            for number in range(COUNT):
                assert (await store(objects, number)).ok
    assert set(by_object(tmp_path).values()) == {2}
    used = sum(files(tmp_path).values())
    async with opened(str(tmp_path), codings, capacity=used) as (backend, objects):
        await backend.recovered()
        assert (backend.objects, backend.used_nbytes) == (2 * COUNT, used)
        for number in range(100, 106):  # another prompt
            assert (await store(objects, number)).ok
            sizes = files(tmp_path)
            assert backend.used_nbytes == sum(sizes.values()) <= used
            assert backend.objects == len(sizes)
            there = [key(n).end_hash.hex() in by_object(tmp_path) for n in range(COUNT)]
            assert there == sorted(there, reverse=True)


@pytest.mark.parametrize("one", ["raw", "doubles", "shrinks"])
@pytest.mark.parametrize("other", ["raw", "doubles", "shrinks"])
@pytest.mark.asyncio
async def test_an_object_goes_from_any_encoding_to_any(slab: Slab, one: str, other: str) -> None:
    every: dict[str, Coding] = {"raw": Raw(), "doubles": DOUBLES, "shrinks": SHRINKS}
    memory = MemoryBackend()
    writer = objects_of(slab, Named(memory, encodings=[every[one].encoding]), [every[one]])
    for number in range(COUNT):
        assert (await store(writer, number)).ok
    codings = [every[other], *([every[one]] if one != other else [])]
    named = Named(memory, encodings=[coding.encoding for coding in codings])
    objects = objects_of(slab, named, codings)
    outcomes = await transcode(objects)
    assert [outcome.cause for outcome in outcomes] == [None] * COUNT
    assert {*memory.objects} == {
        ObjectName.made(key(n), every[other].encoding) for n in range(COUNT)
    }
    for number in range(COUNT):
        await holds(objects, number)
    assert [arena.used_nbytes for arena in objects._arenas] == [0, 0]
    writer.close()
    objects.close()


class Rig:
    """Objects that lie raw on a tier that writes another encoding."""

    def __init__(self, slab: Slab, coding: Coding) -> None:
        self.memory = MemoryBackend()
        self.codings = [coding, Raw()]
        self.named = Named(self.memory, encodings=[each.encoding for each in self.codings])
        self.objects = objects_of(slab, self.named, self.codings)

    def raw(self, number: int) -> ObjectKey:
        return ObjectName.raw(key(number))

    def coded(self, number: int) -> ObjectKey:
        return ObjectName.made(key(number), self.codings[0].encoding)

    async def store(self, slab: Slab) -> None:
        writer = objects_of(slab, Named(self.memory), [Raw()])
        for number in range(COUNT):
            assert (await store(writer, number)).ok
        writer.close()

    async def outcome(self, number: int) -> tuple[Cause | None, str]:
        moves = [Relayed(key(number), CHUNK * number)]
        (outcome,) = await self.objects.transcode(moves, 1)
        assert [arena.used_nbytes for arena in self.objects._arenas] == [0, 0]
        return outcome.cause, outcome.detail


class Forgets(Shrinks):
    """Codes something else than it is given."""

    name = "forgets"

    def encode(
        self, payload: Payload, segment: Segment, raw: Sequence[memoryview], into: memoryview, /
    ) -> Coded:
        return super().encode(payload, segment, [memoryview(bytes(segment.nbytes))], into)


@pytest.mark.asyncio
async def test_what_a_codec_gets_wrong_is_taken_away_and_the_old_stays(slab: Slab) -> None:
    rig = Rig(slab, Segments(Forgets()))
    await rig.store(slab)
    before = dict(rig.memory.objects)
    cause, detail = await rig.outcome(1)
    assert cause is Cause.CORRUPT and "another object" in detail
    assert rig.memory.objects == before
    rig.objects.close()


@pytest.mark.parametrize("what", ["encode", "decode"])
@pytest.mark.asyncio
async def test_a_codec_that_fails_costs_nothing(
    slab: Slab, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError

    rig = Rig(slab, DOUBLES)
    await rig.store(slab)
    before = dict(rig.memory.objects)
    monkeypatch.setattr(Doubles, what, fails)
    cause, detail = await rig.outcome(1)
    assert cause is Cause.TIER_DOWN and "MemoryError" in detail
    assert before.items() <= rig.memory.objects.items()  # of the new nothing is known
    monkeypatch.undo()
    assert await rig.outcome(1) == (None, "")
    assert rig.raw(1) not in rig.memory.objects
    rig.objects.close()


@pytest.mark.asyncio
async def test_a_new_one_that_cannot_be_decoded_is_taken_away(slab: Slab) -> None:
    rig = Rig(slab, FAILS)
    writer = objects_of(slab, Named(rig.memory), [Raw()])
    body = b"\1" * PAYLOAD.body_nbytes
    item = Item(key(1), PAYLOAD, CHUNK, (memoryview(body),))
    assert (await writer.put(1, item)).ok
    before = dict(rig.memory.objects)
    cause, detail = await rig.outcome(1)
    assert cause is Cause.CORRUPT and "unheard of" in detail
    assert rig.memory.objects == before
    writer.close()
    rig.objects.close()


@pytest.mark.asyncio
async def test_a_damaged_old_one_is_no_source_and_a_good_new_one_is_enough(slab: Slab) -> None:
    rig = Rig(slab, SHRINKS)
    await rig.store(slab)
    assert await rig.outcome(0) == (None, "")
    for number in (0, 1):
        frame = bytearray(rig.memory.objects.get(rig.raw(number)) or bytes(2 * 4096))
        frame[4100] ^= 1
        rig.memory.objects[rig.raw(number)] = bytes(frame)
    assert await rig.outcome(0) == (None, "")  # what is damaged goes
    assert rig.raw(0) not in rig.memory.objects and rig.coded(0) in rig.memory.objects
    cause, _ = await rig.outcome(1)
    assert cause is Cause.CORRUPT
    assert rig.raw(1) in rig.memory.objects and rig.coded(1) not in rig.memory.objects
    rig.objects.close()


@pytest.mark.asyncio
async def test_a_damaged_new_one_is_taken_away_and_made_again(slab: Slab) -> None:
    rig = Rig(slab, SHRINKS)
    await rig.store(slab)
    raw = rig.memory.objects[rig.raw(2)]
    assert await rig.outcome(2) == (None, "")
    frame = bytearray(rig.memory.objects[rig.coded(2)])
    frame[4100] ^= 1
    rig.memory.objects |= {rig.coded(2): bytes(frame), rig.raw(2): raw}
    put = rig.memory.put

    async def keeps(writes: Sequence[Write]) -> list[WriteResult]:
        """What is there stays, as a backend promises."""
        return await put([write for write in writes if write.key not in rig.memory.objects]) or [
            None
        ]

    rig.memory.put = keeps  # type: ignore[method-assign]
    assert (await rig.outcome(2))[0] is Cause.CORRUPT
    assert rig.raw(2) in rig.memory.objects and rig.coded(2) not in rig.memory.objects
    assert await rig.outcome(2) == (None, "")
    await holds(rig.objects, 2)
    rig.objects.close()


@pytest.mark.asyncio
async def test_a_tier_that_fails_keeps_what_it_had(slab: Slab) -> None:
    rig = Rig(slab, SHRINKS)
    await rig.store(slab)
    before = dict(rig.memory.objects)

    async def full(writes: Sequence[Write]) -> list[WriteResult]:
        return [BackendError("the disk is full") for _ in writes]

    rig.memory.put = full  # type: ignore[method-assign]
    cause, detail = await rig.outcome(3)
    assert cause is Cause.TIER_DOWN and "full" in detail
    assert rig.memory.objects == before
    assert (await rig.outcome(COUNT))[0] is Cause.VANISHED
    rig.objects.close()


@pytest.mark.asyncio
async def test_an_object_that_scratch_has_no_room_for_is_left(slab: Slab) -> None:
    small = Slab(4096, scratch_nbytes=4 * 4096)
    memory = MemoryBackend()
    objects = objects_of(small, Named(memory, encodings=[DOUBLES.encoding]), [DOUBLES])
    (outcome,) = await objects.transcode([Relayed(key(0), 0)], 1)
    assert outcome.cause is Cause.NO_ROOM and "scratch" in outcome.detail
    objects.close()
    small.close()
