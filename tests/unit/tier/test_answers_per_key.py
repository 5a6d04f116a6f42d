"""A tier answers for each key: an error is a value, and never an absence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from stacks import CHUNK, Rig, chain_of, make_rig

from kvlayer.abc.backend import Damaged, DeleteResult, SizeResult
from kvlayer.errors import BackendError, BackendUnavailableError
from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause
from kvlayer.tier.guard.guard import Lane
from kvlayer.tier.guard.retry import Retry


async def _shared(chunks: int) -> tuple[Rig, Sequence[ObjectKey]]:
    """A tier that holds a prompt of which the directory knows nothing."""
    rig, chain = make_rig(shared=True), chain_of(chunks * CHUNK)
    await rig.send_down(chain)
    keys = list(rig.backend.objects)
    rig.planner.vanished(keys, 1, "forgotten for the test")
    return rig, keys


def _flaky(rig: Rig, calls: dict[str, int]) -> None:
    """Every first call answers that it may pass, for each of its keys."""
    backend, contains, delete = rig.backend, rig.backend.contains, rig.backend.delete
    again = BackendUnavailableError("not now")

    async def ask(keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        calls["contains"] = calls.get("contains", 0) + 1
        return [again] * len(keys) if calls["contains"] == 1 else await contains(keys)

    async def remove(keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        calls["delete"] = calls.get("delete", 0) + 1
        return [again] * len(keys) if calls["delete"] == 1 else await delete(keys)

    async def take_away(items: Sequence[Damaged], /) -> list[DeleteResult]:
        calls["quarantine"] = calls.get("quarantine", 0) + 1
        if calls["quarantine"] == 1:
            return [again] * len(items)
        return await delete([item.key for item in items])

    async def touch(keys: Sequence[ObjectKey], /) -> None:
        calls["touch"] = calls.get("touch", 0) + 1
        if calls["touch"] == 1:
            raise again

    for name, call in {
        "contains": ask,
        "delete": remove,
        "quarantine": take_away,
        "touch": touch,
    }.items():
        setattr(backend, name, call)


@pytest.mark.asyncio
async def test_one_key_that_cannot_be_looked_at_costs_the_others_nothing() -> None:
    rig, _ = await _shared(3)
    hidden = chain_of(3 * CHUNK).hashes[2]
    contains = rig.backend.contains

    async def ask(asked: Sequence[ObjectKey], /) -> list[SizeResult]:
        sizes = await contains(asked)
        error = BackendError("an unreadable folder")
        return [error if k.end_hash == hidden else s for k, s in zip(asked, sizes, strict=True)]

    setattr(rig.backend, "contains", ask)  # noqa: B010  # of this one alone
    match = await rig.stack.finder.find(chain_of(3 * CHUNK), at_any_price=True)
    assert match.tokens == 2 * CHUNK
    assert rig.tier.guard.breaker(Lane.READS).is_closed
    assert rig.tier.misses[Cause.TIER_DOWN] == 1
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_tier_that_can_look_at_no_key_has_failed() -> None:
    rig, keys = await _shared(2)
    rig.backend.results = [BackendError("an unreadable folder")] * len(keys)
    for _ in range(5):
        match = await rig.stack.finder.find(chain_of(2 * CHUNK), at_any_price=True)
        assert match.tokens == 0
    assert not rig.tier.guard.breaker(Lane.READS).is_closed
    await rig.aclose()


@pytest.mark.asyncio
async def test_transient_errors_are_tried_again_on_every_route() -> None:
    rig, keys = await _shared(2)
    rig.stack.objects._of(1).retry = Retry(1)
    calls: dict[str, int] = {}
    _flaky(rig, calls)
    objects = rig.stack.objects
    assert None not in await objects.contains(1, keys)
    await objects.touch(1, keys)
    await objects.quarantine(1, Damaged(keys[0]))
    assert await objects.delete(1, keys) == [None, None]
    assert calls == dict.fromkeys(("contains", "touch", "quarantine", "delete"), 2)
    assert rig.backend.objects == {}
    await rig.aclose()
