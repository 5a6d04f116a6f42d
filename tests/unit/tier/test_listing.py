"""A listing that breaks its contract costs nobody a hang, and what it said before is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from stacks import NAMESPACE, chain_of, make_rig

from kvlayer.abc.backend import Listed
from kvlayer.errors import BackendError, ForeignError
from kvlayer.identity.keys import ObjectKey
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.transfer.listing import listed


def key(number: int, namespace: str = NAMESPACE) -> ObjectKey:
    return ObjectKey.of(namespace, "0", number.to_bytes(32, "big"), 16, "g0.l0-2.h0-2.canonical")


Lists = Callable[[str], AsyncIterator[Any]]


async def read(lists: Lists, deadline: float = 2.0) -> tuple[list[ObjectKey], Exception | None]:
    """What is known after a listing, and what ended it."""
    rig, known = make_rig(deadline=deadline), list[ObjectKey]()
    rig.backend.list = lists  # type: ignore[method-assign,assignment]
    error: Exception | None = None
    try:
        async for batch in listed(rig.tier, NAMESPACE):
            assert len(batch.keys) == len(batch.copies)
            known += batch.keys
    except Exception as exc:  # noqa: BLE001  # the test says which
        error = exc
    await rig.aclose()
    return known, error


@in_virtual_time
async def test_everything_is_listed_in_batches() -> None:
    async def lists(prefix: str) -> AsyncIterator[Listed]:
        for number in range(1000):
            await asyncio.sleep(1.9)  # a slow one: each step has the deadline
            yield Listed(key(number), 1, 0.0)

    known, error = await read(lists)
    assert error is None
    assert known == [key(number) for number in range(1000)]


@in_virtual_time
async def test_a_step_that_does_not_end_is_a_timeout() -> None:
    async def lists(prefix: str) -> AsyncIterator[Listed]:
        yield Listed(key(1), 1, 0.0)
        await asyncio.Event().wait()

    known, error = await read(lists)
    assert known == [key(1)]
    assert isinstance(error, TimeoutError)


@pytest.mark.parametrize(
    "bad", [5, None, key(2), Listed("a/b/c/d", 1, 0.0)], ids=["int", "None", "key", "text"]
)
@in_virtual_time
async def test_what_is_no_listing_is_an_error(bad: object) -> None:
    async def lists(prefix: str) -> AsyncIterator[object]:
        yield Listed(key(1), 1, 0.0)
        yield bad

    known, error = await read(lists)
    assert known == [key(1)]
    assert isinstance(error, ForeignError)


@pytest.mark.parametrize("cycle", [1, 2, 7, 1000])
@in_virtual_time
async def test_a_listing_that_goes_round_ends(cycle: int) -> None:
    async def lists(prefix: str) -> AsyncIterator[Listed]:
        while True:
            for number in range(cycle):
                yield Listed(key(number), 1, 0.0)

    known, error = await read(lists)
    assert set(known) == {key(number) for number in range(cycle)}
    assert isinstance(error, ForeignError)


@in_virtual_time
async def test_a_listing_of_others_objects_ends_and_none_is_taken() -> None:
    async def lists(prefix: str) -> AsyncIterator[Listed]:
        number = 0
        while True:
            number += 1
            yield Listed(key(number, "cd" * 32), 1, 0.0)

    known, error = await read(lists)
    assert known == []
    assert isinstance(error, ForeignError)


@pytest.mark.parametrize("error", [SystemExit(1), BackendError("x"), GeneratorExit()])
@pytest.mark.parametrize("at_once", [True, False])
@in_virtual_time
async def test_a_listing_that_raises_ends(error: BaseException, at_once: bool) -> None:
    def lists(prefix: str) -> AsyncIterator[Listed]:
        if at_once:
            raise error
        return _raises(error)

    known, raised = await read(lists)
    assert known == []
    assert isinstance(raised, (ForeignError, BackendError))


async def _raises(error: BaseException) -> AsyncIterator[Listed]:
    raise error
    yield Listed(key(1), 1, 0.0)


@in_virtual_time
async def test_a_listing_that_fails_costs_a_cache_only_questions() -> None:
    rig, chain = make_rig(shared=True), chain_of(16)
    await rig.send_down(chain)
    rig.backend.list = lambda prefix: _raises(SystemExit(1))  # type: ignore[method-assign]
    rig.tier.was_empty = rig.tier.is_shared = False
    rig.stack.recover(rig.tier, NAMESPACE)
    await rig.stack.recovered()
    assert rig.tier.must_ask(NAMESPACE)
    assert (await rig.stack.finder.find(chain)).tokens == 16
    await rig.aclose()
