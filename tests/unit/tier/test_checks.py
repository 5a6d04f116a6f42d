"""Who waits for a turn to verify bytes may leave at any moment."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hang import HANG

from kvlayer.tier.transfer.checks import Checks

NBYTES = 8 << 20


@pytest.mark.asyncio
async def test_a_wait_that_is_cancelled_as_another_ends_is_cancelled() -> None:
    """And no error of another kind, which would look like a failing tier."""
    checks = Checks(1, NBYTES)
    inside, opens = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert opens.wait(HANG)

    first = asyncio.create_task(checks.run(hold, NBYTES))
    assert await asyncio.to_thread(inside.wait, HANG)
    second = asyncio.create_task(checks.run(lambda: None, NBYTES))
    await asyncio.sleep(0)
    second.cancel()
    checks._nbytes -= NBYTES  # the first one's end comes in this very turn, before the second's
    checks._next()
    with pytest.raises(asyncio.CancelledError):
        await second
    checks._nbytes += NBYTES
    opens.set()
    await first
    assert (checks._nbytes, len(checks._waiting)) == (0, 0)
    checks.close()
