"""Waiting for a promise: for a chunk that another request is storing, and for nothing else."""

from __future__ import annotations

import asyncio
from functools import partial

from kvlayer.tier.planner.promises import Promise

__all__ = ["settled"]


async def settled(promise: Promise, end_hash: bytes, seconds: float) -> None:
    """Return when the chunk is there or will not come, or after ``seconds``.

    Whoever waits looks again, whichever it is. Cancelling it leaves the promise alone.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while end_hash in promise.hashes and (left := until - loop.time()) > 0:
        changed: asyncio.Future[None] = loop.create_future()
        promise.watch(partial(_wake, changed))
        await asyncio.wait({changed}, timeout=left)


def _wake(changed: asyncio.Future[None]) -> None:
    if not changed.done():
        changed.set_result(None)
