"""Patience: how long stores wait for room, and that whoever ends it ends all of them."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvlayer.patience import Patience
from kvlayer.testing.sim import in_virtual_time


async def waits(patience: Patience) -> bool:
    never: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    return await patience.wait(never, 0.0)


@in_virtual_time
async def test_one_patience_of_several_stores_ends_for_all_of_them() -> None:
    patience = Patience()
    waiting = [asyncio.ensure_future(waits(patience)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()  # whoever leaves takes nobody's wake-up along
    await asyncio.sleep(0)
    patience.end()
    assert await asyncio.gather(waiting[0], waiting[2]) == [False, False]
    assert await waits(patience) is False


@pytest.mark.parametrize("is_closed", [False, True])
def test_it_is_ended_from_any_thread_whatever_became_of_a_loop_that_waited(
    is_closed: bool,
) -> None:
    patience, begun = Patience(), threading.Event()

    async def wait() -> bool:
        waiting = asyncio.ensure_future(waits(patience))
        await asyncio.sleep(0)
        begun.set()
        return await waiting

    if is_closed:
        loop = asyncio.new_event_loop()
        left = loop.create_task(waits(patience))
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()  # with a store that waits: its loop was given up
        left._log_destroy_pending = False  # type: ignore[attr-defined]
    ending = threading.Thread(target=lambda: (begun.wait(), patience.end()))
    ending.start()
    assert asyncio.run(wait()) is False
    ending.join()
