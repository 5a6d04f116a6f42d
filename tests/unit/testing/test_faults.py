"""Fault backends: each spoils what it says, writes it down, and leaves the rest of the contract."""

from __future__ import annotations

import asyncio
import mmap
import random
from array import array
from typing import Any

import pytest
from caches import WEIGHTS, layout
from engine import Engine

from kvlayer import Cache, CacheConfig, ModelConfig, TierConfig
from kvlayer.abc.backend import Backend, Capability, Damaged, Hit, Miss, Read, Write
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import BackendError, BackendUnavailableError, UnsupportedError
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, ObjectName, Part
from kvlayer.testing.faults import (
    Dying,
    Flaky,
    Injected,
    Late,
    Slow,
    Trespassing,
    Wrapper,
    given,
    tally,
)
from kvlayer.testing.lying import Lie, Lying
from kvlayer.testing.memory import MemoryBackend
from kvlayer.testing.sim import in_virtual_time, run
from kvlayer.urls import BackendURL

PART = Part(0, (0, 1), (0, 1), "canonical")
KEYS = [
    ObjectName.raw(ObjectKey.of("ab" * 32, PUBLIC_ZONE, bytes([i]) * 32, 16, PART))
    for i in range(8)
]
PAGE = 4096


def content(number: int) -> bytes:
    return bytes([number + 1]) * PAGE


async def fill(backend: Backend) -> None:
    for number, key in enumerate(KEYS):
        assert await backend.put([Write(key, (memoryview(content(number)),))]) == [None]


def page() -> memoryview:
    return memoryview(mmap.mmap(-1, PAGE))


async def now() -> float:
    return asyncio.get_running_loop().time()


@in_virtual_time
async def test_a_wrapper_passes_everything_on() -> None:
    inner = MemoryBackend()
    wrapped = Wrapper(inner, random.Random(0))
    async with wrapped:
        await fill(wrapped)
        assert await wrapped.contains([KEYS[3]]) == [PAGE]
        region = page()
        assert await wrapped.get([Read(KEYS[3], (region,))]) == [Hit(PAGE)]
        assert region == content(3)
        assert len([each async for each in wrapped.list()]) == len(KEYS)
        await wrapped.delete(KEYS[:1])
        await wrapped.quarantine([Damaged(KEYS[1])])
        await wrapped.touch(KEYS)
        await wrapped.describe("ab" * 32, b"")
        assert await wrapped.namespaces() == {}
        assert len(inner.objects) == 6
    assert wrapped.capabilities == inner.capabilities
    assert wrapped.log == []

    def told(gone: list[tuple[ObjectKey, int]], policy: str) -> None: ...

    wrapped.on_evicted = told
    assert inner.on_evicted is told is wrapped.on_evicted
    with pytest.raises(UnsupportedError, match="has no URL"):
        Slow.from_url(BackendURL.parse("x://"))


@in_virtual_time
async def test_a_slow_one_takes_its_time_and_is_right() -> None:
    slow = Slow(MemoryBackend(), random.Random(1), seconds=(1.0, 2.0))
    await fill(slow)
    assert len(KEYS) <= await now() <= 2 * len(KEYS)
    assert tally(slow.log) == {"delayed in put": len(KEYS)}
    slow.is_ill = False
    before = await now()
    assert await slow.contains(KEYS[:1]) == [PAGE]
    assert await now() == before


@in_virtual_time
async def test_a_flaky_one_fails_in_calls_and_in_items() -> None:
    inner = MemoryBackend()
    flaky = Flaky(inner, random.Random(2), share=0.3)
    errors: list[BackendError] = []
    kept = 0
    for _ in range(100):
        inner.objects.clear()
        try:
            (error,) = await flaky.put([Write(KEYS[0], (memoryview(content(0)),))])
        except BackendError as exc:
            error = exc
            assert not inner.objects
        if error is None:
            assert inner.objects
        else:
            errors.append(error)
            kept += bool(inner.objects)
    assert {type(error) for error in errors} == {BackendError, BackendUnavailableError}
    assert 0 < kept < len(errors)  # some that failed were stored all the same
    assert {i.fault for i in flaky.log} == {
        "raised BackendError",
        "answered BackendError",
        "raised BackendUnavailableError",
        "answered BackendUnavailableError",
    }


@pytest.mark.parametrize("lie", Lie)
@in_virtual_time
async def test_every_lie_is_told(lie: Lie) -> None:
    inner = MemoryBackend()
    lying = Lying(inner, random.Random(3), share=1.0, lies=[lie])
    lying.is_ill = lie is Lie.DROPPED
    await fill(lying)
    lying.is_ill = True
    region = page()
    (result,) = await lying.get([Read(KEYS[2], (region,))])
    claims = await lying.contains([KEYS[2]])
    match lie:
        case Lie.FLIPPED:
            wrong = [a ^ b for a, b in zip(region, content(2), strict=True) if a != b]
            assert result == Hit(PAGE) and len(wrong) == 1 and wrong[0].bit_count() == 1
        case Lie.SHORTENED:
            assert isinstance(result, Hit) and result.nbytes < PAGE
        case Lie.LENGTHENED:
            assert result == Hit(2 * PAGE)
        case Lie.EMPTY:
            assert result == Hit(PAGE) and region == bytes(PAGE)
        case Lie.SWAPPED:
            assert result == Hit(PAGE)
            assert region[0] in range(1, 9) and region == bytes([region[0]]) * PAGE
        case Lie.DENIED:
            assert result == Miss() and claims == [None]
        case Lie.DROPPED:
            assert inner.objects == {} and result == Miss()
        case Lie.CLAIMED:
            inner.objects.clear()
            assert await lying.contains([KEYS[2]]) != [None]
    assert {i.fault for i in lying.log} == {lie}


@in_virtual_time
async def test_a_late_one_returns_only_when_its_bytes_have_landed() -> None:
    late = Late(MemoryBackend(), random.Random(4), share=1.0, seconds=(5.0, 6.0))
    late.is_ill = False
    await fill(late)
    late.is_ill = True
    region = page()
    task = asyncio.ensure_future(late.get([Read(KEYS[1], (region,))]))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() and await now() >= 5.0
    assert region == content(1)
    region[:] = bytes(PAGE)
    await asyncio.sleep(10)
    assert region == bytes(PAGE)


@in_virtual_time
async def test_a_trespassing_one_writes_to_memory_it_has_given_back() -> None:
    async with Trespassing(
        MemoryBackend(), random.Random(4), share=1.0, seconds=(5.0, 6.0)
    ) as thief:
        thief.is_ill = False
        await fill(thief)
        thief.is_ill = True
        region = page()
        task = asyncio.ensure_future(thief.get([Read(KEYS[1], (region,))]))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() and await now() == 1.0
        await asyncio.sleep(10)
        assert region == content(1)


@in_virtual_time
async def test_a_dying_one_answers_nothing_and_comes_back() -> None:
    dying = Dying(MemoryBackend(), random.Random(5), lives=(1.0, 2.0), dies=(3.0, 4.0), answers=1.0)
    await fill(dying)
    assert not dying.is_dead
    await asyncio.sleep(2)
    assert dying.is_dead
    assert await dying.contains(KEYS[:1]) == [PAGE]  # it was asked while it was dead
    assert 4.0 <= await now() <= 6.0
    assert not dying.is_dead and dying.log[0].fault == "died before"
    await asyncio.sleep(100)
    assert not dying.is_dead  # once was enough


@in_virtual_time
async def test_an_answer_that_is_lost_never_comes() -> None:
    dying = Dying(MemoryBackend(), random.Random(5), lives=(0.0, 0.0), dies=(1.0, 1.0), answers=0.0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1000):
            await dying.contains(KEYS[:1])
    assert await dying.contains(KEYS[:1]) == [None]


def test_equal_seeds_inject_equal_faults() -> None:
    async def main(seed: int) -> list[Injected]:
        log: list[Injected] = []
        chance = random.Random(seed)
        tier = Flaky(Slow(Lying(MemoryBackend(), chance, log), chance, log), chance, log)
        for key in KEYS * 5:
            try:
                await tier.put([Write(key, (memoryview(content(0)),))])
                await tier.get([Read(key, (page(),))])
            except BackendError:
                continue
        return log

    logs = [run(main(seed), seed=0) for seed in (1, 1, 2)]
    assert logs[0] == logs[1] != logs[2]
    assert len(tally(logs[0])) > 4


@in_virtual_time
async def test_a_given_backend_is_a_tier_of_a_cache() -> None:
    inner = MemoryBackend(capabilities=[Capability.SHARED])
    tier = Slow(inner, random.Random(0), seconds=(0.1, 0.2))
    settings = CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        tiers=(
            TierConfig(url="cpu://?capacity=64KiB"),
            TierConfig(url="sick://", write="through"),
        ),
        tokens_per_chunk=16,
    )
    backends = BACKENDS.extended({"sick": given(tier)})
    engine: Any = Engine(layout(), 8, 1)
    async with Cache.open(settings, layout(), backends=backends) as cache:
        await cache.store(array("i", range(32)), engine.view(engine.slots(32)))
        assert [t.name for t in cache.control.stats().tiers] == ["cpu", "sick"]
    assert len(inner.objects) == 2
