"""The world a scenario plays in: prompts whose KV is known, engines, caches and what they promised.

A :class:`World` is one seed's. Its :class:`Process` is an open cache and the record of what it has
committed and given up; a :class:`Client` is an engine that stores and loads with memory of its
own, and checks every answer. The invariants are in ``kvlayer.testing.invariants``.
"""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch

from kvlayer import (
    AttentionKind,
    Cache,
    CacheConfig,
    KVGroup,
    KVLayout,
    ModelConfig,
    TierConfig,
    opening,
    registry,
)
from kvlayer._version import version
from kvlayer.abc.backend import Backend
from kvlayer.events import Event, ObjectQuarantined, ObjectsEvicted
from kvlayer.keys import ObjectKey, Scope
from kvlayer.layout import NHD, KVView
from kvlayer.registry import BACKENDS
from kvlayer.results import Cause, RetrieveReport, StoreReport
from kvlayer.testing import invariants
from kvlayer.testing.faults import Injected, Wrapper, given, tally
from kvlayer.testing.sim import run
from kvlayer.tier.directory import Host
from kvlayer.tier.guard import Lane
from kvlayer_backends.cpu import CpuBackend

T = TypeVar("T")

BLOCK, CHUNK, TAIL, LONGEST = 4, 8, 4, 40  # tokens
PAGE = 4096  # slab bytes of a chunk
DIM = 4
SLACK = 0.25  # virtual seconds that work on threads may add
LEASE = 5.0
MAX_PAUSE = 60.0  # of a breaker
LAYOUT = KVLayout.single(
    KVGroup(AttentionKind.MHA, (0,), "float32", 1, DIM), NHD, tokens_per_block=BLOCK
)
PUBLIC = Scope()


@dataclass(frozen=True)
class Prompt:
    """``LONGEST`` tokens, and which rows of the world's KV they have."""

    tokens: array[int]
    rows: torch.Tensor


@dataclass
class Below:
    """A lower tier of a process."""

    backend: Backend
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


class World:
    """All of one seed."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.directory = directory / str(seed)
        self.log: list[Injected] = []
        self.counts: Counter[str] = Counter()
        self.right: dict[bytes, bytes] = {}
        """What the objects of a chunk begin with, by its hash."""
        self.processes: list[Process] = []
        self.prompts: list[Prompt] = []
        rows: dict[bytes, int] = {}
        stem = [self.chance.randrange(50_000) for _ in range(LONGEST)]
        for _ in range(6):
            shared = self.chance.choice([0, 8, 16, 20, 32])
            own = [self.chance.randrange(50_000) for _ in range(LONGEST - shared)]
            tokens = array("i", stem[:shared] + own)
            packed = tokens.tobytes()
            places = [rows.setdefault(packed[: 4 * at + 4], len(rows)) for at in range(LONGEST)]
            self.prompts.append(Prompt(tokens, torch.tensor(places)))
        count = len(rows)
        self.kv = torch.arange(1, 2 * count * DIM + 1, dtype=torch.float32).view(2, count, DIM)

    def pick(self) -> tuple[Prompt, int]:
        """A prompt, and how much of it is asked for."""
        length = self.chance.choice([LONGEST, self.chance.randrange(1, LONGEST + 1)])
        return self.chance.choice(self.prompts), length

    def learn(self, cache: Cache, prompt: Prompt, length: int) -> list[bytes]:
        """Note what the objects of a prompt are; the hashes of its spans."""
        chain = cache.chain(prompt.tokens[:length], PUBLIC)
        spans = [*chain.spans(len(chain)), *chain.tails(len(chain))[:1]]
        k, v = (plane[prompt.rows].numpy().tobytes() for plane in self.kv)
        row = 4 * DIM
        for span in spans:
            at, to = span.start * row, span.stop * row
            self.right[span.hash] = k[at:to] + v[at:to]
        return [span.hash for span in spans]

    def bytes_of(self, key: ObjectKey) -> bytes | None:
        return self.right.get(key.chunk)

    def lies_in_directory(self, chunk_hash: bytes) -> bool:
        """Whether there is a file of this chunk below the directory, whoever wrote it."""
        text = chunk_hash.hex()
        return any((self.directory / "v1").glob(f"*/{text[:2]}/*.{text}.*"))

    def check_stored(self, objects: dict[ObjectKey, bytes]) -> None:
        """What lies on a tier below is right, too."""
        for key, stored in objects.items():
            expected = self.bytes_of(key)
            if expected is not None and stored[PAGE : PAGE + len(expected)] != expected:
                raise invariants.Broken(f"wrong bytes of {key} were written down")

    @asynccontextmanager
    async def process(
        self, *below: Below, pages: int = 12, name: str = "", high: float = 1.0, **config: Any
    ) -> AsyncGenerator[Process]:
        """A cache in a process of its own, until the block ends.

        Host memory has ``pages``; above ``high``, a share of them, it is emptied to half of that.
        """
        tiers = [TierConfig(url=f"cpu://?capacity={pages * PAGE}")]
        schemes: dict[str, type[Backend]] = {"cpu": CpuBackend}
        for number, tier in enumerate(below):
            scheme = f"tier{number}"
            schemes[scheme] = given(tier.backend, scheme)
            tiers.append(TierConfig(url=f"{scheme}://", **tier.settings))
        settings = CacheConfig(
            model=ModelConfig(weights="sha256:" + "ab" * 32),
            tiers=tuple(tiers),
            tokens_per_chunk=CHUNK,
            tokens_per_tail=TAIL,
            high_watermark=high,
            low_watermark=high / 2,
            lease_seconds=LEASE,
            close_seconds=20.0,
            **config,
        )
        process = Process(self, name, [tier.backend for tier in below])
        self.processes.append(process)
        async with Cache.open(
            settings,
            LAYOUT,
            sinks=[process.hear],
            backends=BACKENDS.extended(schemes),
        ) as cache:
            process.cache = cache
            yield process


class Process:
    """One cache, and what it said it holds."""

    cache: Cache

    def __init__(self, world: World, name: str, backends: list[Backend]) -> None:
        self.world, self.name, self.backends = world, name, backends
        self._moment = 0
        self._committed: dict[bytes, int] = {}
        self._given_up: dict[bytes, int] = {}
        self._taken_by_others: set[bytes] = set()
        """What other processes took from a shared tier, some time."""

    @property
    def patience(self) -> float:
        """Seconds in which one question to every lower tier is answered, or given up."""
        return max((t.guard.deadline for t in self.cache.stack.lower), default=0.0) + SLACK

    # -- what it said ----------------------------------------------------------------------------

    def now(self) -> int:
        self._moment += 1
        return self._moment

    def hear(self, event: Event) -> None:
        if isinstance(event, ObjectsEvicted):
            # What leaves host memory in the background is served from below.
            keys = event.keys if event.policy != "demotion" else ()
        elif isinstance(event, ObjectQuarantined):
            keys = (event.key,)
        else:
            return
        chunks = [key.chunk for key in keys]
        if isinstance(event, ObjectsEvicted) and event.tier == self.cache.stack.host.name:
            self.leaves_host(chunks)
        else:
            self.takes_below(chunks)

    def holds(self, chunk_hash: bytes, *, in_host: bool = False) -> bool:
        """Whether the cache believes that it can serve all of a chunk."""
        chunk = self.cache.stack.planner.directory.chunk(chunk_hash)
        objects = () if chunk is None else tuple(chunk.objects.values())
        ready = [o.host is Host.READY or (o.is_ready and not in_host) for o in objects]
        return bool(ready) and all(ready)

    def commits(self, hashes: list[bytes], since: int) -> None:
        """What was stored. What is only believed to lie on a shared tier is a hint."""
        mine = [each for each in hashes if self.holds(each, in_host=True)]
        self._committed |= dict.fromkeys(mine, since)

    def gives_up(self, *hashes: bytes) -> None:
        """Somebody else took these away, and may: they are not missed."""
        self._given_up |= dict.fromkeys(hashes, self.now())

    def takes_below(self, hashes: list[bytes]) -> None:
        """What this process took from a shared tier has left it for all."""
        for process in self.world.processes:
            process.gives_up(*hashes)
            if process is not self:
                process._taken_by_others.update(hashes)

    def leaves_host(self, hashes: list[bytes]) -> None:
        """What host memory dropped is missed, if a tier below is to have it.

        But the directory's word on a shared tier is a hint: a store of what lies in host memory
        does not ask there again. Where another process had taken the copy away, host memory
        dropped the last one, and may. Nothing is excused that is there now, or that nobody took.
        """
        self.gives_up(
            *(
                each
                for each in hashes
                if not self.holds(each)
                or (
                    each in self._taken_by_others
                    and not self.holds(each, in_host=True)
                    and not self.world.lies_in_directory(each)
                )
            )
        )

    def committed(self) -> list[bytes]:
        """What has to be there: committed, and given up by no one since it was stored."""
        return [h for h, at in self._committed.items() if self._given_up.get(h, 0) < at]

    # -- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        """Between any two steps."""
        invariants.accounts(self.cache.stack.planner)
        invariants.no_wrong_bytes(self.cache, self.world.bytes_of)
        invariants.within_bounds(self.cache)

    async def settle(self, *, is_lossless: bool = True) -> None:
        """Heal every tier, let every deadline pass, and look whether all is well.

        ``is_lossless``: no tier lied about what it stored.
        """
        for backend in self.backends:
            heal(backend)
        cache = self.cache
        await self.timed("flush", cache.flush(), 10 * self.patience)
        await asyncio.sleep(LEASE + self.patience)
        lanes = [tier.guard.breaker(lane) for tier in cache.stack.lower for lane in Lane]
        if not all(breaker.is_closed for breaker in lanes):
            await asyncio.sleep(2 * MAX_PAUSE)
        async with cache.lookup(array("i", [1])):
            pass  # leases that have run out are dropped at the next call
        invariants.nothing_left(cache)
        self.check()
        if is_lossless:
            invariants.nothing_lost(cache, self.committed())
        for tier in cache.stack.lower:
            if not tier.guard.serves:
                raise invariants.Broken(f"{tier.name} is well again, and is not asked any more")
        reader = Client(self)
        for prompt in self.world.prompts:
            report = await reader.load(prompt, LONGEST)
            for _ in range(LONGEST // CHUNK):  # each finds out one that is not where it seemed
                if report.failed:
                    report = await reader.load(prompt, LONGEST)
            causes = {failure.cause for failure in report.failed}
            if causes - {Cause.NO_ROOM}:
                raise invariants.Broken(f"what failed is offered again: {report.failed}")
        await cache.flush()
        await asyncio.sleep(LEASE + self.patience)
        async with cache.lookup(array("i", [1])):
            pass
        invariants.nothing_left(cache)
        self.check()

    async def timed(self, what: str, work: Awaitable[T], within: float) -> T:
        """Wait for ``work``, which has to end within so many seconds."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        result = await work
        invariants.answered(what, loop.time() - started, within=within)
        return result


def heal(backend: Backend) -> None:
    """End every fault of a backend."""
    while isinstance(backend, Wrapper):
        backend.is_ill = False
        backend = backend.inner


class Client:
    """An engine of a process, with memory for one request at a time."""

    def __init__(self, process: Process) -> None:
        self.process, self.cache, self.world = process, process.cache, process.world
        self.scope = PUBLIC
        self.memory = torch.zeros(2, LONGEST // BLOCK, BLOCK, 1, DIM)
        self._flat = self.memory.view(2, LONGEST, DIM)
        self._slots = torch.arange(LONGEST)
        self._left: torch.Tensor | None = None
        """What the memory held when it was given back."""

    def _view(self, length: int, first: int = 0) -> KVView:
        return KVView([[self.memory]], [self._slots[: length - first]])

    def taken_back(self) -> None:
        """From here on nobody may write to the memory, and what it holds is nobody's KV."""
        self.memory.add_(0.5)
        self._left = self.memory.clone()

    def check_that_it_is_ours(self) -> None:
        if self._left is not None and not torch.equal(self._left, self.memory):
            raise invariants.Broken("memory was written to after it had been given back")

    async def store(self, prompt: Prompt, length: int = LONGEST, *, first: int = 0) -> StoreReport:
        self.check_that_it_is_ours()
        self._left = None
        first = min(first, length)
        hashes = self.world.learn(self.cache, prompt, length)
        self._flat[:, : length - first] = self.world.kv[:, prompt.rows[first:length]]
        since, written = self.process.now(), len(hashes) + 1
        try:
            report = await self.process.timed(
                "store",
                self.cache.store(
                    prompt.tokens[:length], self._view(length, first), first_token=first
                ),
                written * self.process.patience,
            )
        finally:
            self.taken_back()
        before = -(-first // CHUNK)
        todo = hashes[before:]
        total = report.stored + report.skipped + report.dropped
        if total != len(todo):
            raise invariants.Broken(f"{len(todo)} spans, accounted for {total}: {report}")
        self.process.commits(todo[: total - report.dropped], since)
        self.world.counts["stored"] += report.stored
        self.world.counts["dropped"] += report.dropped
        return report

    async def load(
        self,
        prompt: Prompt,
        length: int = LONGEST,
        *,
        deadline: float | None = None,
        pause: float = 0.0,
    ) -> RetrieveReport:
        """Look up, wait, retrieve, and compare every byte."""
        self.check_that_it_is_ours()
        self._left = None
        within = self.process.patience
        started = asyncio.get_running_loop().time()
        try:
            async with self.cache.lookup(prompt.tokens[:length]) as hit:
                took = asyncio.get_running_loop().time() - started
                invariants.answered("lookup", took, within=within)
                if pause:
                    await asyncio.sleep(pause)
                work = self.cache.retrieve(hit, self._view(length), deadline=deadline)
                most = (len(hit.spans) + 1) * len(self.cache.stack.lower) * within + SLACK
                if deadline is not None:
                    most = min(most, deadline + SLACK)
                report = await self.process.timed("retrieve", work, most)
            if report.tokens > hit.tokens:
                raise invariants.Broken(f"{report.tokens} tokens of a hit of {hit.tokens}")
            if report.tokens < hit.tokens and not report.failed:
                raise invariants.Broken("a shorter prefix than was found, and no cause")
            served = self._flat[:, : report.tokens]
            if not torch.equal(served, self.world.kv[:, prompt.rows[: report.tokens]]):
                raise invariants.Broken(f"wrong bytes were served, among {report.tokens} tokens")
        finally:
            self.taken_back()
        self.world.counts["loaded"] += report.tokens
        self.world.counts["short"] += bool(report.failed)
        return report

    async def drop(self, prompt: Prompt, length: int = LONGEST, tier: str | None = "cpu") -> None:
        """Evict a prompt on request: from host memory, or (``None``) from everywhere."""
        hashes = self.world.learn(self.cache, prompt, length)
        try:
            within = 4 * self.process.patience
            work = self.cache.control.evict(prompt.tokens[:length], tier=tier)
            await self.process.timed("evict", work, within)
        finally:
            if tier is None:
                self.process.takes_below(hashes)
            else:
                self.process.leaves_host(hashes)

    async def prefetch(self, prompt: Prompt, length: int = LONGEST, *, seconds: float) -> None:
        job = self.cache.prefetch(prompt.tokens[:length], deadline=seconds)
        within = 2 * LONGEST // CHUNK * len(self.cache.stack.lower) * self.process.patience
        await self.process.timed("prefetch", _ended(job), within + SLACK)


async def _ended(job: Any) -> None:
    try:
        await job
    finally:
        job.cancel()


_entry_points = functools.cache(registry.entry_points)
_version = functools.cache(version)
Scenario = Callable[[World], Coroutine[Any, Any, None]]


def simulate(main: Coroutine[Any, Any, None], seed: int, trace: list[str] | None = None) -> None:
    """Run ``main`` under the simulator."""
    # Metadata is read once for all seeds: it would be half of what they cost.
    with (
        mock.patch.object(registry, "entry_points", _entry_points),
        mock.patch.object(opening, "version", _version),
    ):
        run(main, seed=seed, trace=trace)


def play(scenario: Scenario, seed: int, directory: Path, trace: list[str] | None = None) -> World:
    """Play one seed of a scenario. Raises what its invariants raise."""
    world = World(seed, directory)

    async def whole() -> None:
        try:
            await scenario(world)
        finally:
            task = asyncio.current_task()
            left = [each for each in asyncio.all_tasks() if each is not task]
        if left:
            raise invariants.Broken(f"tasks are left: {left}")

    try:
        simulate(whole(), seed, trace)
    except BaseException as exc:
        exc.add_note(f"injected: {tally(world.log)}")
        raise
    finally:
        shutil.rmtree(world.directory, ignore_errors=True)
    return world
