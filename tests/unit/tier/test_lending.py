"""A deadline that falls in the middle of a read frees the waiter; memory is whose it was lent from.

Memory of somebody's own, unaligned and in pieces, with guard bytes around it, in both modes of
lending, by backends that let go when asked and by backends that do not, raw and coded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from codecs_of_tests import DOUBLES
from stacks import CHUNK, NAMESPACE, MemoryBackend, full_group

from kvlayer.abc.backend import Capability, Read, ReadResult
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, Part
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.testing.loan import Loan, noise
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.guard.guard import Guard, TierCall
from kvlayer.tier.messages import Outcome
from kvlayer.tier.transfer.encodings import Coding, Raw
from kvlayer.tier.transfer.objects import Item, Lending, Objects

PART = Part(0, (0, 2), (0, 2))
PAYLOAD = Payload.of(full_group(), PART, CHUNK)
KEY = ObjectKey.of(NAMESPACE, PUBLIC_ZONE, bytes(32), CHUNK, PART)
DEADLINE = 2.0


class Halting(MemoryBackend):
    """Fills half of what it was lent, waits at a gate, and fills the rest."""

    def __init__(self, *, is_revocable: bool) -> None:
        super().__init__()
        self.capabilities = frozenset({Capability.REVOCABLE} if is_revocable else ())
        self.opens = asyncio.Event()
        self.halts = False
        self.has_filled = False

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        if not self.halts:
            return await super().get(reads)
        halves = [r[: r.nbytes // 2] for read in reads for r in read.regions]
        for half in halves:
            half[:] = b"\xee" * half.nbytes
        while not self.opens.is_set():
            try:
                await self.opens.wait()
            except asyncio.CancelledError:
                if Capability.REVOCABLE in self.capabilities:
                    raise
        self.has_filled = True
        return await super().get(reads)


@pytest.mark.parametrize("coding", [Raw(), DOUBLES], ids=["raw", "coded"])
@pytest.mark.parametrize("is_revocable", [True, False], ids=["revocable", "stubborn"])
@pytest.mark.parametrize("lending", Lending)
@in_virtual_time
async def test_a_deadline_in_the_middle_of_a_read_spoils_no_memory(
    lending: Lending, is_revocable: bool, coding: Coding
) -> None:
    loop, slab, guard = asyncio.get_running_loop(), Slab(4096), Guard(DEADLINE, 4)
    backend = Halting(is_revocable=is_revocable)
    objects = Objects(
        slab,
        [None, backend],
        shape=lambda _, tokens: PAYLOAD,
        clock=loop.time,
        wall_clock=lambda: 0.0,
        build="test",
        codings=[(), (coding,)],
    )
    content = noise(1, PAYLOAD.body_nbytes)
    written = Loan(len(content), content, shift=3)
    assert (await objects.put(1, Item(KEY, PAYLOAD, 0, written.pieces((5, 1)), lending))).ok

    backend.halts = True
    loan = Loan(len(content), shift=7)
    item = Item(KEY, PAYLOAD, 0, loan.pieces((13, 700, 1)), lending)
    call: TierCall[Outcome] = guard.send(objects.reading(1, item), nbytes=PAYLOAD.nbytes)
    assert not await guard.wait(call)
    assert loop.time() == DEADLINE and guard.orphans == 1
    loan.guards_stand()
    call.cancel()  # who lent it for the call wants it back now
    comes_back = is_revocable or lending is Lending.CALL
    assert await call.ended(DEADLINE / 2) is comes_back
    if comes_back:
        loan.poison()
    backend.opens.set()
    assert await call.ended(DEADLINE)
    assert call.was_cancelled and call.was_late
    if not comes_back:
        loan.poison()
    for _ in range(20):
        await asyncio.sleep(0)
    assert backend.has_filled is not is_revocable
    loan.is_poisoned_still()  # what went on went to memory of ours
    loan.guards_stand()
    assert (guard.orphans, guard.inflight, guard.inflight_nbytes) == (0, 0, 0)

    backend.halts = False
    again = Loan(len(content), shift=1)
    item = Item(KEY, PAYLOAD, 0, again.pieces((2, 1000)), lending)
    assert (await objects.get(1, item)).ok  # and nothing of scratch is lost
    again.holds(content, "an object, afterwards")
    again.guards_stand()
    assert [arena.used_nbytes for arena in objects._arenas] == [0, 0]
    await guard.aclose()
    objects.close()
    slab.close()
