"""Rebinding: weights change in place while requests look up, load, store and prefetch.

From then on the engine's memory holds KV of nobody until somebody computes some. Nothing may write
there for a request that began before, and nothing of it may be stored under a name of before.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import torch
from clients import Client
from processes import Below, Process, opened
from settling import settle
from world import DIM, LONGEST, Prompt, World

from kvlayer.abc.backend import Capability
from kvlayer.identity.keys import ChunkChain
from kvlayer.results import Cause
from kvlayer.testing import invariants
from kvlayer.testing.faults import Slow
from kvlayer.testing.memory import MemoryBackend

_APART = 1e5  # by how much KV of one set of weights differs from that of the next


class Model:
    """An engine's weights, and the memory of all that runs on it."""

    def __init__(self, process: Process) -> None:
        self.process, self.world, self.cache = process, process.world, process.cache
        base = self.cache.namespace
        others = (f"sha256:{digit * 64}" for digit in "12")
        self.namespaces = [base, *(replace(base, weights=weights) for weights in others)]
        self.now, self.updates = 0, 0
        self.requests: list[Request] = []

    def kv(self, prompt: Prompt, length: int, weights: int) -> torch.Tensor:
        """What these weights compute of a prompt."""
        return self.world.kv[:, prompt.rows[:length]] + _APART * weights

    async def update(self, weights: int) -> None:
        async def change() -> None:
            if self.world.chance.random() < 0.2:
                await asyncio.sleep(0.005)
            self.now, self.updates = weights, self.updates + 1
            for request in self.requests:
                request.memory.fill_(-self.updates)
                request.left = request.memory.clone()

        began = len([each for each in self.requests if each.is_busy])
        await self.cache.rebind(self.namespaces[weights], change)
        self.world.counts["straddled"] += began
        self.world.counts["rebound"] += 1


class Request(Client):
    """One request after the other, each with the weights of its time."""

    def __init__(self, process: Process, model: Model) -> None:
        super().__init__(process)
        self.model, self.is_busy = model, False
        self.left = self.memory.clone()
        """What the memory held when the weights had last changed."""
        model.requests.append(self)

    async def one(self) -> None:
        chance, (prompt, length) = self.world.chance, self.world.pick()
        self.is_busy, before = True, self.model.updates
        try:
            match chance.randrange(8):
                case 0 | 1:
                    await self._stores(self.cache.chain(prompt.tokens[:length]), prompt, 0.0)
                case 2:
                    pause = chance.choice([0.005, 0.02])
                    await self._stores(self.cache.chain(prompt.tokens[:length]), prompt, pause)
                case 3:
                    await self.prefetch(prompt, length, seconds=0.1)
                case 4:
                    other = chance.randrange(len(self.model.namespaces))
                    namespace = self.model.namespaces[other]
                    chain = self.cache.chain(prompt.tokens[:length], namespace=namespace)
                    await self._loads(chain, prompt, other)
                case _:
                    chain = self.cache.chain(prompt.tokens[:length])
                    await self._loads(chain, prompt, self.model.now)
        finally:
            self.is_busy = False
        if before != self.model.updates and not torch.equal(self.left, self.memory):
            raise invariants.Broken("memory was written to after the weights had changed")
        self.process.check()

    async def _stores(self, chain: ChunkChain, prompt: Prompt, pause: float) -> None:
        """Compute a prompt, pause, and store it under the names it was begun with."""
        length, before = chain.num_tokens, self.model.updates
        right = self.model.kv(prompt, length, self.model.now)
        self._flat[:, :length] = right
        spans = [*chain.spans(len(chain)), *chain.tails(len(chain))[:1]]
        k, v = (plane.numpy().tobytes() for plane in right)
        for span in () if chain.is_stale else spans:  # else the weights are changing right now
            at, to = 4 * DIM * span.start, 4 * DIM * span.stop
            self.world.of[chain.namespace, span.hash] = k[at:to] + v[at:to]
        await asyncio.sleep(pause)
        is_late = before != self.model.updates
        report = await self.cache.store(chain, self._view(length))
        told = report.stored + report.skipped + report.dropped + len(report.failed)
        if told < len(spans):
            raise invariants.Broken(f"{len(spans)} spans, accounted for {told}: {report}")
        if is_late and (report.stored or report.skipped):
            raise invariants.Broken(f"a request that straddles a change was stored: {report}")
        if chain.is_stale:
            rebound = sum(failure.cause is Cause.REBOUND for failure in report.failed)
            self.world.counts["stores cut"] += bool(rebound)
        self.world.counts["stored"] += report.stored

    async def _loads(self, chain: ChunkChain, prompt: Prompt, weights: int) -> None:
        length, before = chain.num_tokens, self.model.updates
        async with self.cache.lookup(chain) as hit:
            await asyncio.sleep(self.world.chance.choice([0.0, 0.0, 0.01]))
            is_late = before != self.model.updates
            report = await self.cache.retrieve(hit, self._view(length))
        if report.tokens < hit.tokens and not report.failed:
            raise invariants.Broken("a shorter prefix than was found, and no cause")
        if is_late and report.tokens:
            raise invariants.Broken(f"a hit of before was served after the change: {report}")
        if before != self.model.updates:
            self.world.counts["loads cut"] += bool(report.failed)
            return
        served = self._flat[:, : report.tokens]
        if not torch.equal(served, self.model.kv(prompt, report.tokens, weights)):
            raise invariants.Broken(f"wrong bytes were served, among {report.tokens} tokens")
        self.world.counts["loaded"] += report.tokens


async def play(world: World) -> None:
    chance = world.chance
    shelf = MemoryBackend(capabilities=(Capability.LIST, Capability.SHARED))
    below = Below(
        Slow(shelf, chance, world.log, seconds=(0.0, 0.01)),
        {"write": chance.choice(["through", "back", "demote"]), "max_inflight": 4},
    )
    async with opened(world, below, pages=chance.randrange(8, 30)) as process:
        model = Model(process)
        requests = [Request(process, model) for _ in range(4)]

        async def run(request: Request) -> None:
            for _ in range(10):
                await request.one()

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(run(request))
            for _ in range(8):
                await asyncio.sleep(chance.expovariate(1.0) * 0.006)
                await model.update(chance.randrange(len(model.namespaces)))
                process.check()
                world.check_stored(shelf.objects)
        await model.update(0)
        for prompt in world.prompts:  # what settling reads is what these weights compute
            world.learn(process.cache, prompt, LONGEST)
        await settle(process)
        world.check_stored(shelf.objects)
