"""Objects on their way to or from one tier, together: what asks at once travels in one call.

A :class:`Job` is one object and the memory of whoever calls. Jobs that are added in one turn of the
loop are carried out in batches bounded in number and bytes; each lands by itself, so that nobody
waits for the last object of a batch. Cancelling a job frees the waiter once its memory is out of
use, which is when the batch has ended or the object has landed; a batch whose jobs were all
cancelled is cancelled, too.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from threading import Lock
from typing import Any, TypeAlias

from kvlayer._foreign import words
from kvlayer.abc.backend import Version
from kvlayer.keys import ObjectKey
from kvlayer.memory.arena import Scratch
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.retention import ORDINARY, Retention
from kvlayer.tier.messages import Outcome

__all__ = ["MAX_ITEMS", "MAX_NBYTES", "Batcher", "Job", "Lending"]

MAX_ITEMS = 16
MAX_NBYTES = 8 << 20
"""Of one batch, in payload bytes; a larger object travels alone."""


class Lending(Enum):
    """How long memory is lent."""

    HELD = "held"
    """Until the job lets go of it: it is ours, or the lender waits."""
    CALL = "call"
    """For the call: it is used for something else the moment the caller has an answer or leaves."""


@dataclass(slots=True, eq=False)
class Job:
    """One object: its name, shape and position, and memory of ``payload.nbytes`` in all."""

    key: ObjectKey
    payload: Payload
    first_token: int
    regions: tuple[memoryview, ...]
    lending: Lending
    began: float
    done: asyncio.Future[Outcome]
    retention: Retention = ORDINARY
    copies: bool = False
    """Whether the backend is lent scratch instead of ``regions``: the caller may leave any time."""
    slot: memoryview | None = None
    """A view of ``regions`` that was made for this job, and ends with it."""
    batch: _Batch | None = None
    scratch: Scratch | None = None
    """From the arena, until the batch has ended."""
    lent: tuple[memoryview, ...] = ()
    """What the backend is lent: views of our own, which end with the batch."""
    landed_nbytes: int = -1
    """How many bytes arrived and were looked at, on any thread; -1: none."""
    fault: tuple[Cause, str] | None = None
    """What was wrong with them."""
    version: Version = None
    parent: bytes = b""
    """The end hash of what comes right before it in its prompt, where that is known."""
    _is_given_up: bool = False
    _copying: Lock | None = None
    _freed: asyncio.Future[None] | None = None

    def __post_init__(self) -> None:
        if self.copies:
            self._copying = Lock()

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes

    @property
    def is_given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._is_given_up

    @property
    def has_arrived(self) -> bool:
        """Whether its bytes are there and right."""
        return self.landed_nbytes >= 0 and self.fault is None

    def end(self, now: float, fault: tuple[Cause, str] | None) -> None:
        """Say how it went, unless that is known."""
        if self.done.done():
            return
        cause, detail = fault or (None, "")
        nbytes = 0 if fault else self.nbytes
        seconds = now - self.began
        self.done.set_result(Outcome(self.key, cause, detail, nbytes, seconds, self.version))

    @contextmanager
    def delivering(self) -> Generator[bool]:
        """On a thread: whether the caller's memory may still be used. It stays so inside."""
        lock = self._copying
        if lock is None:
            yield True
            return
        with lock:
            yield not self._is_given_up

    def free(self) -> None:
        """Nobody uses the memory any more: the batch has ended, or never began."""
        views = self.lent if self.slot is None else (*self.lent, self.slot)
        self.lent = ()
        for view in views:  # a backend that kept one cannot touch memory through it any more
            with suppress(BufferError):  # unless it has made something else of it
                view.release()
        if self.scratch is not None:
            self.scratch.give_back()
            self.scratch = None
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)

    async def outcome(self) -> Outcome:
        """Wait for it. Cancelled, it returns when the memory is the caller's again."""
        try:
            return await self.done
        except CancelledError:
            self._give_up()
            if self.batch is None:
                self.free()
            else:
                self.batch.given_up()
                if not self.copies:
                    await self._until_freed(self.batch)
            raise
        finally:
            self.regions = ()

    def _give_up(self) -> None:
        if self._copying is None:
            self._is_given_up = True
            return
        with self._copying:  # held for as long as it takes to copy one payload
            self._is_given_up = True

    async def _until_freed(self, batch: _Batch) -> None:
        while not batch.has_ended:
            if self._freed is None or self._freed.done():
                self._freed = asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait({self._freed})
            except CancelledError:
                continue  # asked again: it cannot be any faster


Run: TypeAlias = Callable[[list[Job]], Coroutine[Any, Any, list[Job]]]


class _Batch:
    """Jobs that are carried out together, and the task that does it."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.has_ended = False
        self._task: asyncio.Task[list[Job]] | None = None
        for job in jobs:
            job.batch = self

    def start(
        self,
        work: Coroutine[Any, Any, list[Job]],
        ended: Callable[[asyncio.Task[list[Job]]], None],
    ) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(ended)

    def given_up(self) -> None:
        """A job was. When all were, what is under way is of no use."""
        if (
            self._task is not None
            and not self.has_ended
            and all(job.is_given_up or job.done.done() for job in self.jobs)
        ):
            self._task.cancel()


class Batcher:
    """Gathers the jobs of one tier and direction into batches.

    ``run`` carries out jobs, ends each it takes, and returns those there was no room for.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._waiting: deque[Job] = deque()
        self._running: dict[_Batch, None] = {}
        self._is_due = False

    def add(self, job: Job) -> None:
        self._waiting.append(job)
        self._soon()

    def _soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        self._is_due = False
        while jobs := self._next():
            batch = _Batch(jobs)
            self._running[batch] = None
            batch.start(self._run(jobs), partial(self._ended, batch))

    def _next(self) -> list[Job]:
        jobs: list[Job] = []
        nbytes = 0
        while self._waiting and len(jobs) < MAX_ITEMS:
            job = self._waiting[0]
            if job.is_given_up:
                self._waiting.popleft()
                continue
            nbytes += job.nbytes
            if jobs and nbytes > MAX_NBYTES:
                break
            jobs.append(self._waiting.popleft())
        return jobs

    def _ended(self, batch: _Batch, task: asyncio.Task[list[Job]]) -> None:
        """A callback, because a task that is cancelled before it begins runs nothing of its own."""
        del self._running[batch]
        batch.has_ended = True
        left: list[Job] = []
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            for job in batch.jobs:
                job.done.cancel()  # of those that are not done nobody waits
        elif error is not None:
            for job in batch.jobs:
                job.end(job.began, (Cause.TIER_DOWN, words(error)))
        else:
            left = task.result()
        for job in reversed(left):
            job.batch = None
            self._waiting.appendleft(job)
        for job in batch.jobs:
            if job.batch is batch:
                job.free()
        if left:
            self._soon()
