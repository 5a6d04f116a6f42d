"""Ten thousand operations at once and cancelled anywhere: nothing is lost, wrong or left behind.

A campaign does twenty times as many. ``KVLAYER_SEED`` says which.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
from caches import WEIGHTS, layout, tokens
from descriptors import descriptors
from engine import Engine, same

from kvlayer import Cache, CacheConfig, ModelConfig, Scope, TierConfig
from kvlayer.abc.backend import (
    Backend,
    DeleteResult,
    Hit,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import BackendError, BackendUnavailableError
from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Health
from kvlayer.urls import BackendURL

PAGE = 4096
SEED = int(os.environ.get("KVLAYER_SEED", "1"))
PROMPTS, LENGTH, WORKERS = 12, 96, 6
GROWTH_NBYTES = 16 << 20


class Moody(Backend):
    """Keeps objects in a dictionary; fails, fails for the moment or takes its time by chance."""

    scheme: ClassVar[str] = "moody"
    objects: ClassVar[dict[ObjectKey, bytes]] = {}
    rng: ClassVar[random.Random] = random.Random(0)

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        return cls()

    async def open(self) -> None:
        """Nothing to open."""

    async def aclose(self) -> None:
        """Nothing to close."""

    async def _mood(self) -> BackendError | None:
        for _ in range(self.rng.choice([0, 0, 1, 3, 20])):
            await asyncio.sleep(0)
        chance = self.rng.random()
        if chance < 0.02:
            return BackendError("it broke")
        return BackendUnavailableError("not now") if chance < 0.04 else None

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        if (trouble := await self._mood()) is not None:
            raise trouble
        return [len(self.objects[key]) if key in self.objects else None for key in keys]

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        results: list[ReadResult] = []
        for read in reads:
            trouble, stored = await self._mood(), self.objects.get(read.key)
            if trouble is not None or stored is None:
                results.append(trouble or Miss())
                continue
            at = 0
            for region in read.regions:
                region[:] = stored[at : at + region.nbytes]
                at += region.nbytes
            results.append(Hit(at))
        return results

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        results: list[WriteResult] = []
        for write in writes:
            trouble = await self._mood()
            if trouble is None:
                self.objects[write.key] = b"".join(write.regions)
                while len(self.objects) > 40:  # it forgets, and tells nobody
                    self.objects.pop(self.rng.choice(list(self.objects)))
            results.append(trouble)
        return results

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        for key in keys:
            self.objects.pop(key, None)
        return [None] * len(keys)


class Load:
    """Everybody's operations on one cache, and what every byte should be."""

    def __init__(self, cache: Cache, rng: random.Random) -> None:
        self.cache = cache
        self.rng = rng
        self.engine = Engine(layout(), 256, 1)
        self.prompts = []
        for seed in range(PROMPTS):  # they share beginnings
            shared = tokens(LENGTH, seed // 4)[: rng.randrange(0, LENGTH, 16)]
            self.prompts.append(shared + tokens(LENGTH, 100 + seed)[len(shared) :])
        self.slots: list[Any] = []
        for seed in range(PROMPTS):
            self.slots.append(self._slots(seed))
        self.done = 0
        self.loaded = 0

    def _slots(self, seed: int) -> Any:
        """Equal beginnings lie in equal slots, so that they hold equal KV."""
        slots = self.engine.slots(LENGTH, seed=seed)
        for other in range(seed):
            mine, theirs = self.prompts[seed], self.prompts[other]
            count = next((i for i in range(LENGTH) if mine[i] != theirs[i]), LENGTH)
            slots[:count] = self.slots[other][:count] if count else slots[:count]
        return slots

    async def work(self, count: int) -> None:
        memory = Engine(layout(), 256, 2)
        for _ in range(count):
            await self._cancelled_somewhere(self._pick(memory)())
            self.done += 1

    def _pick(self, memory: Engine) -> Callable[[], Coroutine[Any, Any, Any]]:
        seed, length = self.rng.randrange(PROMPTS), self.rng.randrange(1, LENGTH + 1)
        prompt, slots = self.prompts[seed][:length], self.slots[seed][:length]
        # One tenant's prefix begins where another's ends: the same tokens, other names.
        scope = Scope(owner=str(seed % 3))
        control = self.cache.control

        async def store() -> None:
            await self.cache.store(prompt, self.engine.view(slots), scope=scope)

        async def load() -> None:
            async with self.cache.lookup(prompt, scope=scope) as hit:
                there = slots[: hit.tokens]
                report = await self.cache.retrieve(hit, memory.view(there))
                count = report.tokens
                assert count <= hit.tokens
                assert same(self.engine.read(there[:count]), memory.read(there[:count]))
                self.loaded += count

        async def prefetch() -> None:
            job = self.cache.prefetch(prompt, scope=scope, deadline=0.01)
            if self.rng.random() < 0.5:
                job.cancel()
            await asyncio.wait({asyncio.ensure_future(job)})

        async def pin() -> None:
            held = await control.pin(prompt, scope=scope, seconds=0.01)
            control.unpin(held)

        async def poll() -> None:
            with self.cache.begin_lookup(prompt, scope=scope) as found:
                while found.state == "pending":  # noqa: ASYNC110
                    await asyncio.sleep(0)

        async def evict() -> None:
            with suppress(BackendError):  # a tier that is left alone for now says that all is left
                await control.evict(prompt, tier=self.rng.choice(["cpu", "file", "moody", None]))

        async def report() -> None:
            self.cache.report_prefill(1_000, self.rng.choice([1e-6, 1.0]))

        async def explain() -> None:
            assert str(await control.explain(prompt, scope=scope))

        async def clear() -> None:
            await control.clear("cpu")

        kinds = [store, load, prefetch, pin, poll, evict, report, explain, clear]
        return self.rng.choices(kinds, [40, 30, 5, 4, 6, 5, 2, 2, 0.3])[0]

    async def _cancelled_somewhere(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.ensure_future(work)
        for _ in range(self.rng.choice([1, 3, 8, 20, 60, 10_000, 10_000])):
            if task.done():
                break
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


def resident_nbytes() -> int:
    gc.collect()
    with Path("/proc/self/statm").open() as status:
        return int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def settled(cache: Cache) -> None:
    """Wait until no work is left: jobs, transfers, leases that only a deadline ends."""
    await cache.flush()
    parts = cache.parts
    while cache.control.stats().inflight or parts._jobs:  # noqa: ASYNC110
        await asyncio.sleep(0)
    with cache.stack.planner.lock:
        cache.stack.planner.leases.expire(asyncio.get_running_loop().time() + 1.0)


def check_accounts(cache: Cache) -> None:
    stats, planner = cache.control.stats(), cache.stack.planner
    records = list(planner.directory.objects())
    resident = [record for record in records if record.offset >= 0]
    assert (stats.leases, stats.inflight, stats.tiers[0].pinned_nbytes) == (0, 0, 0)
    assert all((r.pins, r.writing) == (0, 0) for r in records)
    assert stats.tiers[0].used_nbytes == len(resident) * PAGE == stats.tiers[0].objects * PAGE
    assert len({record.offset for record in resident}) == len(resident)
    assert all(record.is_ready for record in records)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.asyncio
async def test_ten_thousand_operations_with_cancellations_leave_nothing(
    tmp_path: Path, dose: Any, figures: Any
) -> None:
    operations = dose(10_000, 200_000)
    rng = random.Random(SEED)
    moody = type("FreshMoody", (Moody,), {"objects": {}, "rng": random.Random(SEED + 1)})
    settings = CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        # Room for 24 objects of a page in host memory, and for about as many on disk.
        tiers=(
            TierConfig(url="cpu://?capacity=96KiB"),
            TierConfig(url=f"file://{tmp_path}?capacity=256KiB", pause_seconds=0.001),
            TierConfig(url="moody://", write="through", pause_seconds=0.001),
        ),
        tokens_per_chunk=16,
        lease_seconds=5.0,
    )
    tasks, threads, files = len(asyncio.all_tasks()), set(threading.enumerate()), descriptors()
    backends = BACKENDS.extended({"moody": moody})
    async with Cache.open(settings, layout(), backends=backends) as cache:
        load = Load(cache, rng)
        truth = [load.engine.read(slots) for slots in load.slots]
        before = 0
        rounds = 10
        for number in range(rounds):
            share = max(operations // rounds // WORKERS, 1)
            await asyncio.gather(*(load.work(share) for _ in range(WORKERS)))
            await settled(cache)
            check_accounts(cache)
            if number == 2:
                before = resident_nbytes()
        assert load.done >= rounds * WORKERS * max(operations // rounds // WORKERS, 1)
        assert load.loaded > operations  # tokens that were loaded, and right
        assert resident_nbytes() - before < GROWTH_NBYTES
        assert all(same(a, load.engine.read(s)) for a, s in zip(truth, load.slots, strict=True))
        assert isinstance(cache.control.health(), Health)
    while len(asyncio.all_tasks()) > tasks:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert set(threading.enumerate()) <= threads
    assert descriptors() == files
    assert list((tmp_path / "v2" / "tmp").glob("*/*")) == []
    figures("operations.cancelled_anywhere", seed=SEED, operations=load.done, loaded=load.loaded)
