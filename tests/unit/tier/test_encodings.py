"""A codec that fails costs the object that it failed at, and is never believed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from codecs_of_tests import DOUBLES, FAILS, SHRINKS
from stacks import CHUNK, NAMESPACE, MemoryBackend, full_group

from kvlayer.abc.codec import Coded
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, Part
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.testing.loan import Loan, noise
from kvlayer.tier.transfer.encodings import Coding
from kvlayer.tier.transfer.objects import Item, Lending, Objects

PART = Part(0, (0, 2), (0, 2))
PAYLOAD = Payload.of(full_group(), PART, CHUNK)
CODINGS = {"doubles": DOUBLES, "shrinks": SHRINKS}


def key(number: int) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, PUBLIC_ZONE, number.to_bytes(32, "little"), CHUNK, PART)


@pytest.fixture
def slab() -> Iterator[Slab]:
    slab = Slab(4096)
    yield slab
    slab.close()


def objects_of(slab: Slab, backend: MemoryBackend, *codings: Coding) -> Objects:
    return Objects(
        slab,
        [None, backend],
        shape=lambda _, tokens: PAYLOAD,
        clock=asyncio.get_running_loop().time,
        wall_clock=lambda: 0.0,
        build="test",
        codings=[(), codings],
    )


def lent(loan: Loan, number: int, lending: Lending) -> Item:
    return Item(key(number), PAYLOAD, 0, loan.pieces((13, 1)), lending)


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
async def test_what_a_codec_cannot_read_is_corrupt_and_leaves_a_caller_that_may_go_nothing(
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
