"""Runs a coroutine on a loop and a thread of its own, so that a hang is reported, not suffered."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

from kvlayer.testing.promise import Hung

__all__ = ["Patience", "run_bounded", "seconds"]

T = TypeVar("T")

Patience: TypeAlias = Callable[[threading.Event], bool]
"""Waits for the event and says whether it came; False: the work is given up."""

_SLICE_SECONDS = 0.25
_GRACE_SECONDS = 2.0  # what is given up is cancelled, and may clear up behind itself


def seconds(limit: float) -> Patience:
    """The patience of a clock that stands still while the whole process does.

    Counted in short waits: a machine that was paused for a minute has not waited for an answer.
    """

    def wait(done: threading.Event) -> bool:
        left = limit
        while left > 0:
            if done.wait(min(left, _SLICE_SECONDS)):
                return True
            left -= _SLICE_SECONDS
        return done.is_set()

    return wait


def run_bounded(work: Callable[[], Coroutine[Any, Any, T]], patience: Patience) -> T:
    """What ``asyncio.run(work())`` would answer, in bounded time.

    Raises what the work raises, and :class:`Hung` when patience has ended. Then the work is
    cancelled; if it does not end on that either, its thread is left behind, a daemon.
    """
    running = _Running(work)
    thread = threading.Thread(target=running, name="kvlayer-promise", daemon=True)
    thread.start()
    if not patience(running.ended):
        where = running.where(thread)
        running.cancel()
        running.ended.wait(_GRACE_SECONDS)
        raise Hung(where)
    thread.join()
    return running.result()


class _Running(Generic[T]):
    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._answer: Callable[[], T] | None = None
        self.ended = threading.Event()

    def __call__(self) -> None:
        try:
            answer = asyncio.run(self._main())
        except BaseException as exc:  # noqa: BLE001  # carried to the thread that waits, all of it
            self._answer = partial(_raise, exc)
        else:
            self._answer = lambda: answer
        finally:
            self.ended.set()

    async def _main(self) -> T:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        return await self._work()

    def result(self) -> T:
        assert self._answer is not None
        try:
            return self._answer()
        finally:
            self._answer = None  # an exception and its traceback end with who hears it

    def cancel(self) -> None:
        if self._loop is None or self._task is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._task.cancel)
        except RuntimeError:
            pass  # it ended just now, and closed its loop

    def where(self, thread: threading.Thread) -> str:
        """The stack of the thread, and of every task of its loop."""
        lines: list[str] = []
        frame = sys._current_frames().get(thread.ident or 0)  # pyright: ignore[reportPrivateUsage]  # there is no other
        if frame is not None:
            lines += traceback.format_stack(frame)[-3:]
        if self._loop is not None:
            for task in asyncio.all_tasks(self._loop):
                lines += [f"task {task.get_name()}:\n", *_stack(task)]
        return "".join(lines).rstrip()


def _stack(task: asyncio.Task[Any]) -> list[str]:
    """Down to the innermost coroutine: ``Task.get_stack`` ends at the outermost."""
    lines: list[str] = []
    awaited: Any = task.get_coro()
    while (frame := _of("frame", awaited)) is not None:
        lines += traceback.format_stack(frame, limit=1)
        awaited = _of("await", awaited)
        if type(awaited).__name__.startswith("async_generator_"):
            # ``async with`` over a generator: what is awaited does not say whose step it is.
            awaited = getattr(frame.f_locals.get("self"), "gen", None)
    return lines


def _of(what: str, awaited: Any) -> Any:
    """The frame of a coroutine or of an asynchronous generator, or what it awaits."""
    return getattr(awaited, f"cr_{what}", None) or getattr(awaited, f"ag_{what}", None)


def _raise(error: BaseException) -> Any:
    raise error
