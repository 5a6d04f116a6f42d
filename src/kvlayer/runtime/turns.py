"""Work in steps on a loop: others get their turn between two of them."""

from __future__ import annotations

import asyncio
from typing import TypeVar, cast

from kvlayer._steps import Steps, finish

__all__ = ["after_a_turn", "in_turns", "soon", "to_the_end"]

T = TypeVar("T")


async def in_turns(steps: Steps[T]) -> T:
    """Do it step by step. Cancelled, it closes the steps: they undo what they have done."""
    try:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return cast("T", end.value)
            await asyncio.sleep(0)
    finally:
        steps.close()


async def to_the_end(steps: Steps[T]) -> T:
    """Do all of it, step by step. Being cancelled meanwhile is told when it is done."""
    cancelled: asyncio.CancelledError | None = None
    try:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                if cancelled is not None:
                    raise cancelled from None
                return cast("T", end.value)
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError as exc:
                cancelled = exc
    finally:
        finish(steps)  # the coroutine was closed: nobody gives it another turn


def after_a_turn(steps: Steps[T]) -> Steps[T]:
    """The same steps, and before them a turn for others."""
    yield
    return (yield from steps)


def soon(steps: Steps[object]) -> None:
    """Do the first step now, and the others in the loop's next turns, while nobody waits.

    What they raise goes to the loop's exception handler.
    """
    try:
        next(steps)
    except StopIteration:
        return
    asyncio.get_running_loop().call_soon(soon, steps)
