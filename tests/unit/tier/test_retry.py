"""Retries: only what may pass is asked again, only the items that failed, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from kvlayer.errors import BackendError, BackendUnavailableError
from kvlayer.tier.guard.retry import Retry


class Flaky:
    """A batch call in which each item fails a given number of times."""

    def __init__(self, failures: dict[str, int], error: BackendError) -> None:
        self.failures = failures
        self.error = error
        self.batches: list[list[str]] = []

    async def __call__(self, items: Sequence[str]) -> list[str | BackendError]:
        self.batches.append(list(items))
        answers: list[str | BackendError] = []
        for item in items:
            self.failures[item] -= 1
            answers.append(self.error if self.failures[item] >= 0 else item.upper())
        return answers


GONE = BackendUnavailableError("gone for a moment")


@pytest.mark.asyncio
async def test_only_items_that_failed_for_the_moment_are_asked_again() -> None:
    flaky = Flaky({"a": 0, "b": 1, "c": 2, "d": 0}, GONE)
    assert await Retry(2).batch(flaky, list("abcd")) == ["A", "B", "C", "D"]
    assert flaky.batches == [["a", "b", "c", "d"], ["b", "c"], ["c"]]


@pytest.mark.asyncio
async def test_after_the_last_try_the_error_is_the_answer() -> None:
    flaky = Flaky({"a": 9, "b": 0}, GONE)
    assert await Retry(2).batch(flaky, ["a", "b"]) == [GONE, "B"]
    assert len(flaky.batches) == 3


@pytest.mark.asyncio
async def test_an_error_that_will_not_pass_is_not_asked_again() -> None:
    flaky = Flaky({"a": 1}, BackendError("full"))
    (answer,) = await Retry(5).batch(flaky, ["a"])
    assert isinstance(answer, BackendError)
    assert len(flaky.batches) == 1


@pytest.mark.asyncio
async def test_none_means_none() -> None:
    flaky = Flaky({"a": 1}, GONE)
    assert await Retry(0).batch(flaky, ["a"]) == [GONE]
    assert len(flaky.batches) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(("error", "tries"), [(GONE, 3), (BackendError("no"), 1), (OSError(5), 1)])
async def test_a_call_that_raises_is_tried_again_only_when_it_may_help(
    error: Exception, tries: int
) -> None:
    calls = 0

    async def call() -> str:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(type(error)) as caught:
        await Retry(2).call(call)
    assert caught.value is error
    assert calls == tries


@pytest.mark.asyncio
async def test_a_wrong_number_of_answers_is_an_error() -> None:
    async def short(items: Sequence[str]) -> list[str]:
        return list(items[1:])

    with pytest.raises(ValueError, match="zip"):
        await Retry(2).batch(short, ["a", "b"])


@pytest.mark.asyncio
async def test_being_cancelled_between_tries_ends_it() -> None:
    flaky = Flaky({"a": 1_000}, GONE)
    running = asyncio.create_task(Retry(1_000).batch(flaky, ["a"]))
    while not flaky.batches:  # noqa: ASYNC110
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
