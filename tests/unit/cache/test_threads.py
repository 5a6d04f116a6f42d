"""Many engine threads on one small cache that evicts: every byte right, every account exact."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from caches import config, layout, tokens
from descriptors import descriptors
from engine import Engine, same
from hang import HANG
from stacks import check_accounts

from kvlayer import Cache, Portal
from kvlayer.api.lookup import Lookup
from kvlayer.results import Cause, Stats
from kvlayer.runtime.job import Job

THREADS = 4
ROUNDS = 100
FAMILIES, BRANCHES = 2, 3
LENGTH = 78  # 32 tokens that a family shares, two chunks more and a tail of 14
EXPECTED = {Cause.VANISHED, Cause.NO_ROOM, Cause.IN_FLIGHT}


class Prompts:
    """Prompts that share beginnings, and the engine that has computed all of them."""

    def __init__(self) -> None:
        self.engine = Engine(layout(), 128, 1)
        self.tokens: list[array[int]] = []
        self.slots: list[torch.Tensor] = []
        free = iter(range(0, 128 * 4, 8))
        for family in range(FAMILIES):
            start = self._slots(free, 32)
            for branch in range(BRANCHES):
                rest = tokens(LENGTH - 32, 100 + 10 * family + branch)
                self.tokens.append(tokens(32, family) + rest)
                self.slots.append(torch.cat([start, self._slots(free, len(rest))]))
        self.bits = [self.engine.read(slots) for slots in self.slots]

    @staticmethod
    def _slots(free: Iterator[int], count: int) -> torch.Tensor:
        """Blocks that lie apart, two at a time."""
        firsts = torch.tensor([next(free) for _ in range(-(-count // 8))])
        return (firsts[:, None] + torch.arange(8)).reshape(-1)[:count]


class EngineThread(threading.Thread):
    """One engine: looks up, loads and checks, stores; forgets and cancels as engines do."""

    def __init__(self, portal: Portal, prompts: Prompts, seed: int) -> None:
        super().__init__()
        self.portal, self.prompts = portal, prompts
        self.choice = random.Random(seed)
        self.mine = Engine(layout(), 32, 50 + seed)
        self.scratch = Engine(layout(), 32, 90 + seed)  # written by loads that were given up
        self.error: BaseException | None = None
        self.loaded = 0
        self.held: list[Lookup] = []
        self.given_up: list[Job[object]] = []

    def run(self) -> None:
        try:
            for _ in range(ROUNDS):
                self.one(self.choice.randrange(len(self.prompts.tokens)))
        except BaseException as exc:  # noqa: BLE001  # raised by the test's thread
            self.error = exc

    def one(self, number: int) -> None:
        prompt = self.prompts.tokens[number][: self.choice.choice([LENGTH, LENGTH, 48, 40])]
        kind = self.choice.random()
        if kind < 0.35:
            view = self.prompts.engine.view(self.prompts.slots[number][: len(prompt)])
            self.portal.submit(Cache.store, prompt, view).wait(HANG)
        elif kind < 0.75:
            self.load(number, prompt)
        elif kind < 0.85:
            self.give_up(prompt)
        elif kind < 0.95:  # a scheduler that looks and moves on
            self.held.append(self.portal.lookup(prompt))
            if len(self.held) > 2:
                self.held.pop(0).release()
        else:
            self.portal.lookup(prompt)  # and one that dies with its lease

    def load(self, number: int, prompt: array[int]) -> None:
        with self.portal.lookup(prompt) as lookup:
            hit = lookup.wait(HANG)
            slots = self.mine.slots(len(prompt), seed=self.choice.randrange(9))
            job = self.portal.submit(Cache.retrieve, hit, self.mine.view(slots))
            if self.choice.random() < 0.3:
                lookup.release()  # while it is being loaded
            report = job.wait(HANG)
        got = report.tokens
        assert got == hit.tokens or {each.cause for each in report.failed} <= EXPECTED
        found = [plane[:got] for plane in self.mine.read(slots)]
        assert same(found, [plane[:got] for plane in self.prompts.bits[number]])
        self.loaded += got

    def give_up(self, prompt: array[int]) -> None:
        async def load(cache: Cache) -> None:
            async with cache.lookup(prompt) as hit:
                await cache.retrieve(hit, self.scratch.view(range(len(prompt))))

        async def store(cache: Cache) -> None:
            await cache.store(tokens(48, self.choice.randrange(99)), self.scratch.view(range(48)))

        for job in self.portal.submit_all([load, store]):
            if job.cancel():  # else it was faster
                self.given_up.append(job)


@contextmanager
def switching(seconds: float) -> Iterator[None]:
    """Threads change places far more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("tiers", ["cpu", "cpu-file"])
@pytest.mark.parametrize("seed", range(2))
def test_engine_threads_share_a_cache_that_evicts(tmp_path: Path, tiers: str, seed: int) -> None:
    prompts = Prompts()
    fds, threads = descriptors(), set(threading.enumerate())
    directory = tmp_path if tiers == "cpu-file" else None
    settings = config(directory, host="60KiB", write="back", tokens_per_tail=2)  # 15 objects of 28
    with Portal.open(settings, layout()) as portal, switching(1e-5):
        engines = [EngineThread(portal, prompts, seed * 10 + i) for i in range(THREADS)]
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.join()
        for engine in engines:
            if engine.error is not None:
                raise engine.error
            for job in engine.given_up:
                with pytest.raises(CancelledError):
                    job.wait(HANG)
            for lookup in engine.held:
                lookup.release()
        portal.call(Cache.flush)
        portal.call(idle, portal)  # what is found yet is leased from then on
        planner = portal.cache.stack.planner
        now = planner._clock()
        planner._clock = lambda: now + 1000.0
        portal.lookup([1]).release()  # whoever comes next ends the leases of those that died
        found = portal.call(idle, portal)
        check_accounts(planner, idle=True)
        assert found.leases == found.inflight == 0
        assert not portal._inbox
        assert found.tiers[0].evicted > 0
        assert sum(engine.loaded for engine in engines) > 0
    assert descriptors() == fds and set(threading.enumerate()) <= threads


async def idle(cache: Cache, portal: Portal) -> Stats:
    """The counters, once what was given up has ended and hints to tiers were taken."""
    stack = cache.stack
    while len(portal._tasks) > 1 or stack.inflight or stack.demotion._round:  # noqa: ASYNC110
        await asyncio.sleep(0)  # nothing tells; a round of demotion holds what it has written
    return cache.control.stats()
