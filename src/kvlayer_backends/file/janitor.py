"""The one process that counts a shared directory, makes room in it and clears up after the dead."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from threading import Event
from typing import TypeAlias

from kvlayer._offload import Offload
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.errors import BackendError
from kvlayer.keys import ObjectKey
from kvlayer_backends.file.ledger import Eviction, Ledger, Victim
from kvlayer_backends.file.locks import FileLock
from kvlayer_backends.file.objects import ObjectFiles, Outcome
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.paths import Paths, Shard
from kvlayer_backends.file.quarantine import keep
from kvlayer_backends.file.scan import Visit, scan
from kvlayer_backends.file.scratch import reap

__all__ = ["Evicted", "Janitor"]

Evicted: TypeAlias = Callable[[list[tuple[ObjectKey, int]], str], None]
"""Called on the loop with what was evicted (key, bytes) and the policy's name."""

_log = logging.getLogger(__name__)
_SLICE = 1_000  # objects taken into the books before the loop gets a turn


class Janitor:
    """Elected by ``flock``; every process has one and at most one of them is in office.

    What the office's own process writes is counted before it is written, so the capacity is exact
    there. What others write is found by the next pass, so between two passes the directory may
    exceed its capacity by what they wrote in one ``interval``, what they are writing and what a
    dead one left unfinished. Others' uses are noticed when their objects are about to be evicted.

    Use it on one loop. Everything blocking runs on ``pool``.
    """

    def __init__(
        self,
        paths: Paths,
        options: FileOptions,
        policy: Callable[[], EvictionPolicy],
        *,
        files: ObjectFiles,
        pool: Offload,
        on_evicted: Evicted,
    ) -> None:
        self._paths = paths
        self._options = options
        self._policy = policy
        self._files = files
        self._pool = pool
        self._on_evicted = on_evicted
        self._lock = FileLock(paths.janitor_lock)
        self._ledger: Ledger | None = None
        self._visits: dict[Shard, Visit] = {}
        self._recovered = asyncio.Event()
        self._recovered.set()
        self._passing = asyncio.Lock()
        self._making_room = asyncio.Lock()
        self._weighing = asyncio.Lock()
        self._given_back = asyncio.Event()
        self._stopping = Event()
        self._task: asyncio.Task[None] | None = None
        self._complaint = ""

    @property
    def ledger(self) -> Ledger | None:
        """What the directory holds, while in office."""
        return self._ledger

    def elect(self) -> None:
        """Take office if it is free. Blocking; before ``start`` only. Raises ``OSError``."""
        if self._lock.acquire():
            self._take_office()

    def start(self) -> None:
        """Begin passing every ``interval`` seconds, the first time at once."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def aclose(self) -> None:
        """Leave office. Idempotent."""
        self._stopping.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        self._leave_office()

    async def recovered(self) -> None:
        """Wait until the books are complete; at once for who is not in office."""
        await self._recovered.wait()

    # -- the passes ------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                await self.pass_()
                self._complaint = ""
            except Exception as exc:  # noqa: BLE001  # a task nobody awaits outlives any error
                if repr(exc) != self._complaint:
                    self._complaint = repr(exc)
                    _log.exception("file:// janitor of %s failed and goes on", self._paths.root)
            await asyncio.sleep(self._options.interval)

    async def pass_(self) -> None:
        """One round: stay or become janitor, clear up after the dead, count, evict down."""
        async with self._passing:
            ledger = await self._in_office()
            if ledger is None:
                return
            try:
                await self._pool.run(reap, self._paths)
                await self._count(ledger)
            finally:
                self._recovered.set()  # whatever happened: a put must not wait for ever
            async with self._making_room:
                error = await self._make_room(ledger, 0)
            if error is not None:
                raise error

    async def _in_office(self) -> Ledger | None:
        if self._ledger is not None:
            if await self._pool.run(self._lock.held):
                return self._ledger
            self._leave_office()  # the directory was deleted, and its lock with it
        with suppress(FileNotFoundError):
            if await self._pool.run(self._lock.acquire):
                self._take_office()
        return self._ledger

    def _take_office(self) -> None:
        self._ledger = Ledger(self._policy(), self._options.capacity)
        self._visits = {}
        self._recovered.clear()

    def _leave_office(self) -> None:
        self._ledger = None
        self._lock.release()
        self._recovered.set()
        self._given_back.set()

    async def _count(self, ledger: Ledger) -> None:
        ledger.begin_scan()
        try:
            seen = await self._pool.run(
                scan, self._paths, ledger.objects, self._visits, self._stopping.is_set
            )
            if not seen.complete:
                return
            for shard, present in seen.read.items():
                ledger.reconcile(shard, present)
                await asyncio.sleep(0)
            new = iter(seen.new)
            while batch := tuple(itertools.islice(new, _SLICE)):
                ledger.discover(batch)
                await asyncio.sleep(0)
            self._visits = seen.visits
            await self.weigh_quarantine()
        finally:
            ledger.end_scan()

    # -- room ------------------------------------------------------------------------------------

    def has_room(self, nbytes: int) -> bool:
        """Whether ``grant`` would neither wait nor evict, as far as is known now."""
        if not self._options.capacity:
            return True
        is_counted = self._recovered.is_set()
        return is_counted and (self._ledger is None or self._ledger.excess(nbytes) <= 0)

    async def grant(self, nbytes: int) -> Ledger | BackendError | None:
        """Make room for a write of ``nbytes`` and count them; give the answer to ``settle``.

        None when nobody counts here. Waits for recovery and for writes that hold all the room.
        """
        capacity = self._options.capacity
        if capacity and nbytes > capacity:
            return BackendError(
                f"file://: an object of {nbytes} bytes is larger than the capacity of "
                f"{capacity} bytes of {self._paths.root}",
                hint="raise capacity, or use smaller chunks",
            )
        if capacity:
            await self._recovered.wait()
        ledger = self._ledger
        if ledger is None:
            return None
        if capacity:
            async with self._making_room:
                error = await self._make_room(ledger, nbytes)
                if error is not None:
                    return error
                ledger.granted_nbytes += nbytes
        else:
            ledger.granted_nbytes += nbytes
        return ledger

    def settle(
        self, ledger: Ledger, key: ObjectKey, nbytes: int, used_ns: int, outcome: Outcome
    ) -> None:
        """End a grant: the object counts if it was created, or the room is free again."""
        ledger.granted_nbytes -= nbytes
        if outcome.created:
            ledger.create(key, nbytes, used_ns)
        elif outcome.found is not None:
            ledger.add(key, *outcome.found)
        self._given_back.set()

    async def _make_room(self, ledger: Ledger, nbytes: int) -> BackendError | None:
        spared: dict[ObjectKey, int] = {}
        candidates = 1
        try:
            while (excess := ledger.excess(nbytes)) > 0 and ledger is self._ledger:
                victims = ledger.take(excess, candidates)
                if victims:
                    eviction = await self._evict(ledger, victims, excess, spared)
                    if eviction.error is not None and not eviction.freed_nbytes:
                        return eviction.error
                    candidates = 2 * candidates if eviction.spared else 1
                elif any(key in ledger.objects for key in spared):
                    ledger.spare(spared)  # all are in use: the least recently used goes after all
                elif ledger.quarantined_nbytes:  # evidence never stands in the way of service
                    ledger.quarantined_nbytes = await self._pool.run(keep, self._paths, 0)
                elif ledger.granted_nbytes:
                    self._given_back.clear()
                    await self._given_back.wait()
                else:
                    return BackendError(
                        f"file://: no room in {self._paths.root}: the policy "
                        f"{ledger.policy.name!r} gives up none of {len(ledger)} objects"
                    )
            return None
        finally:
            ledger.spare(spared)

    async def _evict(
        self, ledger: Ledger, victims: list[Victim], excess: int, spared: dict[ObjectKey, int]
    ) -> Eviction:
        # An object is spared once per call, or busy readers elsewhere could stop all eviction.
        asked = [v._replace(used_ns=-1) if v.key in spared else v for v in victims]
        eviction = Eviction()
        try:
            await self._pool.run(self._files.evict, asked, excess, eviction)
        finally:
            ledger.settle(victims, eviction)
            spared.update((victim.key, used_ns) for victim, used_ns in eviction.spared)
            if eviction.gone:
                named = [(victim.key, victim.nbytes) for victim in eviction.gone]
                self._on_evicted(named, ledger.policy.name)
        return eviction

    # -- what the backend saw --------------------------------------------------------------------

    def used(self, path: Sequence[ObjectKey], stamps: Iterable[int]) -> None:
        """A path was used, root first."""
        if self._ledger is not None:
            self._ledger.use(path, stamps)

    def found(self, key: ObjectKey, nbytes: int, used_ns: int) -> None:
        """An object is there, whoever wrote it."""
        if self._ledger is not None:
            self._ledger.add(key, nbytes, used_ns)

    def lost(self, keys: Iterable[ObjectKey]) -> None:
        """Objects are not there any more."""
        if self._ledger is not None:
            for key in keys:
                self._ledger.forget(key)

    async def weigh_quarantine(self) -> None:
        """Trim the quarantine and count what it holds.

        One at a time: a slower and older count must not overwrite a newer one.
        """
        async with self._weighing:
            nbytes = await self._pool.run(keep, self._paths)
            if self._ledger is not None:
                self._ledger.quarantined_nbytes = nbytes
