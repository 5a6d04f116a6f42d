"""An engine of the simulated world: it stores and loads, and checks every answer and every byte."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import torch
from processes import BLOCK, CHUNK, SLACK, Process
from world import DIM, LONGEST, PUBLIC, Prompt

from kvlayer.api.hit import PrefixHit
from kvlayer.errors import BackendError
from kvlayer.layout import KVView
from kvlayer.results import RetrieveReport, StoreReport
from kvlayer.testing import invariants


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

    def learn(self, prompt: Prompt, length: int) -> list[bytes]:
        return self.world.learn(self.cache, prompt, length)

    def compute(self, prompt: Prompt, length: int, first: int) -> KVView:
        """The KV of a prompt from token ``first`` on, in the engine's memory."""
        self._flat[:, : length - first] = self.world.kv[:, prompt.rows[first:length]]
        return self._view(length, first)

    def make_room(self, prompt: Prompt, length: int, hit: PrefixHit) -> KVView:
        """The engine's memory, for a load."""
        return self._view(length)

    def check_served(self, prompt: Prompt, tokens: int) -> None:
        """Raise unless the memory has the KV of so many tokens."""
        served = self._flat[:, :tokens]
        if not torch.equal(served, self.world.kv[:, prompt.rows[:tokens]]):
            raise invariants.Broken(f"wrong bytes were served, among {tokens} tokens")

    def taken_back(self) -> None:
        """From here on nobody may write to the memory, and what it holds is nobody's KV."""
        self.memory.add_(0.5)
        self._left = self.memory.clone()

    def check_that_it_is_ours(self) -> None:
        if self._left is not None and not torch.equal(self._left, self.memory):
            raise invariants.Broken("memory was written to after it had been given back")

    async def store(
        self,
        prompt: Prompt,
        length: int = LONGEST,
        *,
        first: int = 0,
        within: float | None = None,
    ) -> StoreReport:
        """Store a prompt; ``within`` seconds, or a deadline for each span."""
        self.check_that_it_is_ours()
        self._left = None
        first = min(first, length)
        hashes = self.learn(prompt, length)
        view = self.compute(prompt, length, first)
        since, written = self.process.now(), len(hashes) + 1
        try:
            report = await self.process.timed(
                "store",
                self.cache.store(prompt.tokens[:length], view, first_token=first),
                written * self.process.patience if within is None else within,
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
                view = self.make_room(prompt, length, hit)
                work = self.cache.retrieve(hit, view, deadline=deadline)
                most = (len(hit.spans) + 1) * len(self.cache.stack.lower) * within + SLACK
                if deadline is not None:
                    most = min(most, deadline + SLACK)
                report = await self.process.timed("retrieve", work, most)
            if report.tokens > hit.tokens:
                raise invariants.Broken(f"{report.tokens} tokens of a hit of {hit.tokens}")
            if report.tokens < hit.tokens and not report.failed:
                raise invariants.Broken("a shorter prefix than was found, and no cause")
            self.check_served(prompt, report.tokens)
        finally:
            self.taken_back()
        self.world.counts["loaded"] += report.tokens
        self.world.counts["short"] += bool(report.failed)
        return report

    async def drop(self, prompt: Prompt, length: int = LONGEST, tier: str | None = "cpu") -> None:
        """Evict a prompt on request: from host memory, or (``None``) from everywhere."""
        hashes = self.learn(prompt, length)
        try:
            within = 4 * self.process.patience
            work = self.cache.control.evict(prompt.tokens[:length], tier=tier)
            with suppress(BackendError):  # a slow tier may not have removed all: it says so
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
