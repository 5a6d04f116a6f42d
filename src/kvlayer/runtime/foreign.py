"""Other people's code, called in one place: what it raises costs its owner, never the caller.

Sinks, callbacks, policies and backends come from elsewhere and may raise anything. ``SystemExit``
is contained inside the coroutine, because asyncio raises it again out of the loop, where it would
end everybody's work. ``KeyboardInterrupt`` is the user's and passes. Code that is awaited is
bounded by whoever awaits it; code that is called cannot be: it is measured, and reported when it
held the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from kvlayer.errors import ForeignError
from kvlayer.results import ForeignCost

__all__ = ["Foreign", "awaited", "bounded", "contained", "words"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_SLOW_SECONDS = 0.05
"""A call that holds the loop for longer is reported: engines plan whole steps in less."""
_MAX_WORDS = 300
_GRACE_SECONDS = 1.0
"""What code that is told to stop has to do so; then it is left behind."""


def words(error: BaseException) -> str:
    """An error in one bounded line; also where its own ``__str__`` raises."""
    try:
        text = str(error)
    except BaseException as exc:  # noqa: BLE001  # foreign code, too
        text = f"(its text raised {type(exc).__name__})"
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _MAX_WORDS else f"{text[:_MAX_WORDS]}..."


def contained(call: Callable[[], T]) -> T:
    """``call()``. Raises ``Exception`` and ``KeyboardInterrupt`` only; see :func:`awaited`."""
    try:
        return call()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as exc:
        raise ForeignError(words(exc)) from exc


async def awaited(call: Callable[[], Awaitable[T]]) -> T:
    """``await call()``, in this task. Raises ``Exception`` and ``KeyboardInterrupt`` only.

    ``CancelledError`` is raised when this task was cancelled; one that the code made up is a
    :class:`ForeignError`, as is everything else that is no ``Exception``.
    """
    task = asyncio.current_task()
    try:
        return await call()
    except (Exception, KeyboardInterrupt):
        raise
    except asyncio.CancelledError as exc:
        if task is None or task.cancelling():
            raise
        raise ForeignError(words(exc)) from exc
    except GeneratorExit as exc:
        if not _runs(task):
            raise  # the coroutine is being closed: nobody is left to be told
        raise ForeignError(words(exc)) from exc
    except BaseException as exc:
        raise ForeignError(words(exc)) from exc


async def bounded(call: Callable[[], Awaitable[T]], seconds: float) -> T:
    """:func:`awaited`, in a task of its own, for at most ``seconds``; then ``TimeoutError``.

    Also where the code refuses to be cancelled: it is cancelled, has a second to end, and goes on
    unheard then. For code that was lent nothing. Cancelling the caller has the same end.
    """
    task = asyncio.ensure_future(awaited(call))
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if done:
            return _result(task)
        raise TimeoutError(f"not done within {seconds:g} s")
    finally:
        if not task.done():
            task.cancel()
            await _grace(task)


def _result(task: asyncio.Task[T]) -> T:
    if task.cancelled():  # by somebody else: this call goes on
        raise ForeignError("CancelledError")
    return task.result()


async def _grace(task: asyncio.Task[Any]) -> None:
    task.add_done_callback(_unheard)
    until = asyncio.get_running_loop().time() + _GRACE_SECONDS
    cancelled = False
    while not task.done() and (left := until - asyncio.get_running_loop().time()) > 0:
        try:
            await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError:  # asked again: it cannot be any faster
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


def _unheard(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # nobody waits for it any more


def _runs(task: asyncio.Task[object] | None) -> bool:
    try:
        return task is not None and asyncio.current_task() is task
    except RuntimeError:
        return False


class Foreign:
    """Calls other people's functions for one cache, and counts what that costs. Any thread."""

    def __init__(self) -> None:
        self._costs: dict[str, ForeignCost] = {}

    def costs(self) -> dict[str, ForeignCost]:
        """By kind of code: ``sink``, ``on_gathered``, ``on_layer``."""
        return dict(self._costs)

    def call(
        self, what: str, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        """Call a function whose answer nobody needs; whether it returned.

        What it raises is logged and counted, ``KeyboardInterrupt`` excepted: that passes.
        """
        began = perf_counter()
        error: BaseException | None = None
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001  # the named boundary: see the module's text
            error = exc
        self._count(what, perf_counter() - began, error)
        return error is None

    def _count(self, what: str, seconds: float, error: BaseException | None) -> None:
        before = self._costs.get(what, ForeignCost())
        longest = max(before.longest_seconds, seconds)
        self._costs[what] = ForeignCost(
            before.calls + 1, before.errors + (error is not None), longest
        )
        errors = self._costs[what].errors
        if error is not None and not errors & (errors - 1):  # the 1st, 2nd, 4th: no flood
            _log.error("%s raised %s", what, words(error), exc_info=error)
        if seconds > max(_SLOW_SECONDS, 2 * before.longest_seconds):
            _log.warning("%s held the thread that called it for %.3f s", what, seconds)
