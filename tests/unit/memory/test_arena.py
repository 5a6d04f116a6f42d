"""Scratch goes to whoever waits for it, however it comes back."""

from __future__ import annotations

import asyncio

import pytest

from kvlayer.memory.arena import Arena, Scratch
from kvlayer.payload import ALIGNMENT


async def taken(arena: Arena) -> Scratch:
    while (scratch := arena.take([1])) is None:
        await arena.given_back()
    return scratch


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.asyncio
async def test_what_a_large_batch_gives_back_serves_all_who_wait_for_a_little() -> None:
    arena = Arena(memoryview(bytearray(4 * ALIGNMENT)))
    whole = arena.take([1, 1, 1, 1])
    assert whole is not None and len(whole.parts) == 4
    waiting = [asyncio.create_task(taken(arena)) for _ in range(3)]
    await turns()
    whole.give_back()
    await turns()
    assert [task.done() for task in waiting] == [True] * 3
    assert arena.used_nbytes == 3 * ALIGNMENT


@pytest.mark.asyncio
async def test_one_who_leaves_while_waiting_costs_the_others_nothing() -> None:
    arena = Arena(memoryview(bytearray(ALIGNMENT)))
    whole = arena.take([1])
    assert whole is not None
    waiting = [asyncio.create_task(taken(arena)) for _ in range(2)]
    await turns()
    waiting[0].cancel()
    whole.give_back()
    await turns()
    assert waiting[0].cancelled() and waiting[1].done()
