"""Trying again what a tier could not do for a moment. Backends say which errors are such."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from kvlayer.errors import BackendError

if TYPE_CHECKING:
    from tenacity import AsyncRetrying

__all__ = ["Retry"]

I = TypeVar("I")  # noqa: E741  # an item asked for, as R is its result
R = TypeVar("R")

_FIRST_PAUSE = 0.02
_MAX_PAUSE = 0.5


class Retry:
    """At most ``retries`` more tries of what failed with a transient error.

    Between tries it waits with full jitter (M. Brooker, "Exponential Backoff And Jitter", 2015):
    between nothing and 20 ms, 40 ms and so on to half a second. What is asked for is named by its
    content, so asking twice does no harm. Deadlines are the guard's.
    """

    def __init__(self, retries: int) -> None:
        self.retries = retries
        self._retrying = _retrying(retries) if retries else None

    async def batch(
        self, call: Callable[[Sequence[I]], Awaitable[list[R]]], items: Sequence[I]
    ) -> list[R]:
        """``call(items)``, repeated for the items whose results are transient errors.

        Results align with ``items``. Raises what ``call`` raises once that is final.
        """
        results: dict[int, R] = {}
        left = list(range(len(items)))

        async def attempt() -> None:
            answers = await call([items[i] for i in left])
            results.update(zip(left, answers, strict=True))
            left[:] = [i for i in left if _is_transient(results[i])]
            if left:
                raise _SomeFailed(f"{len(left)} of {len(items)} items failed for the moment")

        try:
            await self.call(attempt)
        except _SomeFailed:
            pass  # the last answer is an error; it is among the results
        return [results[i] for i in range(len(items))]

    async def call(self, call: Callable[[], Awaitable[R]]) -> R:
        """``call()``, repeated while it raises a transient error. Raises the last one."""
        try:
            return await call()
        except BackendError as exc:
            if self._retrying is None or not exc.transient:
                raise
            failed: list[BackendError] = [exc]

        async def again() -> R:
            if failed:
                raise failed.pop()  # the first try: what succeeds at once needs none of this
            return await call()

        return await self._retrying(again)


class _SomeFailed(BackendError):  # noqa: N818  # never seen outside
    """Some items of a batch failed for the moment."""

    transient = True


def _is_transient(answer: object) -> bool:
    return isinstance(answer, BackendError) and answer.transient


def _retrying(retries: int) -> AsyncRetrying:
    # Imported when a cache opens a lower tier: importing kvlayer stays light, and at the first
    # error a process may have no descriptor left to import with.
    from tenacity import (
        AsyncRetrying,
        retry_if_exception,
        stop_after_attempt,
        wait_random_exponential,
    )

    return AsyncRetrying(
        stop=stop_after_attempt(1 + retries),
        wait=wait_random_exponential(multiplier=_FIRST_PAUSE, max=_MAX_PAUSE),
        retry=retry_if_exception(_is_transient),
        reraise=True,
    )
