"""A worker's orders: begun with the step that brings them, answered with a later one.

They run on a loop of the rank's own, in a thread that is there before the first step. A step never
waits for them: the scheduler holds the blocks that they read or fill until they were answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np

from kvlayer import KVView
from kvlayer.api.rank_worker import RankWorker
from kvlayer.runtime.job import Job
from kvlayer.runtime.loop_thread import LoopThread
from kvlayer.tier.messages import Task
from kvlayer_vllm.device_order import Queued
from kvlayer_vllm.hands import given_up
from kvlayer_vllm.layouts import RankLayout
from kvlayer_vllm.messages import RankOrder
from kvlayer_vllm.ranks import check_agrees

__all__ = ["Orders"]


class _UnderWay(NamedTuple):
    order: RankOrder
    job: Job[bytes]


class Orders:
    """What rank ``number`` was ordered and has not answered. ``own``: what it holds itself.

    Its thread starts with it. Used by one thread, the one that runs the engine's steps.
    """

    def __init__(self, number: int, own: RankLayout) -> None:
        self._own = own
        self._thread: LoopThread[_Member] = LoopThread.start(
            partial(_Member.open, number, own), name=f"kvlayer-rank-{number}"
        )
        self._joining: Job[str] | None = None
        self._under_way: list[_UnderWay] = []
        self._given_up: list[bytes] = []

    def join(self, greeting: bytes, share: RankLayout) -> None:
        """Begin to join the cache as the rank that the scheduler takes this one for.

        Orders may follow at once. They fail where it cannot join: see :attr:`why_not`.
        """
        self._joining = self._thread.submit(_Member.join, greeting, share)

    @property
    def why_not(self) -> str:
        """Why it cannot join the cache; empty while nothing speaks against it."""
        if self._joining is None or not self._joining.done() or self._joining.cancelled():
            return ""
        return self._joining.result()

    def begin(
        self,
        order: RankOrder,
        slots: Sequence[bytes],
        caches: list[list[Any]],
        behind: Queued,
    ) -> None:
        """Begin to carry out ``order`` between these slots of ``caches`` and host memory.

        The copies follow ``behind`` on the device.
        """
        job = self._thread.submit(_Member.carry_out, order.order, slots, caches, behind)
        self._under_way.append(_UnderWay(order, job))

    def give_up(self, order: RankOrder) -> None:
        """An order that has not begun is not carried out."""
        self._given_up.append(_not_done(order, "the worker may not, or its hook has failed"))

    def rest(self, seconds: float) -> None:
        """Let an engine rest that computes nothing: until an order has ended, at most so long."""
        if self._under_way:
            wait([each.job for each in self._under_way], seconds, FIRST_COMPLETED)
        else:
            time.sleep(seconds)

    def wait(self) -> None:
        """Until none is under way, well or not: as long as copying takes."""
        wait([each.job for each in self._under_way])

    def answers(self) -> list[bytes]:
        """The completions that nobody has taken yet."""
        found, self._given_up = self._given_up, []
        left: list[_UnderWay] = []
        for each in self._under_way:
            if each.job.done():
                found.append(_answer(each))
            else:
                left.append(each)
        self._under_way = left
        return found

    def close(self) -> None:
        """Leave: what is under way is cut short. Idempotent."""
        self._thread.close()


def _answer(ended: _UnderWay) -> bytes:
    try:
        return ended.job.result()
    except CancelledError:
        return _not_done(ended.order, "the worker closes")
    except Exception as exc:  # noqa: BLE001  # no order for this rank: whoever sent it must hear it
        return _not_done(ended.order, f"{type(exc).__name__}: {exc}")


def _not_done(order: RankOrder, why: str) -> bytes:
    return given_up(Task.from_bytes(order.order), why)


class _Member:
    """This process as one of the cache's ranks, on its loop."""

    def __init__(self, number: int, own: RankLayout, resources: AsyncExitStack) -> None:
        self._number = number
        self._own = own
        self._resources = resources
        self._has_tried = asyncio.Event()
        self._rank: RankWorker | None = None
        self._why_not = ""

    @classmethod
    @asynccontextmanager
    async def open(cls, number: int, own: RankLayout) -> AsyncGenerator[Self]:
        async with AsyncExitStack() as resources:
            yield cls(number, own, resources)

    async def join(self, greeting: bytes, share: RankLayout) -> str:
        """Why it cannot; empty where it has."""
        try:
            check_agrees(self._own, share)
            opening = RankWorker.open(
                greeting, share.layout, self._number, make_stager=self._own.make_stager()
            )
            self._rank = await self._resources.enter_async_context(opening)
        except Exception as exc:  # noqa: BLE001  # whatever it is: this rank moves nothing
            self._why_not = f"rank {self._number} cannot join the cache: {exc}"
        finally:
            self._has_tried.set()
        return self._why_not

    async def carry_out(
        self, order: bytes, slots: Sequence[bytes], caches: list[list[Any]], behind: Queued
    ) -> bytes:
        await self._has_tried.wait()
        if self._rank is None:
            return given_up(Task.from_bytes(order), self._why_not)
        by_group = [np.frombuffer(each, np.int64) for each in slots]
        view = behind.followed_by(KVView(caches, by_group))
        return await self._rank.carry_out(order, view)
