"""Random requests of a model whose KV is known, cancelled anywhere, in virtual time.

What an engine lends is scrambled the moment a call returns, and compared ever after: a byte read
or written after that is seen. ``KVLAYER_OPERATIONS`` says how many requests, ``KVLAYER_SEEDS``
(1,2,3) with which seeds. Threads take part, so a seed makes a failure likely again, not certain.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from array import array
from collections import Counter
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from caches import WEIGHTS, layout
from descriptors import descriptors
from engine import Engine, same
from stacks import check_accounts

from kvlayer import Cache, CacheConfig, ModelConfig, Scope, TierConfig
from kvlayer.abc.backend import ReadResult, WriteResult
from kvlayer.api.control import Pin
from kvlayer.bench.sick import SickTier
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import BackendError, BackendUnavailableError
from kvlayer.results import Cause, Stats
from kvlayer.testing.sim import in_virtual_time

OPERATIONS = int(os.environ.get("KVLAYER_OPERATIONS", "2000"))  # tests see no such variable
SEEDS = [int(seed) for seed in os.environ.get("KVLAYER_SEEDS", "1").split(",")]
AT_ONCE = 8
LONGEST = 80  # tokens: five chunks of 16
PAGE = 4096  # what a chunk takes
LEASE_SECONDS = 5.0
RSS_BOUND = 12 << 20  # what an allocator may keep for itself; a leak of a page per store is more


class FlakyTier(SickTier):
    """Fails now and then in every way a backend may fail, and answers when it likes."""

    scheme: ClassVar[str] = "flaky"
    rng: ClassVar[random.Random]

    async def answer(self) -> None:
        for _ in range(self.rng.choice([0, 1, 3, 10])):
            await asyncio.sleep(self.rng.choice([0, 0, 0.002]))
        fate = self.rng.random()
        if fate < 0.02:
            raise BackendError("the shelf fell")
        if fate < 0.04:
            raise BackendUnavailableError("for a moment")
        if fate < 0.045:
            raise ZeroDivisionError("a bug of theirs")
        if fate < 0.047:
            await asyncio.Event().wait()  # until somebody cancels it

    async def get(self, reads: Any, /) -> list[ReadResult]:
        results = await super().get(reads)
        for at, read in enumerate(reads):
            fate = self.rng.random()
            if fate < 0.02:
                results[at] = BackendError("unreadable")
            elif fate < 0.3:
                for region in read.regions:
                    region[-1500:-1000] = b"\xa5" * 500  # damaged: the cache has to notice
        return results

    async def put(self, writes: Any, /) -> list[WriteResult]:
        if self.rng.random() < 0.1:
            await self.answer()
            return [BackendError("full")] * len(writes)
        while len(self.objects) > 60:  # shared: somebody else makes room for themselves
            del self.objects[self.rng.choice(list(self.objects))]
        return await super().put(writes)


class Model:
    """Prompts with common beginnings, some of them private, and the KV that their tokens have.

    The KV of a token depends on all before it and on the salts that began before it. Prompts that
    agree in both share slots, as in an engine that shares prefixes.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        system = [rng.randrange(50_000) for _ in range(40)]
        scopes = [
            Scope(owner="public"),
            Scope.private("a", owner="a"),
            Scope.private("b", first_token=20, owner="b"),
        ]
        self.prompts: list[tuple[array[int], Scope, torch.Tensor]] = []
        slots: dict[object, int] = {}
        for _ in range(12):
            shared = rng.choice([0, 8, 16, 32, 40])
            own = [rng.randrange(50_000) for _ in range(LONGEST - shared)]
            tokens = array("i", system[:shared] + own)
            for scope in scopes:
                places: list[int] = []
                for at in range(LONGEST):
                    salts = tuple(s.value for s in scope.salts if s.first_token <= at)
                    name = (bytes(tokens[: at + 1]), salts)
                    places.append(slots.setdefault(name, len(slots)))
                self.prompts.append((tokens, scope, torch.tensor(places)))
        self.engine = Engine(layout(), -(-len(slots) // 4), seed)


@dataclass
class Tally:
    """What happened."""

    done: Counter[str] = field(default_factory=Counter[str])
    cut: Counter[str] = field(default_factory=Counter[str])
    loaded_tokens: int = 0


class Worker:
    """One engine request after the other, each with memory of its own."""

    def __init__(self, number: int, cache: Cache, model: Model, tally: Tally, seed: int) -> None:
        self.cache, self.model, self.tally = cache, model, tally
        self.rng = random.Random(seed * 1000 + number)
        self.memory = Engine(layout(), LONGEST // 4, seed * 1000 + number)
        self.slots = torch.arange(LONGEST)
        self.left: list[torch.Tensor] | None = None
        """What the memory held when it was given back."""
        self.pins: list[Pin] = []
        self.jobs: list[Any] = []

    async def work(self, left: list[int]) -> None:
        kinds = {
            self.store: 35,
            self.load: 35,
            self.look: 6,
            self.prefetch: 8,
            self.pin: 4,
            self.unpin: 4,
            self.evict: 5,
            self.explain: 2,
            self.report_prefill: 2,
            self.flush: 1,
            self.clear: 0.2,
        }
        while left:
            left.pop()
            kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
            await self.run(kind.__name__, kind())
            self.check_that_it_is_ours()
            await asyncio.sleep(self.rng.choice([0, 0, 0.01, 0.1]))  # pauses and leases pass

    async def run(self, name: str, operation: Coroutine[Any, Any, None]) -> None:
        """Carry out an operation; in four of ten cases cancel it after some turns of the loop."""
        task = asyncio.ensure_future(operation)
        if self.rng.random() < 0.4:
            for _ in range(self.rng.choice([0, 1, 2, 3, 5, 8, 13, 30, 60])):
                if task.done():
                    break
                await asyncio.sleep(0)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            self.tally.cut[name] += 1
            self.left = [plane.clone() for plane in self.memory.read(self.slots)]
        else:
            self.tally.done[name] += 1

    def check_that_it_is_ours(self) -> None:
        """Nobody writes to memory that has been given back."""
        if self.left is not None:
            assert same(self.left, self.memory.read(self.slots))

    def prompt(self) -> tuple[array[int], Scope, torch.Tensor]:
        tokens, scope, slots = self.rng.choice(self.model.prompts)
        length = self.rng.choice([LONGEST, self.rng.randrange(1, LONGEST + 1)])
        return tokens[:length], scope, slots[:length]

    # -- operations ------------------------------------------------------------------------------

    async def store(self) -> None:
        tokens, scope, slots = self.prompt()
        first = self.rng.choice([0, 0, 0, 16, 20])
        mine = self.slots[: max(len(tokens) - first, 0)]
        self.fill(mine, slots[first:])
        try:
            await self.cache.store(
                tokens, self.memory.view(mine), scope=scope, first_token=min(first, len(tokens))
            )
        finally:
            self.scramble()  # whoever still reads it stores wrong bytes

    async def load(self) -> None:
        tokens, scope, slots = self.prompt()
        deadline = self.rng.choice([None, None, 0.0, 0.01])
        self.left = None
        async with self.cache.lookup(tokens, scope=scope) as hit:
            assert hit.tokens <= len(tokens)
            mine = self.slots[: len(tokens)]
            report = await self.cache.retrieve(hit, self.memory.view(mine), deadline=deadline)
        assert report.tokens <= hit.tokens
        assert report.tokens == hit.tokens or report.failed
        read = self.memory.read(mine[: report.tokens])
        assert same(read, self.model.engine.read(slots[: report.tokens]))
        self.tally.loaded_tokens += report.tokens

    async def look(self) -> None:
        tokens, scope, _ = self.prompt()
        async with self.cache.lookup(tokens, scope=scope):
            for _ in range(self.rng.randrange(10)):
                await asyncio.sleep(0)

    async def prefetch(self) -> None:
        tokens, scope, _ = self.prompt()
        job = self.cache.prefetch(tokens, scope=scope, deadline=self.rng.choice([0.01, 0.5]))
        self.jobs.append(job)
        choice = self.rng.random()
        if choice < 0.4:
            await job
        elif choice < 0.6:
            job.cancel()

    async def pin(self) -> None:
        tokens, scope, _ = self.prompt()
        pin = await self.cache.control.pin(tokens, scope=scope, seconds=self.rng.choice([0.1, 0.5]))
        self.pins.append(pin)

    async def unpin(self) -> None:
        if self.pins:
            self.cache.control.unpin(self.pins.pop(self.rng.randrange(len(self.pins))))

    async def evict(self) -> None:
        tokens, scope, _ = self.prompt()
        tier = self.rng.choice(["cpu", "cpu", "cpu", "file", "flaky", None])
        with suppress(BackendError):  # a tier that fails says that something is left
            await self.cache.control.evict(tokens, scope=scope, tier=tier)

    async def explain(self) -> None:
        tokens, scope, _ = self.prompt()
        explained = await self.cache.control.explain(tokens, scope=scope)
        assert str(explained)
        self.cache.control.stats()
        self.cache.control.health()

    async def report_prefill(self) -> None:
        self.cache.report_prefill(self.rng.choice([100, 10_000]), 0.1)

    async def flush(self) -> None:
        await self.cache.flush()

    async def clear(self) -> None:
        with suppress(BackendError):  # as above
            await self.cache.control.clear(self.rng.choice(["cpu", "file", "flaky", None]))

    # -- memory ----------------------------------------------------------------------------------

    def fill(self, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        """Give this engine's slots the KV of the model's."""
        self.left = None
        for own, other in zip(self.memory.caches[0], self.model.engine.caches[0], strict=True):
            for target, source in zip(_planes(own), _planes(other), strict=True):
                kv = source.view(-1, *source.shape[2:])[theirs[: len(mine)]]
                target.view(-1, *target.shape[2:])[mine] = kv

    def scramble(self) -> None:
        for layer in self.memory.caches[0]:
            for plane in _planes(layer):
                plane.view(torch.int16).add_(1)


def _planes(layer: Any) -> list[torch.Tensor]:
    """Views of a layer's K and V as ``[block, token, head, dim]``."""
    tensors = layer if isinstance(layer, tuple) else (layer,)
    return [part for t in tensors for part in (t if t.ndim == 5 else (t,))]


def _settings(directory: Path) -> CacheConfig:
    return CacheConfig(
        model=ModelConfig(weights=WEIGHTS),
        tiers=(
            TierConfig(url=f"cpu://?capacity={40 * PAGE}"),
            TierConfig(
                url="flaky://", write="back", deadline_seconds=1.0, pause_seconds=0.01, retries=1
            ),
            TierConfig(
                url=f"file://{directory}?direct=auto&capacity={120 * 2 * PAGE}",
                write="through",
                deadline_seconds=600.0,
            ),
        ),
        tokens_per_chunk=16,
        tokens_per_tail=4,
        lease_seconds=LEASE_SECONDS,
    )


def _rss() -> int:
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _idle(cache: Cache, workers: list[Worker]) -> Stats:
    """End what still runs, let every lease run out; what is held then is held for ever."""
    for worker in workers:
        for job in worker.jobs:
            job.cancel()
    await cache.flush()
    await asyncio.sleep(2 * LEASE_SECONDS)
    async with cache.lookup(array("i", [1])):
        pass  # leases that have run out are dropped at the next call
    return cache.control.stats()


@pytest.mark.parametrize("seed", SEEDS)
@in_virtual_time
async def test_random_requests_leave_nothing_behind(tmp_path: Path, seed: int) -> None:
    model, tally = Model(seed), Tally()
    flaky = FlakyTier.fresh()
    flaky.rng = random.Random(seed)
    backends = BACKENDS.extended({"flaky": flaky})
    held, threads = descriptors(), set(threading.enumerate())
    async with Cache.open(_settings(tmp_path), layout(), backends=backends) as cache:
        workers = [Worker(i, cache, model, tally, seed) for i in range(AT_ONCE)]

        async def work(operations: int) -> None:
            left = [0] * operations
            async with asyncio.TaskGroup() as group:
                for worker in workers:
                    group.create_task(worker.work(left))

        await work(OPERATIONS // 4)  # caches of names, pools and the allocator are warm then
        before = _rss()
        await work(OPERATIONS - OPERATIONS // 4)
        after = _rss()
        stats = await _idle(cache, workers)

        host, lower = stats.tiers[0], stats.tiers[1:]
        assert (host.pinned_nbytes, stats.leases, stats.inflight) == (0, 0, 0)
        assert [(t.orphans, t.inflight_nbytes) for t in lower] == [(0, 0)] * 2
        check_accounts(cache.stack.planner, idle=True)
        assert host.used_nbytes == host.objects * PAGE <= 40 * PAGE
        assert not cache.parts._jobs
        assert len(cache.stack.loads._flights) == 0 == len(cache.stack.spills.unwritten())
        assert after - before < RSS_BOUND
        for worker in workers:
            worker.check_that_it_is_ours()

        await _everything_is_right(cache, model)
        await cache.flush()  # what was loaded may have begun a round of demotion, which holds some
        assert await cache.control.clear("cpu") >= 0
        assert cache.control.stats().tiers[0].used_nbytes == 0
        # It did what it says: every kind of operation was finished and was cut off.
        assert sum(tally.done.values()) + sum(tally.cut.values()) == OPERATIONS
        assert tally.loaded_tokens > OPERATIONS
        for name in ("store", "load", "look", "prefetch", "pin", "evict"):
            assert tally.done[name] > OPERATIONS / 200
            assert tally.cut[name] > OPERATIONS / 1000
        assert min(tier.hits for tier in stats.tiers) > OPERATIONS / 200
        assert lower[0].misses[Cause.CORRUPT] > 0 < lower[0].misses[Cause.TIER_DOWN]
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert set(threading.enumerate()) <= threads
    assert descriptors() == held
    assert list((tmp_path / "v2" / "tmp").iterdir()) == []


async def _everything_is_right(cache: Cache, model: Model) -> None:
    """What the cache still has of each prompt, from wherever, is what the model has."""
    memory, mine = Engine(layout(), LONGEST // 4, 99), torch.arange(LONGEST)
    for tokens, scope, slots in model.prompts:
        async with cache.lookup(tokens, scope=scope) as hit:
            got = (await cache.retrieve(hit, memory.view(mine))).tokens
        assert same(memory.read(mine[:got]), model.engine.read(slots[:got]))
