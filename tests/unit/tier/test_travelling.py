"""What travels together costs the loop a batch's tasks, whatever the number of its objects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from stacks import Rig, chain_of, make_rig

from kvlayer.results import RetrieveReport
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.guard import Lane
from kvlayer.tier.tier import LowerTier
from kvlayer.tier.transfer.batch import MAX_ITEMS

CHUNKS = 4 * MAX_ITEMS


class Tasks:
    """Counts the tasks a loop is given."""

    def __init__(self) -> None:
        self.count = 0
        asyncio.get_running_loop().set_task_factory(self._make)  # type: ignore[arg-type]

    def _make(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **how: Any
    ) -> asyncio.Task[Any]:
        self.count += 1
        return asyncio.Task(work, loop=loop, **how)


async def prepared() -> Rig:
    """A prompt of many chunks in host memory, and turns for all of them."""
    rig = make_rig(write="back", pages=CHUNKS, max_inflight=8 * CHUNKS)
    rig.hold(chain_of(16 * CHUNKS))
    return rig


@in_virtual_time
async def test_objects_that_are_written_together_cost_a_few_tasks_a_batch() -> None:
    rig = await prepared()
    records = list(rig.planner.directory.active())
    moves = [(r.chunk.span, r) for r in records if r.chunk.span is not None]
    tasks = Tasks()
    await rig.stack.spills.start(moves, [])
    await rig.stack.flush()
    assert len(rig.backends[0].objects) == CHUNKS
    assert tasks.count <= 4 * CHUNKS // MAX_ITEMS + 4
    await rig.aclose()


@in_virtual_time
async def test_objects_that_are_loaded_together_cost_a_few_tasks_a_batch() -> None:
    rig, chain = make_rig(pages=CHUNKS, max_inflight=8 * CHUNKS), chain_of(16 * CHUNKS)
    await rig.send_down(chain)
    match = await rig.stack.finder.find(chain)
    tasks = Tasks()
    assert await rig.stack.promote(match) == RetrieveReport(16 * CHUNKS)
    assert tasks.count <= 4 * CHUNKS // MAX_ITEMS + 4
    await rig.aclose()


@pytest.mark.parametrize("lane", Lane)
@in_virtual_time
async def test_a_ride_that_cannot_begin_gives_its_turn_back(lane: Lane) -> None:
    class Flat:
        def begin(self, ended: object, /) -> None:
            raise ValueError("no wheels")

        def cancel(self) -> None:
            raise AssertionError("it never began")

    rig = make_rig(max_inflight=1)
    guard = rig.stack.lower[0].guard
    calls = [guard.send(Flat(), lane=lane) for _ in range(3)]
    for call in calls:
        assert await call.ended(1.0)
        assert isinstance(call.error, ValueError)
    assert (guard.running, guard.inflight) == (0, 0)
    await rig.aclose()


@in_virtual_time
async def test_a_booking_that_raises_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    rig, chain = make_rig(pages=8), chain_of(16 * 8)
    await rig.send_down(chain)
    transferred = LowerTier.transferred

    def raising(*args: Any) -> None:
        transferred(*args)
        raise ValueError("a counter is broken")

    monkeypatch.setattr(LowerTier, "transferred", raising)
    match = await rig.stack.finder.find(chain)
    assert await rig.stack.promote(match) == RetrieveReport(16 * 8)
    assert len(told) == 8
    assert rig.stack.lower[0].guard.inflight == 0
    await rig.aclose()
