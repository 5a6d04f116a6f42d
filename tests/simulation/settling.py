"""The end of every scenario: tiers are healed, deadlines pass, and then all must be well."""

from __future__ import annotations

import asyncio
from array import array

from clients import Client
from processes import CHUNK, LEASE, Process
from world import LONGEST

from kvlayer.abc.backend import Backend
from kvlayer.results import Cause
from kvlayer.testing import invariants
from kvlayer.testing.faults import Wrapper
from kvlayer.tier.guard.guard import Lane

MAX_PAUSE = 60.0  # of a breaker


async def settle(
    process: Process, *, is_lossless: bool = True, reader: Client | None = None
) -> None:
    """Heal every tier, let every deadline pass, and look whether all is well.

    ``is_lossless``: no tier lied about what it stored. ``reader``: an engine of the process.
    """
    for backend in process.backends:
        heal(backend)
    cache = process.cache
    await process.timed("flush", cache.flush(), 10 * process.patience)
    await asyncio.sleep(LEASE + process.patience)
    lanes = [tier.guard.breaker(lane) for tier in cache.stack.lower for lane in Lane]
    if not all(breaker.is_closed for breaker in lanes):
        await asyncio.sleep(2 * MAX_PAUSE)
    async with cache.lookup(array("i", [1])):
        pass  # leases that have run out are dropped at the next call
    invariants.nothing_left(cache)
    process.check()
    if is_lossless:
        invariants.nothing_lost(cache, process.committed())
    for tier in cache.stack.lower:
        if not tier.guard.serves:
            raise invariants.Broken(f"{tier.name} is well again, and is not asked any more")
    reader = reader or Client(process)
    for prompt in process.world.prompts:
        report = await reader.load(prompt, LONGEST)
        for _ in range(LONGEST // CHUNK):  # each finds out one that is not where it seemed
            if report.failed:
                report = await reader.load(prompt, LONGEST)
        causes = {failure.cause for failure in report.failed}
        if causes - {Cause.NO_ROOM}:
            raise invariants.Broken(f"what failed is offered again: {report.failed}")
    await cache.flush()
    await asyncio.sleep(LEASE + process.patience)
    async with cache.lookup(array("i", [1])):
        pass
    invariants.nothing_left(cache)
    process.check()


def heal(backend: Backend) -> None:
    """End every fault of a backend."""
    while isinstance(backend, Wrapper):
        backend.is_ill = False
        backend = backend.inner
