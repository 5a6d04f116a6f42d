"""Objects travel together and land alone: batches, memory of whoever calls, and scratch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest
from hang import HANG
from stacks import CHUNK, NAMESPACE, MemoryBackend, full_group

from kvlayer.abc.backend import Capability, Hit, Read, ReadResult, Write, WriteResult
from kvlayer.errors import BackendUnavailableError
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, Part
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.testing.loan import Loan, noise
from kvlayer.tier.messages import Outcome
from kvlayer.tier.transfer import coding
from kvlayer.tier.transfer.batch import MAX_ITEMS
from kvlayer.tier.transfer.objects import Item, Lending, Objects

PART = Part(0, (0, 2), (0, 2))


def payload_of(tokens: int = CHUNK) -> Payload:
    return Payload.of(full_group(), PART, tokens)


def key(number: int, tokens: int = CHUNK) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, PUBLIC_ZONE, number.to_bytes(32, "little"), tokens, PART)


class Recorder(MemoryBackend):
    """Remembers its batches; ``holds`` keys are read only when the gate opens, the others land."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.holds: set[ObjectKey] = set()
        self.opens = asyncio.Event()
        self.reading = asyncio.Event()
        self.was_cancelled = False
        self.is_deaf = False
        self.answers_again: list[BackendUnavailableError] = []

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        self.batches.append(len(reads))
        results: dict[ObjectKey, ReadResult] = {}
        for read in sorted(reads, key=lambda read: read.key in self.holds):
            if read.key in self.holds:
                self.reading.set()
                await self._wait()
            result = results[read.key] = self.fill(read)
            if isinstance(result, Hit) and read.landed is not None:
                read.landed(result.nbytes)
        if self.answers_again:
            again = self.answers_again.pop()
            return [again for _ in reads]
        return [results[read.key] for read in reads]

    async def _wait(self) -> None:
        while not self.opens.is_set():
            try:
                await self.opens.wait()
            except asyncio.CancelledError:
                self.was_cancelled = True
                if not self.is_deaf:
                    raise

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        self.batches.append(len(writes))
        if self.holds:
            self.reading.set()
            await self._wait()
        return await super().put(writes)


@pytest.fixture
def slab() -> Iterator[Slab]:
    slab = Slab(4096)
    yield slab
    slab.close()


def objects_of(slab: Slab, backend: MemoryBackend, *, retries: int = 0) -> Objects:
    return Objects(
        slab,
        [None, backend],
        shape=lambda _, tokens: payload_of(tokens),
        clock=asyncio.get_running_loop().time,
        wall_clock=lambda: 0.0,
        build="test",
        retries=[0, retries],
    )


def lent(loan: Loan, number: int, lending: Lending, tokens: int = CHUNK) -> Item:
    """An object in memory of the test's own, cut at odd places."""
    return Item(key(number, tokens), payload_of(tokens), 0, loan.pieces((13, 4096, 1)), lending)


async def stored(objects: Objects, count: int, tokens: int = CHUNK) -> list[bytes]:
    """Put so many objects from memory that lies anywhere; what they hold."""
    contents = [noise(n, payload_of(tokens).body_nbytes) for n in range(count)]
    loans = [Loan(len(content), content, shift=n % 100) for n, content in enumerate(contents)]
    outcomes = await asyncio.gather(
        *(objects.put(1, lent(loan, n, Lending.HELD, tokens)) for n, loan in enumerate(loans))
    )
    assert all(outcome.ok for outcome in outcomes)
    for loan, content in zip(loans, contents, strict=True):
        loan.holds(content, "memory that was lent for reading")
        loan.guards_stand()
    return contents


@pytest.mark.asyncio
async def test_what_asks_at_once_travels_together(slab: Slab) -> None:
    backend = Recorder()
    objects = objects_of(slab, backend)
    contents = await stored(objects, 40)
    assert backend.batches == [MAX_ITEMS, MAX_ITEMS, 8]
    backend.batches.clear()
    loans = [Loan(len(content), shift=7 * n) for n, content in enumerate(contents)]
    outcomes = await asyncio.gather(
        *(objects.get(1, lent(loan, n, Lending.HELD)) for n, loan in enumerate(loans))
    )
    assert backend.batches == [MAX_ITEMS, MAX_ITEMS, 8]
    assert [outcome.key for outcome in outcomes] == [key(n) for n in range(40)]
    for loan, content in zip(loans, contents, strict=True):
        loan.holds(content, "an object")
        loan.guards_stand()
    objects.close()


@pytest.mark.asyncio
async def test_a_batch_is_bounded_in_bytes_and_a_large_object_travels_alone(slab: Slab) -> None:
    backend = Recorder()
    objects = objects_of(slab, backend)
    await stored(objects, 5, tokens=CHUNK * 700)  # 2.7 MiB each
    assert backend.batches == [2, 2, 1]
    backend.batches.clear()
    await stored(objects, 3, tokens=CHUNK * 2100)  # more than a batch holds
    assert backend.batches == [1, 1, 1]
    objects.close()


@pytest.mark.asyncio
async def test_the_first_does_not_wait_for_the_last(slab: Slab) -> None:
    backend = Recorder()
    objects = objects_of(slab, backend)
    contents = await stored(objects, 3)
    backend.batches.clear()
    backend.holds = {key(2)}
    loans = [Loan(len(content)) for content in contents]
    gets = [
        asyncio.ensure_future(objects.get(1, lent(loan, n, Lending.HELD)))
        for n, loan in enumerate(loans)
    ]
    assert [(await gets[n]).ok for n in (0, 1)] == [True, True]
    assert backend.batches == [3] and not gets[2].done()
    backend.opens.set()
    assert (await gets[2]).ok
    objects.close()


@pytest.mark.asyncio
async def test_held_memory_comes_back_when_the_batch_has_let_go_of_it(slab: Slab) -> None:
    backend = Recorder()
    backend.is_deaf = True
    objects = objects_of(slab, backend)
    contents = await stored(objects, 2)
    backend.holds = {key(0), key(1)}
    loans = [Loan(len(content)) for content in contents]
    gets = [
        asyncio.ensure_future(objects.get(1, lent(loan, n, Lending.HELD)))
        for n, loan in enumerate(loans)
    ]
    await backend.reading.wait()
    for _ in range(3):  # asked again, it cannot be any faster
        gets[0].cancel()
        await asyncio.sleep(0)
    assert not gets[0].done() and not backend.was_cancelled  # the other still wants its own
    gets[1].cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert backend.was_cancelled and not any(get.done() for get in gets)
    backend.opens.set()
    await asyncio.wait(gets)
    assert all(get.cancelled() for get in gets)
    for loan in loans:
        loan.poison()
    await asyncio.sleep(0)
    for loan in loans:
        loan.is_poisoned_still()
    objects.close()


@pytest.mark.parametrize("is_revocable", [True, False])
@pytest.mark.asyncio
async def test_who_lends_for_the_call_may_leave_in_the_middle_of_it(
    slab: Slab, is_revocable: bool
) -> None:
    backend = Recorder()
    backend.is_deaf = not is_revocable
    if is_revocable:
        backend.capabilities = frozenset({Capability.REVOCABLE})
    objects = objects_of(slab, backend)
    contents = await stored(objects, 2)
    fresh = noise(9, len(contents[0]))
    backend.holds = {key(0)}
    into, out = Loan(len(contents[0]), shift=3), Loan(len(fresh), fresh, shift=5)
    reading = asyncio.ensure_future(objects.get(1, lent(into, 0, Lending.CALL)))
    await backend.reading.wait()
    backend.reading.clear()
    writing = asyncio.ensure_future(objects.put(1, lent(out, 7, Lending.CALL)))
    await backend.reading.wait()
    for call in (reading, writing):
        call.cancel()
    await asyncio.wait({reading, writing}, timeout=HANG)
    assert reading.cancelled() and writing.cancelled()
    for loan in (into, out):  # what goes on has another copy
        loan.guards_stand()
        loan.poison()
    backend.opens.set()
    for _ in range(20):
        await asyncio.sleep(0)
    for loan in (into, out):
        loan.is_poisoned_still()
    if not is_revocable:  # the write outlived its call, and stored what it was lent
        again = Loan(len(fresh))
        assert (await objects.get(1, lent(again, 7, Lending.CALL))).ok
        again.holds(fresh, "what was written after its caller had left")
    again = Loan(len(contents[1]), shift=1)
    assert (await objects.get(1, lent(again, 1, Lending.CALL))).ok
    again.holds(contents[1], "an object, afterwards")
    again.guards_stand()
    objects.close()


@pytest.mark.asyncio
async def test_what_has_landed_is_not_read_again(slab: Slab) -> None:
    """It is in use by then: a second read could spoil it."""
    backend = Recorder()
    objects = objects_of(slab, backend, retries=2)
    contents = await stored(objects, 2)
    backend.batches.clear()
    backend.answers_again = [BackendUnavailableError("the answer was lost")]
    loans = [Loan(len(content)) for content in contents]
    outcomes = await asyncio.gather(
        *(objects.get(1, lent(loan, n, Lending.HELD)) for n, loan in enumerate(loans))
    )
    assert [outcome.ok for outcome in outcomes] == [True, True]
    assert backend.batches == [2]
    objects.close()


@pytest.mark.asyncio
async def test_one_damaged_object_costs_its_batch_nothing(slab: Slab) -> None:
    backend = Recorder()
    objects = objects_of(slab, backend)
    contents = await stored(objects, 3)
    damaged = bytearray(backend.objects[key(1)])
    damaged[4100] ^= 1
    backend.objects[key(1)] = bytes(damaged)
    loans = [Loan(len(content)) for content in contents]
    outcomes = await asyncio.gather(
        *(objects.get(1, lent(loan, n, Lending.CALL)) for n, loan in enumerate(loans)),
        objects.get(1, lent(Loan(len(contents[0])), 5, Lending.CALL)),
    )
    causes = [outcome.cause for outcome in outcomes]
    assert causes == [None, Cause.CORRUPT, None, Cause.VANISHED]
    assert bytes(loans[1].content()) == bytes(len(contents[1]))  # a copy that is wrong is not made
    objects.close()


@pytest.mark.asyncio
async def test_a_batch_is_cut_to_the_scratch_there_is() -> None:
    slab = Slab(4096, scratch_nbytes=4 * 4096 * 2)  # four pages a direction
    backend = Recorder()
    objects = objects_of(slab, backend)
    contents = await stored(objects, 9)
    assert backend.batches[0] <= 4
    backend.batches.clear()
    loans = [Loan(len(content)) for content in contents]
    outcomes = await asyncio.gather(
        *(objects.get(1, lent(loan, n, Lending.CALL)) for n, loan in enumerate(loans))
    )
    assert all(outcome.ok for outcome in outcomes)
    assert max(backend.batches) == 2  # a header and a payload each
    large = payload_of(CHUNK * 8)
    item = Item(key(50, CHUNK * 8), large, 0, Loan(large.body_nbytes).pieces(()), Lending.CALL)
    outcome = await objects.get(1, item)
    assert outcome.cause is Cause.NO_ROOM and "scratch" in outcome.detail
    assert (await objects.get(1, lent(Loan(len(contents[0])), 0, Lending.CALL))).ok
    objects.close()
    slab.close()


@pytest.mark.asyncio
async def test_a_backend_that_breaks_ends_every_job_of_the_batch(slab: Slab) -> None:
    class Broken(Recorder):
        async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
            raise SystemExit("not yours to end")

        async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
            return [None]  # of two

    objects = objects_of(slab, Broken())
    contents = [noise(n, payload_of().body_nbytes) for n in range(2)]
    loans = [Loan(len(content), content) for content in contents]
    outcomes: list[Outcome] = []
    for call in (objects.get, objects.put):
        outcomes += await asyncio.gather(
            *(call(1, lent(loan, n, Lending.HELD)) for n, loan in enumerate(loans))
        )
    assert [outcome.cause for outcome in outcomes] == [Cause.TIER_DOWN] * 4
    assert "SystemExit" in outcomes[0].detail
    objects.close()


@pytest.mark.asyncio
async def test_what_fails_while_an_object_is_verified_says_nothing_of_the_object(
    slab: Slab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, say: called damage, it would have a good object quarantined."""
    objects = objects_of(slab, Recorder())
    await stored(objects, 2)

    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(coding, "verify", fails)
    loans = [Loan(payload_of().body_nbytes) for _ in range(2)]
    calls = [objects.get(1, lent(loan, n, Lending.HELD)) for n, loan in enumerate(loans)]
    outcomes = await asyncio.gather(*calls)
    assert [outcome.cause for outcome in outcomes] == [Cause.TIER_DOWN] * 2
    objects.close()
