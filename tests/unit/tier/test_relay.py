"""Frames go from tier to tier as they are: verified, never decoded, where both hold them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from codecs_of_tests import DOUBLES, FAILS, SHRINKS
from stacks import CHUNK, NAMESPACE, MemoryBackend, full_group

from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, ObjectName, Part
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.testing.loan import Loan, noise
from kvlayer.tier.transfer.encodings import Coding, Raw
from kvlayer.tier.transfer.objects import Item, Objects
from kvlayer.tier.transfer.relay import Relayed

PART = Part(0, (0, 2), (0, 2))
PAYLOAD = Payload.of(full_group(), PART, CHUNK)
COUNT = 20
CODINGS = {"raw": Raw(), "doubles": DOUBLES, "shrinks": SHRINKS, "cannot be decoded": FAILS}


def key(number: int) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, PUBLIC_ZONE, number.to_bytes(32, "little"), CHUNK, PART)


class Pair:
    """Two tiers, of which the first holds objects."""

    def __init__(self, one: Sequence[Coding], other: Sequence[Coding], scratch: int) -> None:
        self.slab = Slab(4096, scratch_nbytes=scratch)
        self.backends = MemoryBackend(), MemoryBackend()
        self.objects = Objects(
            self.slab,
            [None, *self.backends],
            shape=lambda _, tokens: PAYLOAD,
            clock=asyncio.get_running_loop().time,
            wall_clock=lambda: 0.0,
            build="test",
            codings=[(), one, other],
        )

    async def store(self) -> None:
        for number in range(COUNT):
            content = b"\1" + noise(number, PAYLOAD.body_nbytes - 1)
            item = Item(key(number), PAYLOAD, 16 * number, Loan(len(content), content).regions())
            assert (await self.objects.put(1, item)).ok

    async def relay(self, *numbers: int) -> list[Cause | None]:
        asked = [Relayed(key(number), 16 * number) for number in numbers]
        outcomes = await self.objects.relay(asked, 1, 2)
        assert [outcome.key for outcome in outcomes] == [key(number) for number in numbers]
        assert [arena.used_nbytes for arena in self.objects._arenas] == [0, 0]
        return [outcome.cause for outcome in outcomes]

    def close(self) -> None:
        self.objects.close()
        self.slab.close()


@pytest.mark.parametrize("scratch", [1 << 20, 8 * 4096])
@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.asyncio
async def test_frames_are_relayed_as_they_are(name: str, scratch: int) -> None:
    pair = Pair([CODINGS[name]], [CODINGS[name]], scratch)
    await pair.store()
    one, other = pair.backends
    damaged = bytearray(one.objects[key(3)])
    damaged[4096 + 10] ^= 1
    one.objects[key(3)] = bytes(damaged)
    causes = await pair.relay(*range(COUNT), COUNT)  # the last was never there
    assert causes[3] is Cause.CORRUPT and causes[COUNT] is Cause.VANISHED
    assert [cause for cause in causes if cause] == [Cause.CORRUPT, Cause.VANISHED]
    del one.objects[key(3)]
    assert other.objects == one.objects
    pair.close()


@pytest.mark.asyncio
async def test_what_the_other_tier_does_not_hold_is_foreign_and_stays() -> None:
    pair = Pair([SHRINKS], [Raw()], 1 << 20)
    await pair.store()
    assert await pair.relay(1, 2, COUNT) == [Cause.FOREIGN_VERSION] * 2 + [Cause.VANISHED]
    assert not pair.backends[1].objects and len(pair.backends[0].objects) == COUNT
    pair.close()


@pytest.mark.asyncio
async def test_what_the_other_tier_holds_from_before_keeps_its_encoding() -> None:
    pair = Pair([SHRINKS], [DOUBLES, SHRINKS], 1 << 20)
    await pair.store()
    assert await pair.relay(1, 2) == [None, None]
    name = ObjectName.made(key(1), SHRINKS.encoding)
    assert pair.backends[1].objects[name] == pair.backends[0].objects[key(1)]
    into = Loan(PAYLOAD.body_nbytes)
    assert (await pair.objects.get(2, Item(key(1), PAYLOAD, 16, into.regions()))).ok
    into.holds(b"\1" + noise(1, PAYLOAD.body_nbytes - 1), "an object that was relayed")
    pair.close()
