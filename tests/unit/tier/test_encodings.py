"""A codec that fails costs the object that it failed at, and is never believed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

import pytest
from codecs_of_tests import DOUBLES, FAILS, SHRINKS, Doubles
from hang import HANG
from stacks import CHUNK, NAMESPACE, MemoryBackend, full_group

from kvlayer.abc.codec import Coded
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, Part
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload, Segment
from kvlayer.results import Cause
from kvlayer.runtime.offload import Offload
from kvlayer.testing.loan import Loan, noise
from kvlayer.tier.transfer.encodings import Coding, Raw, Segments
from kvlayer.tier.transfer.objects import Item, Lending, Objects

PART = Part(0, (0, 2), (0, 2))
PAYLOAD = Payload.of(full_group(), PART, CHUNK)
LARGE = Payload.of(full_group(), PART, 128 * CHUNK)
"""Of two segments, and too large to be coded on the loop."""
CODINGS = {"doubles": DOUBLES, "shrinks": SHRINKS}


def key(number: int, tokens: int = CHUNK) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, PUBLIC_ZONE, number.to_bytes(32, "little"), tokens, PART)


@pytest.fixture
def slab() -> Iterator[Slab]:
    slab = Slab(4096)
    yield slab
    slab.close()


def objects_of(
    slab: Slab, backend: MemoryBackend, *codings: Coding, payload: Payload = PAYLOAD
) -> Objects:
    return Objects(
        slab,
        [None, backend],
        shape=lambda _, tokens: payload,
        clock=asyncio.get_running_loop().time,
        wall_clock=lambda: 0.0,
        build="test",
        codings=[(), codings],
    )


def lent(loan: Loan, number: int, lending: Lending) -> Item:
    return Item(key(number), PAYLOAD, 0, loan.pieces((13, 1)), lending)


def whole(loan: Loan, lending: Lending) -> Item:
    return Item(key(1, LARGE.tokens), LARGE, 0, loan.pieces((13, 1)), lending)


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("lending", Lending)
@pytest.mark.asyncio
async def test_what_is_coded_goes_to_memory_that_lies_anywhere_and_nowhere_else(
    slab: Slab, name: str, lending: Lending
) -> None:
    objects = objects_of(slab, MemoryBackend(), CODINGS[name])
    contents = [noise(n, PAYLOAD.body_nbytes) for n in range(3)]
    loans = [Loan(len(content), content, shift=7 * n) for n, content in enumerate(contents)]
    puts = (objects.put(1, lent(loan, n, lending)) for n, loan in enumerate(loans))
    assert all(outcome.ok for outcome in await asyncio.gather(*puts))
    into = [Loan(len(content), shift=5 * n) for n, content in enumerate(contents)]
    gets = (objects.get(1, lent(loan, n, lending)) for n, loan in enumerate(into))
    assert all(outcome.ok for outcome in await asyncio.gather(*gets))
    for loan, content in zip((*loans, *into), (*contents, *contents), strict=True):
        loan.holds(content, "an object")
        loan.guards_stand()
    objects.close()


@pytest.mark.asyncio
async def test_an_object_that_cannot_be_coded_is_not_written_and_its_batch_is(slab: Slab) -> None:
    backend = MemoryBackend()
    objects = objects_of(slab, backend, FAILS)
    contents = [bytes([n % 2]) + noise(n, PAYLOAD.body_nbytes - 1) for n in range(4)]
    loans = [Loan(len(content), content) for content in contents]
    puts = (objects.put(1, lent(loan, n, Lending.HELD)) for n, loan in enumerate(loans))
    outcomes = await asyncio.gather(*puts)
    assert [outcome.cause for outcome in outcomes] == [Cause.TIER_DOWN, None] * 2
    assert "it begins with a zero" in outcomes[0].detail
    assert set(backend.objects) == {key(1), key(3)}
    objects.close()


@pytest.mark.asyncio
async def test_what_a_codec_cannot_read_is_corrupt(
    slab: Slab,
) -> None:
    objects = objects_of(slab, MemoryBackend(), FAILS)
    content = bytes([1]) + noise(1, PAYLOAD.body_nbytes - 1)
    assert (await objects.put(1, lent(Loan(len(content), content), 1, Lending.HELD))).ok
    into = Loan(len(content))
    outcome = await objects.get(1, lent(into, 1, Lending.CALL))
    assert (outcome.cause, outcome.detail) == (Cause.CORRUPT, "fails: unheard of")
    into.guards_stand()
    objects.close()


@pytest.mark.asyncio
async def test_a_codec_that_writes_more_than_it_said_is_not_believed(
    slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = MemoryBackend()
    objects = objects_of(slab, backend, DOUBLES)
    codec = type(DOUBLES._codec)  # type: ignore[attr-defined]
    monkeypatch.setattr(codec, "encode", lambda *_: Coded(2 * PAYLOAD.body_nbytes + 1))
    content = noise(1, PAYLOAD.body_nbytes)
    outcome = await objects.put(1, lent(Loan(len(content), content), 1, Lending.HELD))
    assert outcome.cause is Cause.TIER_DOWN and "at most" in outcome.detail
    assert not backend.objects
    objects.close()


class Halts(Doubles):
    """Waits on its thread, in the middle of a segment, until it is told to go on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.is_at_work = asyncio.Event()
        self.goes_on = Event()
        self.was_told: list[bool] = []
        self._loop = loop

    def _halt(self) -> None:
        self._loop.call_soon_threadsafe(self.is_at_work.set)
        self.was_told.append(self.goes_on.wait(HANG))

    def encode(
        self, payload: Payload, segment: Segment, raw: Sequence[memoryview], into: memoryview, /
    ) -> Coded:
        self._halt()
        return super().encode(payload, segment, raw, into)

    def decode(self, *args: Any) -> None:
        self._halt()
        super().decode(*args)


@pytest.mark.parametrize("direction", ["put", "get"])
@pytest.mark.asyncio
async def test_who_leaves_while_its_object_is_coded_holds_no_loop_up_and_waits_for_its_memory(
    slab: Slab, direction: str
) -> None:
    codec = Halts(asyncio.get_running_loop())
    backend = MemoryBackend()
    objects = objects_of(slab, backend, Segments(codec), payload=LARGE)
    content = noise(1, LARGE.body_nbytes)
    loan = Loan(len(content), content)
    item = whole(loan, Lending.CALL)
    if direction == "get":
        codec.goes_on.set()
        assert (await objects.put(1, item)).ok
        codec.goes_on.clear()
        codec.is_at_work.clear()
    call = asyncio.ensure_future(getattr(objects, direction)(1, item))
    await codec.is_at_work.wait()
    call.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not call.done()  # its memory is in use
    codec.goes_on.set()
    await asyncio.wait({call}, timeout=HANG)
    assert call.cancelled() and all(codec.was_told)
    loan.guards_stand()
    loan.poison()
    objects.close()
    loan.is_poisoned_still()


@pytest.mark.parametrize("lending", Lending)
@pytest.mark.asyncio
async def test_after_an_object_that_cannot_be_decoded_its_memory_may_hold_anything(
    slab: Slab, lending: Lending, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments that came before it are there. Nothing else was written."""
    objects = objects_of(slab, MemoryBackend(), DOUBLES, payload=LARGE)
    content = noise(1, LARGE.body_nbytes)
    assert (await objects.put(1, whole(Loan(len(content), content), Lending.HELD))).ok
    codec = type(DOUBLES._codec)  # type: ignore[attr-defined]
    decode = codec.decode

    def fails_at_the_last(self: Doubles, payload: Payload, segment: Segment, *args: Any) -> None:
        if segment == payload.segments()[-1]:
            raise ValueError("it ends too soon")
        decode(self, payload, segment, *args)

    monkeypatch.setattr(codec, "decode", fails_at_the_last)
    into = Loan(len(content), shift=3)
    outcome = await objects.get(1, whole(into, lending))
    assert outcome.cause is Cause.CORRUPT and outcome.nbytes == 0
    first = LARGE.segments()[0]
    assert into.content(first.nbytes) == content[: first.nbytes]
    into.guards_stand()
    monkeypatch.undo()
    assert (await objects.get(1, whole(into, lending))).ok
    into.holds(content, "an object, once it can be read")
    objects.close()


@pytest.mark.parametrize(
    ("coding", "chunks", "hops"),
    [(Raw(), 32, 0), (Raw(), 64, 0), (Raw(), 128, 2), (DOUBLES, 2, 0), (DOUBLES, 32, 2)],
    ids=["128 KiB", "256 KiB", "512 KiB", "8 KiB coded", "128 KiB coded"],
)
@pytest.mark.asyncio
async def test_what_is_done_sooner_than_a_thread_is_woken_wakes_none(
    slab: Slab, coding: Coding, chunks: int, hops: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checksum of 256 KiB is; coding more than 16 KiB is not. Then a put is one hop: the write's.

    This backend tells of nothing that lands, so that reads are counted, too.
    """
    payload = Payload.of(full_group(), PART, chunks * CHUNK)
    objects = objects_of(slab, MemoryBackend(), coding, payload=payload)
    woken: list[object] = []
    run = Offload.run

    async def counted(self: Offload, work: Any, *args: Any) -> Any:
        woken.append(work)
        return await run(self, work, *args)

    monkeypatch.setattr(Offload, "run", counted)
    content = noise(1, payload.body_nbytes)
    loans = Loan(len(content), content), Loan(len(content))
    put, get = (Item(key(1, payload.tokens), payload, 0, loan.regions()) for loan in loans)
    assert (await objects.put(1, put)).ok and (await objects.get(1, get)).ok
    loans[1].holds(content, "an object")
    assert len(woken) == hops
    objects.close()
