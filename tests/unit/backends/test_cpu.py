"""cpu:// below the first tier: what is its own, and races. tests/conformance has the contract."""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import sha256

import pytest
import pytest_asyncio
from hang import HANG

from kvlayer.abc.backend import Capability, Hit, Read, Write
from kvlayer.errors import BackendError, ClosedError, ConfigError
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.urls import BackendURL
from kvlayer_backends import cpu
from kvlayer_backends.cpu import CpuBackend, CpuOptions

PAGE = 4096
PART = Part(0, (0, 4), (0, 2))


def key(number: int) -> ObjectKey:
    return ObjectName.raw(ObjectKey.of("ab" * 32, "0", sha256(b"%d" % number).digest(), 16, PART))


def buffer(pages: int, fill: bytes = b"\0") -> memoryview:
    view = memoryview(mmap.mmap(-1, pages * PAGE))
    view[:] = fill * (pages * PAGE)
    return view


def write(number: int, pages: int = 1, fill: bytes | None = None) -> Write:
    return Write(key(number), (buffer(pages, fill or b"%d" % (number % 10)),))


class Stop:
    """Holds copies on their thread until they are let go."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.gate = threading.Event()

    def around(self, copy: Callable[..., None]) -> Callable[..., None]:
        def held(*args: object) -> None:
            self.began.set()
            assert self.gate.wait(HANG)
            copy(*args)

        return held

    async def has_begun(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.began.wait, HANG)


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[CpuBackend]:
    async with CpuBackend(CpuOptions(capacity=4 * PAGE)) as opened:
        yield opened


async def read(backend: CpuBackend, number: int, pages: int = 1) -> bytes | None:
    into = buffer(pages, b"?")
    (result,) = await backend.get([Read(key(number), (into,))])
    return bytes(into[: result.nbytes]) if isinstance(result, Hit) else None


@pytest.mark.asyncio
async def test_a_present_key_is_not_written_again(backend: CpuBackend) -> None:
    assert await backend.put([write(1, fill=b"a"), write(1, fill=b"b")]) == [None, None]
    assert await read(backend, 1) == b"a" * PAGE
    assert backend.used_nbytes == PAGE


@pytest.mark.asyncio
async def test_at_capacity_the_policy_chooses_and_the_owner_is_told(backend: CpuBackend) -> None:
    told: list[tuple[list[tuple[ObjectKey, int]], str]] = []
    backend.on_evicted = lambda gone, policy: told.append((gone, policy))
    await backend.put([write(n) for n in range(4)])
    await read(backend, 0)
    assert await backend.put([write(4, pages=2)]) == [None]
    sizes = await backend.contains([key(n) for n in range(5)])
    assert sizes == [PAGE, None, None, PAGE, 2 * PAGE]
    assert told == [([(key(1), PAGE), (key(2), PAGE)], "prefix-lru")]
    assert backend.used_nbytes == backend.capacity_nbytes == 4 * PAGE


@pytest.mark.asyncio
async def test_an_object_larger_than_the_tier_is_refused_and_costs_nothing(
    backend: CpuBackend,
) -> None:
    await backend.put([write(n) for n in range(4)])
    (error,) = await backend.put([write(9, pages=5)])
    assert isinstance(error, BackendError)
    assert error.hint is not None
    assert None not in await backend.contains([key(n) for n in range(4)])


@pytest.mark.asyncio
async def test_an_object_being_read_is_never_evicted(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backend.put([write(n) for n in range(4)])
    stop = Stop()
    monkeypatch.setattr(cpu, "_copy_out", stop.around(cpu._copy_out))
    reading = asyncio.create_task(read(backend, 0))
    await stop.has_begun()
    assert await backend.put([write(n) for n in (5, 6, 7)]) == [None] * 3
    assert await backend.contains([key(0)]) == [PAGE]
    (error,) = await backend.put([write(8, pages=4)])
    assert isinstance(error, BackendError)
    stop.gate.set()
    assert await reading == b"0" * PAGE
    assert await backend.put([write(8, pages=4)]) == [None]


@pytest.mark.asyncio
async def test_deleting_while_it_is_read_hides_it_and_frees_it_after_the_reader(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backend.put([write(1, fill=b"a")])
    stop = Stop()
    copy = cpu._copy_out
    monkeypatch.setattr(cpu, "_copy_out", stop.around(copy))
    reading = asyncio.create_task(read(backend, 1))
    await stop.has_begun()
    monkeypatch.setattr(cpu, "_copy_out", copy)
    await backend.delete([key(1), key(1)])
    assert await backend.contains([key(1)]) == [None]
    assert await read(backend, 1) is None
    assert backend.used_nbytes == PAGE
    # The key comes back with a slot of its own while the old bytes are still being read.
    assert await backend.put([write(1, fill=b"b")]) == [None]
    assert backend.used_nbytes == 2 * PAGE
    stop.gate.set()
    assert await reading == b"a" * PAGE
    assert backend.used_nbytes == PAGE
    assert await read(backend, 1) == b"b" * PAGE
    assert await backend.put([write(9, pages=4)]) == [None]  # nothing stayed pinned


@pytest.mark.asyncio
async def test_a_second_writer_writes_itself_when_the_first_is_cancelled(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    copy = cpu._copy_in
    monkeypatch.setattr(cpu, "_copy_in", stop.around(copy))
    first = asyncio.create_task(backend.put([write(1, fill=b"a")]))
    await stop.has_begun()
    monkeypatch.setattr(cpu, "_copy_in", copy)
    second = asyncio.create_task(backend.put([write(1, fill=b"b")]))
    await asyncio.sleep(0)
    assert await backend.contains([key(1)]) == [None]  # whole or absent
    assert await read(backend, 1) is None
    first.cancel()
    await asyncio.sleep(0)
    assert not first.done()  # its buffer is still being read
    stop.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == [None]
    assert await read(backend, 1) == b"b" * PAGE
    assert backend.used_nbytes == PAGE


@pytest.mark.asyncio
async def test_a_cancelled_read_returns_once_its_buffer_is_untouched(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backend.put([write(1)])
    stop = Stop()
    monkeypatch.setattr(cpu, "_copy_out", stop.around(cpu._copy_out))
    into = buffer(1, b"?")
    reading = asyncio.create_task(backend.get([Read(key(1), (into,))]))
    await stop.has_begun()
    reading.cancel()
    await asyncio.sleep(0)
    assert not reading.done()
    stop.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    into.release()
    assert await backend.put([write(9, pages=4)]) == [None]  # nothing stayed pinned


@pytest.mark.asyncio
async def test_an_object_being_written_is_not_deleted_nor_listed(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop()
    monkeypatch.setattr(cpu, "_copy_in", stop.around(cpu._copy_in))
    writing = asyncio.create_task(backend.put([write(1)]))
    await stop.has_begun()
    await backend.delete([key(1)])
    assert [listed async for listed in backend.list()] == []
    stop.gate.set()
    assert await writing == [None]
    assert await read(backend, 1) == b"1" * PAGE


@pytest.mark.asyncio
async def test_it_lists_what_it_holds_by_prefix(backend: CpuBackend) -> None:
    assert Capability.LIST in backend.capabilities
    assert Capability.PERSISTENT not in backend.capabilities
    await backend.put([write(1), write(2, pages=2)])
    found = {listed.key: listed.nbytes async for listed in backend.list("ab" * 32)}
    assert found == {key(1): PAGE, key(2): 2 * PAGE}
    assert [listed async for listed in backend.list("cd" * 32)] == []
    await backend.delete([key(1), key(3)])
    assert [listed.key async for listed in backend.list()] == [key(2)]


@pytest.mark.asyncio
async def test_touching_keeps_the_last_named_longest(backend: CpuBackend) -> None:
    await backend.put([write(n) for n in range(4)])
    await backend.touch([key(1), key(0), key(9)])
    await backend.put([write(5, pages=3)])
    sizes = await backend.contains([key(n) for n in range(4)])
    assert sizes == [PAGE, None, None, None]


@pytest.mark.asyncio
async def test_closing_waits_for_running_copies_and_every_caller_gets_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = CpuBackend(CpuOptions(capacity=16 * PAGE))
    await backend.open()
    await backend.put([write(1)])
    stop = Stop()
    monkeypatch.setattr(cpu, "_copy_in", stop.around(cpu._copy_in))
    monkeypatch.setattr(cpu, "_copy_out", stop.around(cpu._copy_out))
    calls: list[asyncio.Task[Sequence[object]]] = [
        asyncio.create_task(backend.put([write(n)])) for n in (2, 3, 4)
    ]
    calls.append(asyncio.create_task(backend.get([Read(key(1), (buffer(1),))])))
    await stop.has_begun()
    closing = asyncio.create_task(backend.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    stop.gate.set()
    await closing
    assert all(call.done() for call in calls)  # "once running calls have ended"
    results = await asyncio.gather(*calls)
    assert results == [[None], [None], [None], [Hit(PAGE)]]
    await backend.aclose()


@pytest.mark.asyncio
async def test_a_backend_that_is_not_open_says_so_and_hangs_nobody() -> None:
    backend = CpuBackend(CpuOptions(capacity=4 * PAGE))
    for _ in range(2):
        with pytest.raises(ClosedError):
            await backend.put([write(1)])  # twice: the first must not leave a writer behind
    with pytest.raises(ClosedError):
        _ = backend.slab
    async with backend:
        assert await backend.put([write(1)]) == [None]
    assert await backend.contains([key(1)]) == [None]
    with pytest.raises(ClosedError):
        await backend.put([write(2)])


@pytest.mark.asyncio
async def test_opened_again_it_is_empty_and_has_all_its_room() -> None:
    backend = CpuBackend(CpuOptions(capacity=4 * PAGE))
    async with backend:
        await backend.put([write(n) for n in range(4)])
    async with backend:
        assert backend.used_nbytes == 0
        assert await read(backend, 1) is None
        assert await backend.put([write(9, pages=4)]) == [None]
        assert await backend.put([write(8, pages=4)]) == [None]


def test_a_url_with_a_location_is_refused() -> None:
    assert CpuBackend.from_url(BackendURL.parse("cpu://?capacity=8KiB")).capacity_nbytes == 2 * PAGE
    with pytest.raises(ConfigError, match="no location"):
        CpuBackend.from_url(BackendURL.parse("cpu://host/path"))
    with pytest.raises(ConfigError):
        CpuBackend.from_url(BackendURL.parse("cpu://?capcity=1GiB"))


@pytest.mark.asyncio
async def test_what_is_lent_stays_in_its_place_until_it_comes_back(backend: CpuBackend) -> None:
    await backend.put([write(n) for n in range(2)])
    async with backend.lend([key(0), key(7)]) as (lent, missing):
        assert missing is None and lent is not None
        await backend.delete([key(0)])
        assert await backend.contains([key(0)]) == [None]
        for number in range(2, 9):  # more than there is room for
            await backend.put([write(number)])
        assert bytes(lent.regions[0]) == b"0" * PAGE
        with pytest.raises(TypeError):
            lent.regions[0][0] = 1
        used = backend.used_nbytes
    assert lent.was_held
    assert backend.used_nbytes == used - PAGE
    with pytest.raises(ValueError, match="released"):
        bytes(lent.regions[0])


@pytest.mark.asyncio
async def test_closing_waits_for_what_is_lent(backend: CpuBackend) -> None:
    await backend.put([write(0)])
    async with backend.lend([key(0)]) as (lent,):
        assert lent is not None
        closing = asyncio.ensure_future(backend.aclose())
        await asyncio.sleep(0)
        assert not closing.done()
        assert bytes(lent.regions[0]) == b"0" * PAGE
    await closing
