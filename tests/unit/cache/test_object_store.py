"""Lower tiers alone: opaque objects in memory of their owner's, verified, bounded, given back."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from caches import WEIGHTS
from hang import HANG

from kvlayer import CacheConfig, Cause, TierConfig
from kvlayer.abc.backend import Read, ReadResult, SizeResult, Write, WriteResult
from kvlayer.api.object_store import ObjectStore
from kvlayer.bench.sick import Sickness, SickTier
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import ArgumentError, BackendError, IdentityError, LayoutError
from kvlayer.events import Event, ObjectQuarantined, ObjectsEvicted
from kvlayer.identity.keys import ObjectKey
from kvlayer.identity.namespace import Namespace
from kvlayer.identity.weights import process_weights
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.testing.faults import given
from kvlayer.testing.memory import MemoryBackend

NBYTES = 10_000  # no multiple of anything


def namespace(what: str = "rows", weights: str = WEIGHTS, nbytes: int = NBYTES) -> Namespace:
    group = KVGroup(AttentionKind.STATE, (0,), "int8", state_nbytes=nbytes, quantisation=what)
    return Namespace(
        weights=weights, groups=(group,), compute_dtype="bfloat16", tokens_per_chunk=16
    )


def name(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def content(number: int) -> bytes:
    return random.Random(number).randbytes(NBYTES)


def regions(memory: bytearray) -> list[memoryview]:
    """The whole of it, cut at places that suit nobody."""
    whole = memoryview(memory)
    return [whole[:1], whole[1:4097], whole[4097:]]


@asynccontextmanager
async def opened(
    *tiers: TierConfig, named: Namespace | None = None, seconds: float = 30.0, **how: Any
) -> AsyncGenerator[ObjectStore]:
    config = CacheConfig(tiers=tiers, close_seconds=seconds)
    async with ObjectStore.open(config, named or namespace(), **how) as store:
        yield store


def disk(folder: Path) -> TierConfig:
    return TierConfig(url=f"file://{folder}", deadline_seconds=HANG)


MEMORY = TierConfig(url="cpu://?capacity=1MiB", deadline_seconds=HANG)


async def keep(store: ObjectStore, *numbers: int) -> None:
    for number in numbers:
        outcomes = await store.store(name(number), regions(bytearray(content(number))))
        assert all(outcome.ok for outcome in outcomes), outcomes


async def fetched(store: ObjectStore, number: int) -> bytes | Cause:
    memory = bytearray(NBYTES)
    outcome = await store.load(name(number), regions(memory))
    assert outcome.key == store.key(name(number))
    return bytes(memory) if outcome.cause is None else outcome.cause


@pytest.mark.asyncio
async def test_what_is_stored_comes_back_to_the_byte_and_after_a_restart(tmp_path: Path) -> None:
    async with opened(disk(tmp_path)) as store:
        assert store.nbytes == NBYTES
        await keep(store, 1, 2)
        assert await store.contains([name(1), name(3), name(2)]) == [True, False, True]
        assert await fetched(store, 1) == content(1)
    async with opened(disk(tmp_path)) as store:
        assert await store.contains([name(n) for n in range(600)]) == [
            n in (1, 2) for n in range(600)
        ]
        assert await fetched(store, 2) == content(2)
        assert await fetched(store, 3) is Cause.NEVER_STORED
        (health,) = store.health()
        assert health.ok
        (stats,) = store.stats()
        assert (stats.hits, stats.loaded_nbytes > 0, stats.capacity_nbytes) == (1, True, None)


@pytest.mark.asyncio
async def test_the_nearest_tier_serves_and_all_of_them_store(tmp_path: Path) -> None:
    async with opened(MEMORY, disk(tmp_path)) as store:
        await keep(store, 1)
        assert await fetched(store, 1) == content(1)
        near, far = store.stats()
        assert (near.hits, far.hits, near.stored, far.stored) == (1, 0, 1, 1)
    async with opened(MEMORY, disk(tmp_path)) as store:  # memory is empty
        assert await store.contains([name(1)]) == [True]
        assert await fetched(store, 1) == content(1)
        near, far = store.stats()
        assert (near.hits, far.hits) == (0, 1)
    reads_only = TierConfig(url=f"file://{tmp_path}", write="never")
    async with opened(reads_only) as store:
        assert await store.store(name(2), regions(bytearray(content(2)))) == []
        assert await store.contains([name(2)]) == [False]


@pytest.mark.asyncio
async def test_other_bytes_are_other_names(tmp_path: Path) -> None:
    async with opened(disk(tmp_path)) as store:
        await keep(store, 1)
    others = [namespace("columns"), namespace(weights="sha256:" + "cd" * 32)]
    others.append(namespace(nbytes=NBYTES + 1))
    for other in others:
        async with opened(disk(tmp_path), named=other) as store:
            assert await store.contains([name(1)]) == [False]


def _flipped(at: Callable[[int], int]) -> Callable[[Path, Path], None]:
    def damage(path: Path, _: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[at(len(raw))] ^= 1
        path.write_bytes(raw)

    return damage


def _folder(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a byte of the payload": _flipped(lambda size: size // 2),
    "a byte of the header": _flipped(lambda _: 40),
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path, _: path.write_bytes(b""),
    "another object's": lambda path, other: path.write_bytes(other.read_bytes()),
    "nobody's": lambda path, _: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": _folder,
    "gone": lambda path, _: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.asyncio
async def test_what_is_damaged_is_a_miss_is_taken_away_and_can_be_stored_again(
    damage: str, tmp_path: Path
) -> None:
    told: list[Event] = []
    async with opened(disk(tmp_path)) as store:
        await keep(store, 1, 2)

    def file(number: int) -> Path:
        (found,) = tmp_path.rglob(f"{name(number).hex()}-*.raw")
        return found

    DAMAGES[damage](file(1), file(2))
    async with opened(disk(tmp_path), sinks=[told.append]) as store:
        cause = await fetched(store, 1)
        assert isinstance(cause, Cause)
        assert await store.contains([name(1), name(2)]) == [False, True]
        quarantined = [each for each in told if isinstance(each, ObjectQuarantined)]
        assert len(quarantined) == cause.is_damage
        await keep(store, 1)
        assert await fetched(store, 1) == content(1)
        assert await fetched(store, 2) == content(2)


@pytest.mark.asyncio
async def test_a_damaged_object_is_served_by_the_next_tier(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    async with opened(disk(near), disk(far)) as store:
        await keep(store, 1)
        (path,) = near.rglob("*.raw")
        DAMAGES["a byte of the payload"](path, path)
        assert await fetched(store, 1) == content(1)
        first, second = store.stats()
        assert (first.misses, second.hits) == ({Cause.CORRUPT: 1}, 1)
        assert not [*near.rglob(f"{name(1).hex()}-*.raw")]


class Lender(MemoryBackend):
    """Keeps what it is lent for as long as it likes."""

    def __init__(self) -> None:
        super().__init__(capabilities=())
        self.go_on = asyncio.Event()
        self.arrived = asyncio.Event()
        self.seen: list[memoryview] = []

    async def _stubborn(self, views: Sequence[memoryview]) -> None:
        self.seen += views
        self.arrived.set()
        while not self.go_on.is_set():
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                continue

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        await self._stubborn([view for read in reads for view in read.regions])
        return await super().get(reads)

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        await self._stubborn([view for write in writes for view in write.regions])
        return await super().put(writes)


@pytest.mark.parametrize("verb", ["load", "store"])
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.asyncio
async def test_memory_is_lent_as_it_is_and_is_the_callers_again_when_the_call_is_over(
    verb: str, is_late: bool
) -> None:
    lender = Lender()
    registry = BACKENDS.extended({"lent": given(lender, "lent")})
    tier = TierConfig(url="lent://", deadline_seconds=HANG)
    async with opened(tier, backends=registry) as store:
        store.tiers[0].guard.deadline = 0.05 if is_late else HANG
        memory = array("B", content(1))
        lent = memoryview(memory)
        call: Any = store.load if verb == "load" else store.store
        task = asyncio.ensure_future(call(name(1), [lent]))
        await lender.arrived.wait()
        if not is_late:
            task.cancel()
        done, _ = await asyncio.wait({task}, timeout=0.2)
        assert not done  # a deadline frees nobody while the memory is in use
        address = memory.buffer_info()[0]
        places = [_address(view) for view in lender.seen]
        assert any(address <= place < address + NBYTES for place in places)
        lender.go_on.set()
        await asyncio.wait({task}, timeout=HANG)
        assert task.done()
        if is_late:
            found = task.result()
            outcome = found if verb == "load" else found[0]
            assert outcome.cause is Cause.DEADLINE and not store.health()[0].ok
        else:
            assert task.cancelled()
        lent.release()
        memory.append(0)  # nobody has a view of it any more


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(int(HANG / 0.01)):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to be")


def _address(view: memoryview) -> int:
    import ctypes

    if view.readonly:
        import numpy as np

        return int(np.frombuffer(view, np.uint8).ctypes.data)
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.mark.parametrize("sickness", [Sickness.DEAD, Sickness.SLOW])
@pytest.mark.asyncio
async def test_a_sick_tier_costs_its_deadline_once_and_is_used_again_when_it_is_well(
    sickness: Sickness,
) -> None:
    ill = SickTier.fresh()
    registry = BACKENDS.extended({"sick": ill})
    tier = TierConfig(url="sick://", deadline_seconds=HANG, pause_seconds=0.05)
    async with opened(tier, backends=registry) as store:
        await keep(store, 1)
        store.tiers[0].guard.deadline, ill.sickness = ill.deadline, sickness
        for _ in range(20):
            assert await store.contains([name(1)]) == [False]
        assert not store.health()[0].ok
        (stats,) = store.stats()
        assert stats.misses[Cause.DEADLINE] == 1 and stats.misses[Cause.TIER_DOWN] == 19
        assert await fetched(store, 1) is Cause.TIER_DOWN
        assert store.stats()[0].misses[Cause.TIER_DOWN] == 20
        store.tiers[0].guard.deadline, ill.sickness = HANG, Sickness.HEALTHY
        await until(lambda: store.health()[0].ok)
        assert await fetched(store, 1) == content(1)


@pytest.mark.asyncio
async def test_a_backend_that_raises_is_a_failing_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    ill = SickTier.fresh()
    registry = BACKENDS.extended({"sick": ill})

    async def raises(*_: Any) -> Any:
        raise RuntimeError("no")

    async with opened(TierConfig(url="sick://"), backends=registry) as store:
        await keep(store, 1)
        for verb in ("contains", "get", "put"):
            monkeypatch.setattr(ill, verb, raises)
        assert await store.contains([name(1)]) == [False]
        assert await fetched(store, 1) is Cause.TIER_DOWN
        (outcome,) = await store.store(name(2), regions(bytearray(content(2))))
        assert outcome.cause is Cause.TIER_DOWN
        assert store.stats()[0].misses == {Cause.TIER_DOWN: 3}
        monkeypatch.undo()


@pytest.mark.parametrize("wrong", [(1,), (1, 2)])
@pytest.mark.asyncio
async def test_an_error_about_an_object_is_the_tiers_trouble_and_no_absence(
    wrong: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ill = SickTier.fresh()
    contains, refused = ill.contains, [name(number).hex() for number in wrong]

    async def answers(backend: Any, keys: Sequence[ObjectKey]) -> list[SizeResult]:
        sizes = await contains(backend, keys)
        return [
            BackendError("no") if any(each in key for each in refused) else size
            for key, size in zip(keys, sizes, strict=True)
        ]

    monkeypatch.setattr(ill, "contains", answers)
    tier = TierConfig(url="sick://", deadline_seconds=HANG)
    async with opened(tier, backends=BACKENDS.extended({"sick": ill})) as store:
        await keep(store, 1, 2)
        found = await store.contains([name(1), name(2)])
        assert found == [False, 2 not in wrong]
        (stats,), (health,) = store.stats(), store.health()
        assert stats.misses == {Cause.TIER_DOWN: 1} and "no" in health.detail
        assert await fetched(store, 2) == content(2)
        for _ in range(10):
            await store.contains([name(1), name(2)])
        assert store.tiers[0].guard.serves is (2 not in wrong)  # nothing but errors: asked no more


def _flipped(raw: bytes) -> bytes:
    """With another byte in the middle of the payload."""
    at = len(raw) // 2
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.asyncio
async def test_a_damaged_object_that_cannot_be_taken_away_is_a_miss_and_the_tiers_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ill = SickTier.fresh()

    async def raises(*_: Any) -> Any:
        raise RuntimeError("it stays")

    monkeypatch.setattr(ill, "delete", raises)
    tier = TierConfig(url="sick://", deadline_seconds=HANG)
    async with opened(tier, backends=BACKENDS.extended({"sick": ill})) as store:
        await keep(store, 1)
        ill.objects.update({key: _flipped(raw) for key, raw in ill.objects.items()})
        for _ in range(2):
            assert await fetched(store, 1) is Cause.CORRUPT
        assert store.stats()[0].misses == {Cause.CORRUPT: 2, Cause.TIER_DOWN: 2}
        assert "it stays" in store.health()[0].detail
        store.tiers[0].guard.deadline = ill.deadline
        monkeypatch.setattr(ill, "delete", lambda *_: asyncio.Event().wait())
        assert await fetched(store, 1) is Cause.CORRUPT
        assert store.stats()[0].misses[Cause.DEADLINE] == 1


@pytest.mark.parametrize("verb", ["load", "store"])
@pytest.mark.asyncio
async def test_a_cancelled_call_is_over_as_soon_as_the_tier_lets_go(verb: str) -> None:
    ill = SickTier.fresh()
    tier = TierConfig(url="sick://", deadline_seconds=HANG)
    async with opened(tier, backends=BACKENDS.extended({"sick": ill})) as store:
        await keep(store, 1)
        ill.sickness = Sickness.DEAD  # it ends when it is told to, and not before
        call: Any = store.load if verb == "load" else store.store
        task = asyncio.ensure_future(call(name(1), [memoryview(bytearray(NBYTES))]))
        await until(lambda: store.tiers[0].guard.running == 1)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=HANG / 2)
        assert done and task.cancelled() and store.health()[0].ok


@pytest.mark.parametrize("is_stuck", [False, True])
@pytest.mark.asyncio
async def test_leaving_waits_for_what_is_lent_closes_the_tiers_and_names_what_will_not_let_go(
    is_stuck: bool,
) -> None:
    closed: list[bool] = []

    class Closing(Lender):
        async def aclose(self) -> None:
            closed.append(self.go_on.is_set())

    lender = Closing()
    tier = TierConfig(url="lent://", deadline_seconds=HANG)
    registry = BACKENDS.extended({"lent": given(lender, "lent")})
    async with opened(tier, backends=registry, seconds=0.2 if is_stuck else HANG) as store:
        task = asyncio.ensure_future(store.store(name(1), [memoryview(bytearray(content(1)))]))
        await lender.arrived.wait()
        if not is_stuck:
            asyncio.get_running_loop().call_later(0.05, lender.go_on.set)
    (health,) = store.health()
    lender.go_on.set()
    await asyncio.wait({task}, timeout=HANG)
    assert task.done()
    assert closed == [not is_stuck]
    assert health.ok is not is_stuck
    assert not is_stuck or "1 calls did not end within 0.2 s" in health.detail


@pytest.mark.asyncio
async def test_a_tier_is_told_what_the_names_stand_for(tmp_path: Path) -> None:
    async with opened(disk(tmp_path)) as store:
        backend = store.tiers[0].backend
        await until(lambda: not store.tiers[0].guard.inflight)
        found = await backend.namespaces()
        assert found == {store.namespace.digest: store.namespace.canonical()}


@pytest.mark.asyncio
async def test_what_cannot_be_kept_there_is_refused(tmp_path: Path) -> None:
    private = namespace(weights=process_weights())
    with pytest.raises(IdentityError, match="outlives or is shared"):
        async with opened(disk(tmp_path), named=private):
            pass
    async with opened(MEMORY, named=private) as store:
        await keep(store, 1)
        with pytest.raises(ValueError, match="9999 bytes, expected 10000"):
            await store.load(name(1), [memoryview(bytearray(NBYTES - 1))])
    rows = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 1, 8)
    plain = Namespace(
        weights=WEIGHTS, groups=(rows,), compute_dtype="bfloat16", tokens_per_chunk=16
    )
    with pytest.raises(LayoutError, match="one state group of one layer"):
        async with opened(MEMORY, named=plain):
            pass
    wrong: Any = "tiers"
    with pytest.raises(ArgumentError, match="config must be a CacheConfig, found a str"):
        async with ObjectStore.open(wrong, plain):
            pass
    with pytest.raises(ArgumentError, match="namespace must be a Namespace, found a str"):
        async with opened(MEMORY, named=wrong):
            pass


@pytest.mark.asyncio
async def test_touched_objects_are_evicted_last_and_evictions_are_told(tmp_path: Path) -> None:
    small, told = TierConfig(url="cpu://?capacity=64KiB", deadline_seconds=HANG), list[Event]()
    async with opened(small, sinks=[told.append]) as store:
        await keep(store, 1, 2, 3, 4)
        store.touch([name(1)])
        await until(lambda: not store.tiers[0].guard.inflight)
        await keep(store, 5)
        there = await store.contains([name(n) for n in range(1, 6)])
        assert there[0] and there[4] and not all(there)
        gone = {key for each in told if isinstance(each, ObjectsEvicted) for key in each.keys}
        assert gone == {store.key(name(n)) for n, is_there in enumerate(there, 1) if not is_there}
        assert store.stats()[0].evicted == len(gone)
