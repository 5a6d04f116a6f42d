"""Batches of objects between memory and one backend: framed, verified, landed one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from kvlayer.abc.backend import (
    Backend,
    Hit,
    Miss,
    Read,
    ReadResult,
    Version,
    Write,
    WriteResult,
)
from kvlayer.codec.frame import FrameError
from kvlayer.errors import BackendError
from kvlayer.identity.keys import Encoding, ObjectKey, ObjectName
from kvlayer.memory.arena import Arena
from kvlayer.results import Cause
from kvlayer.runtime.foreign import awaited, words
from kvlayer.tier.guard.retry import Retry
from kvlayer.tier.planner.copies import copy_of
from kvlayer.tier.transfer.batch import Job
from kvlayer.tier.transfer.checks import Checks
from kvlayer.tier.transfer.encodings import Coding
from kvlayer.tier.transfer.faults import fault_of

__all__ = ["Arenas", "OtherVersion", "Transfers"]


class Arenas(NamedTuple):
    """The scratch of a slab, by direction: neither can take it from the other."""

    reads: Arena
    writes: Arena


class OtherVersion(NamedTuple):
    """Which bytes were read, where they lay in another encoding than the tier writes."""

    encoding: Encoding
    version: Version


class Transfers:
    """Carries out the batches of one backend. What it is lent of an arena is back when one ends.

    It writes the first of ``codings``, and reads all of them in their order.
    """

    def __init__(
        self,
        backend: Backend,
        retry: Retry,
        arenas: Arenas,
        checks: Checks,
        *,
        codings: Sequence[Coding],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        build: str,
    ) -> None:
        self._backend = backend
        self._retry = retry
        self._arenas = arenas
        self._checks = checks
        self._codings = codings
        self._clock = clock
        self._wall_clock = wall_clock
        self._build = build

    async def read(self, jobs: list[Job]) -> list[Job]:
        """Bring objects and end their jobs; those there is no scratch for now are returned."""
        sizes = [
            max(coding.read_scratch(job.payload, copies=job.copies) for coding in self._codings)
            for job in jobs
        ]
        jobs, left = await self._equipped(self._arenas.reads, jobs, sizes)
        asked, missed = jobs, list[Job]()
        for number, coding in enumerate(self._codings):  # as it is said, which is nearly all
            some = [job for job in asked if self._said(job) == number]
            missed += await self._read(coding, some) if some else []
        for number, coding in enumerate(self._codings):
            some = [job for job in missed if self._said(job) != number]
            still = await self._read(coding, some) if some else []
            missed = [job for job in missed if self._said(job) == number or job in still]
        jobs, now = missed, self._clock()
        for job in jobs:
            job.end(now, (Cause.VANISHED, "the tier no longer has it"))
        return left

    def _said(self, job: Job) -> int:
        """Which encoding to ask for first: as it is said, else as the tier writes."""
        return job.encoding - 1 if 0 < job.encoding <= len(self._codings) else 0

    async def _read(self, coding: Coding, jobs: list[Job]) -> list[Job]:
        """Bring what lies there in one encoding; returns the jobs of what does not."""
        loop, number = asyncio.get_running_loop(), self._codings.index(coding) + 1
        landing = _Landing(loop, self._clock, coding, number, is_alone=len(jobs) == 1)
        reads: list[Read] = []
        arriving: dict[int, Job] = {}
        for job in jobs:
            job.lends(coding.into(job))
            read = Read(self._name(coding, job.key), job.lent, landed=partial(landing.check, job))
            arriving[id(read)] = job
            reads.append(read)

        async def get(asked: Sequence[Read]) -> list[ReadResult]:
            # What has arrived is in use by now: it is not read again with what has not.
            todo = [read for read in asked if not arriving[id(read)].has_arrived]
            answers = await awaited(partial(self._backend.get, todo))
            found = dict(zip(map(id, todo), answers, strict=True))
            results: list[ReadResult] = []
            for read in asked:
                job, answer = arriving[id(read)], found.get(id(read))
                if answer is None or (job.has_arrived and not isinstance(answer, Hit)):
                    answer = Hit(job.landed_nbytes)
                results.append(answer)
            return results

        try:
            results = await self._retry.batch(get, reads)
        except BackendError as exc:
            results = [exc] * len(jobs)
        silent = [
            (job, result.nbytes)
            for job, result in zip(jobs, results, strict=True)
            if isinstance(result, Hit) and job.landed_nbytes < 0
        ]
        if silent:
            nbytes = sum(job.nbytes for job, _ in silent)
            await self._checks.run(partial(_check_all, landing, silent), nbytes, coding.at_once)
        missed: list[Job] = []
        now = self._clock()
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, Hit):
                job.version = self._version(coding, result)
                job.end(now, job.fault)
            elif isinstance(result, Miss):
                missed.append(job)
            else:
                job.end(now, fault_of(result))
        return missed

    def _name(self, coding: Coding, key: ObjectKey) -> ObjectKey:
        """What the backend is asked for: it knows itself what it writes, and is told the other."""
        return key if coding is self._codings[0] else ObjectName.made(key, coding.encoding)

    def _version(self, coding: Coding, hit: Hit) -> Version:
        return (
            hit.version
            if coding is self._codings[0]
            else OtherVersion(coding.encoding, hit.version)
        )

    async def write(self, jobs: list[Job]) -> list[Job]:
        """Put objects and end their jobs; those there is no scratch for now are returned."""
        coding = self._codings[0]
        sizes = [coding.write_scratch(job.payload, copies=job.copies) for job in jobs]
        jobs, left = await self._equipped(self._arenas.writes, jobs, sizes)
        nbytes = sum(job.nbytes for job in jobs)
        await self._checks.run(partial(self._encode_all, jobs), nbytes, coding.at_once)
        for job in jobs:
            if job.fault is not None:
                job.end(self._clock(), job.fault)
        jobs = [job for job in jobs if job.lent and not job.is_given_up]
        writes = [
            Write(
                job.key,
                job.lent,
                job.first_token,
                job.payload.tokens,
                job.retention,
                job.parent,
            )
            for job in jobs
        ]

        async def put(asked: Sequence[Write]) -> list[WriteResult]:
            return await awaited(partial(self._backend.put, asked))

        errors: list[WriteResult]
        try:
            errors = await self._retry.batch(put, writes) if writes else []
        except BackendError as exc:
            errors = [exc] * len(jobs)
        now = self._clock()
        for job, write, error in zip(jobs, writes, errors, strict=True):
            job.copy = copy_of(1, write.nbytes)
            job.end(now, None if error is None else fault_of(error))
        return left

    def _encode_all(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            with job.delivering() as may:
                if may and job.scratch is not None:
                    created = self._wall_clock()
                    try:
                        job.lent = self._codings[0].encode(job, created=created, build=self._build)
                    except Exception as exc:  # noqa: BLE001  # a codec's: it costs this object only
                        job.fault = Cause.TIER_DOWN, f"not coded: {words(exc)}"

    async def _equipped(
        self, arena: Arena, jobs: list[Job], sizes: list[int]
    ) -> tuple[list[Job], list[Job]]:
        """As many of ``jobs`` as there is scratch for, with it, and those that are left.

        Waits for the first's, holding none.
        """
        while jobs:
            if sizes[0] > arena.nbytes:
                detail = f"it needs {sizes[0]} bytes of scratch, of {arena.nbytes} there are"
                jobs[0].end(self._clock(), (Cause.NO_ROOM, detail))
                jobs, sizes = jobs[1:], sizes[1:]
                continue
            scratch = arena.take(sizes)
            if scratch is not None:
                assert jobs[0].batch is not None
                jobs[0].batch.equip(jobs, scratch)
                count = len(scratch.parts)
                return jobs[:count], jobs[count:]
            await arena.given_back()
        return [], []


@dataclass(slots=True, eq=False)
class _Landing:
    """Looks at what a batch brings, on the threads that bring it, and wakes who waits for it."""

    loop: asyncio.AbstractEventLoop
    clock: Callable[[], float]
    coding: Coding
    number: int
    """The coding's, among those of the tier."""
    is_alone: bool
    """One object: it ends with its batch."""
    ready: list[Job] = field(default_factory=list[Job])
    is_due: bool = False

    def check(self, job: Job, nbytes: int) -> None:
        """On any thread: verify one object, and deliver it. Never raises."""
        fault: tuple[Cause, str] | None = None
        try:
            self.coding.deliver(job, nbytes)
        except FrameError as exc:
            fault = exc.cause, exc.detail
        except Exception as exc:  # noqa: BLE001  # a backend's thread must not die of ours
            fault = Cause.TIER_DOWN, words(exc)  # no evidence against the object
        job.fault = fault
        job.copy = copy_of(self.number, nbytes)
        job.landed_nbytes = nbytes
        if fault is None and not self.is_alone:
            self.ready.append(job)
            if not self.is_due:
                self.is_due = True
                self.loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self.is_due = False  # first: what is added from now on is told by the next call
        ready, self.ready = self.ready, []
        now = self.clock()
        for job in ready:
            job.end(now, None)


def _check_all(landing: _Landing, silent: Sequence[tuple[Job, int]]) -> None:
    for job, nbytes in silent:
        landing.check(job, nbytes)
