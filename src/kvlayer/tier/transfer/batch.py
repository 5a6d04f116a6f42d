"""Objects on their way to or from one tier, together: what asks at once travels in one call.

A :class:`Job` is one object and the memory of whoever calls. Jobs that begin in one turn of the
loop are carried out in batches bounded in number and bytes; each lands by itself, so that nobody
waits for the last object of a batch. A job that is cancelled ends once its memory is out of use,
which is when the batch has ended or the object has landed; a batch whose jobs were all cancelled is
cancelled, too.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from functools import partial
from threading import Lock
from typing import Any, TypeAlias

from kvlayer.abc.backend import Version
from kvlayer.identity.keys import ObjectKey
from kvlayer.memory.arena import Scratch
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.retention import ORDINARY, Retention
from kvlayer.runtime.foreign import words
from kvlayer.tier.guard.tier_call import Ended
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


class Job:
    """One object: its name, shape and position, and memory of ``payload.body_nbytes`` or more.

    A ride (:class:`~kvlayer.tier.guard.tier_call.Ride`). ``memory()`` is asked for the regions when
    it begins; with ``is_ours`` they were made for this job, and end with it. With ``copies`` the
    backend is lent scratch instead: the caller may leave any time, or, while a thread copies or
    codes its object, as soon as that is done. The loop never waits for it.
    """

    __slots__ = (
        "_batcher",
        "_copying",
        "_ended",
        "_is_delivering",
        "_is_given_up",
        "_is_ours",
        "_loop",
        "_memory",
        "batch",
        "began",
        "copies",
        "copy",
        "encoding",
        "fault",
        "first_token",
        "is_over",
        "key",
        "landed_nbytes",
        "lent",
        "nbytes",
        "parent",
        "payload",
        "regions",
        "retention",
        "scratch",
        "version",
    )

    def __init__(
        self,
        batcher: Batcher,
        key: ObjectKey,
        payload: Payload,
        first_token: int,
        memory: Callable[[], tuple[memoryview, ...]],
        *,
        is_ours: bool,
        copies: bool,
        retention: Retention = ORDINARY,
        parent: bytes = b"",
        encoding: int = 0,
    ) -> None:
        self.key = key
        self.payload = payload
        self.nbytes = payload.nbytes
        self.first_token = first_token
        self.copies = copies
        self.retention = retention
        self.parent = parent
        """The end hash of what comes right before it in its prompt, where that is known."""
        self.began = 0.0
        """When its turn came, by the batcher's clock."""
        self.regions: tuple[memoryview, ...] = ()
        self.batch: _Batch | None = None
        self.scratch: memoryview | None = None
        """From the batch's, until that has ended."""
        self.lent: tuple[memoryview, ...] = ()
        """What the backend is lent: views of our own, which end with the batch."""
        self.landed_nbytes = -1
        """How many bytes arrived and were looked at, on any thread; -1: none."""
        self.fault: tuple[Cause, str] | None = None
        """What was wrong with them."""
        self.version: Version = None
        self.encoding = encoding
        """In which of the tier's encodings it is said to lie, from 1 on; 0: nobody said."""
        self.copy = 0
        """How it lies on the tier: see :mod:`kvlayer.tier.planner.copies`."""
        self.is_over = False
        """Whether it has said how it went."""
        self._batcher = batcher
        self._memory = memory
        self._is_ours = is_ours
        self._is_given_up = False
        self._is_delivering = False
        self._copying = Lock() if copies else None
        """Held to look at the two and to change them, never while anything is copied."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: Ended[Outcome] | None = None

    @property
    def is_given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._is_given_up

    @property
    def has_arrived(self) -> bool:
        """Whether its bytes are there and right."""
        return self.landed_nbytes >= 0 and self.fault is None

    # -- as a ride ---------------------------------------------------------------------------------

    def begin(self, ended: Ended[Outcome], /) -> None:
        """Travel with what else begins in this turn of the loop; see :meth:`Ride.begin`."""
        self.regions = self._memory()
        self._loop = asyncio.get_running_loop() if self.copies else None
        self._ended = ended
        self._batcher.add(self)

    def cancel(self) -> None:
        """Give it up. It is over when the memory is the caller's again."""
        if self._is_given_up or self.is_over:
            return  # asked again: it cannot be any faster
        is_busy = self._give_up()
        if self.batch is not None:
            self.batch.given_up()
        if (self.copies and not is_busy) or self.batch is None:
            asyncio.get_running_loop().call_soon(self.called_off)

    def _give_up(self) -> bool:
        """Whether a thread is at the caller's memory: it says when it is not any more."""
        if self._copying is None:
            self._is_given_up = True
            return False
        with self._copying:
            self._is_given_up = True
            return self._is_delivering

    async def outcome(self) -> Outcome:
        """Begin, and wait for it. Cancelled, it returns when the memory is the caller's again."""
        done: asyncio.Future[tuple[Outcome | None, BaseException | None]]
        done = asyncio.get_running_loop().create_future()
        was_cancelled = False
        self.begin(lambda outcome, error: done.set_result((outcome, error)))
        while not done.done():
            try:
                await asyncio.wait({done})
            except CancelledError:
                was_cancelled = True
                self.cancel()
        outcome, error = done.result()
        if was_cancelled or outcome is None:
            raise error or CancelledError()
        return outcome

    # -- for those who carry it out ----------------------------------------------------------------

    def end(self, now: float, fault: tuple[Cause, str] | None) -> None:
        """Say how it went, unless that is known. Its memory is out of use."""
        if self.is_over:
            return
        if self._is_given_up:
            self.called_off()
            return
        cause, detail = fault or (None, "")
        nbytes = 0 if fault else self.nbytes
        seconds = now - self.began
        copy = 0 if fault else self.copy
        self._over(Outcome(self.key, cause, detail, nbytes, seconds, self.version, copy), None)

    def called_off(self) -> None:
        """Say that it was cancelled, unless it has said something already."""
        if not self.is_over:
            self._over(None, CancelledError())

    def _over(self, outcome: Outcome | None, error: BaseException | None) -> None:
        self.is_over = True
        if self.batch is None:
            self.free()
        self.regions = self.regions if self._is_ours else ()
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(outcome, error)

    @contextmanager
    def delivering(self) -> Generator[bool]:
        """On a thread: whether the caller's memory may still be used. It stays so inside."""
        lock = self._copying
        if lock is None:
            yield True
            return
        with lock:
            may = self._is_delivering = not self._is_given_up
        try:
            yield may
        finally:
            with lock:
                self._is_delivering = False
                is_awaited = may and self._is_given_up
            if is_awaited and self._loop is not None:
                with suppress(RuntimeError):  # the loop has been closed: nobody waits there
                    self._loop.call_soon_threadsafe(self.called_off)

    def lends(self, views: tuple[memoryview, ...]) -> None:
        """Lend these for a read, in the place of what an earlier one was lent and has brought."""
        _release(self.lent)
        self.lent = views
        self.landed_nbytes, self.fault = -1, None

    def free(self) -> None:
        """Nobody uses the memory any more: the batch has ended, or never began."""
        views = (*self.lent, *self.regions) if self._is_ours else self.lent
        self.lent = self.regions = ()
        _release(views)
        self.scratch = None


def _release(views: Iterable[memoryview]) -> None:
    """A backend that kept one cannot touch memory through it, unless it has made more of it."""
    for view in views:
        with suppress(BufferError):
            view.release()


Run: TypeAlias = Callable[[list[Job]], Coroutine[Any, Any, list[Job]]]


class _Batch:
    """Jobs that are carried out together, and the task that does it."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.scratch: Scratch | None = None
        """From the arena, until it has ended."""
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

    def equip(self, jobs: Sequence[Job], scratch: Scratch) -> None:
        """Give each of the first of ``jobs`` its part of the batch's scratch."""
        self.scratch = scratch
        for job, part in zip(jobs, scratch.parts, strict=False):
            job.scratch = part

    def end(self) -> None:
        """Nobody uses what it was lent any more."""
        self.has_ended = True
        for job in self.jobs:
            if job.batch is self:
                job.free()
        if self.scratch is not None:
            self.scratch.give_back()
            self.scratch = None

    def given_up(self) -> None:
        """A job was. When all were, what is under way is of no use."""
        if (
            self._task is not None
            and not self.has_ended
            and all(job.is_given_up or job.is_over for job in self.jobs)
        ):
            self._task.cancel()


class Batcher:
    """Gathers the jobs of one tier and direction into batches.

    ``run`` carries out jobs, ends each it takes, and returns those there was no room for.
    """

    def __init__(self, run: Run, clock: Callable[[], float]) -> None:
        self._run = run
        self._clock = clock
        self._waiting: deque[Job] = deque()
        self._running: dict[_Batch, None] = {}
        self._is_due = False

    def add(self, job: Job) -> None:
        """Carry a job out with what else is added in this turn of the loop."""
        job.began = self._clock()
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
        error = None if task.cancelled() else task.exception()
        left = [] if task.cancelled() or error is not None else task.result()
        for job in left:
            job.batch = None
        batch.end()
        for job in reversed(left):
            if job.is_given_up:
                job.called_off()
            else:
                self._waiting.appendleft(job)
        if left:
            self._soon()
        for job in batch.jobs:
            if job.batch is not batch or job.is_over:
                continue
            if task.cancelled() or job.is_given_up:
                job.called_off()
            else:
                detail = "it was not carried out" if error is None else words(error)
                job.end(self._clock(), (Cause.TIER_DOWN, detail))
