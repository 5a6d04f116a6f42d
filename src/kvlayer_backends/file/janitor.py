"""The one process that counts a shared directory, makes room in it and clears up after the dead."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from time import monotonic, time
from typing import ParamSpec, TypeAlias, TypeVar

from kvlayer._offload import Offload
from kvlayer.abc.backend import Write
from kvlayer.abc.policy import PolicyMaker
from kvlayer.errors import BackendError, NoRoomError
from kvlayer.keys import ObjectKey
from kvlayer_backends.file.ledger import Eviction, Ledger, Victim
from kvlayer_backends.file.objects import ObjectFiles, Outcome
from kvlayer_backends.file.office import Office
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.paths import Paths, Shard
from kvlayer_backends.file.pulse import Pulse
from kvlayer_backends.file.quarantine import keep
from kvlayer_backends.file.scan import Scan, Visit
from kvlayer_backends.file.scratch import reap
from kvlayer_backends.file.sweep import sweep

__all__ = ["Evicted", "Janitor"]

Evicted: TypeAlias = Callable[[list[tuple[ObjectKey, int]], str], None]
"""Called on the loop with what was evicted (key, bytes) and the policy's name."""

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)
_SLICE = 1_000  # objects taken into the books before the loop gets a turn
_SLACK = 16  # while a directory is listed, one part in so many of the capacity may be exceeded


class Janitor:
    """Elected by ``flock``; every process has one and at most one of them is in office.

    What the office's own process writes is counted before it is written, so the capacity is exact
    there once the directory is listed. What others write is found by the next pass, so between two
    passes the directory may exceed its capacity by what they wrote in one ``interval``, what they
    are writing and what a dead one left unfinished. Others' uses are noticed when their objects are
    about to be evicted.

    Who takes office lists the directory, and grants writes meanwhile: against what the last janitor
    had counted at the end of its last pass, what was listed so far, and its own writes. Until it is
    listed the directory may exceed its capacity by a sixteenth of it (writes beyond that wait), and
    by what was written since that pass when its janitor was killed.

    Use it on one loop. Everything blocking runs on ``pool``.
    """

    def __init__(
        self,
        paths: Paths,
        options: FileOptions,
        policy: PolicyMaker,
        *,
        files: ObjectFiles,
        pulse: Pulse,
        pool: Offload,
        on_evicted: Evicted,
    ) -> None:
        self._paths = paths
        self._options = options
        self._policy = policy
        self._files = files
        self._pulse = pulse
        self._pool = pool
        self._on_evicted = on_evicted
        self._office = Office(paths.janitor_lock)
        self._ledger: Ledger | None = None
        self._visits: dict[Shard, Visit] = {}
        self._recovered = asyncio.Event()
        self._recovered.set()
        self._passing = asyncio.Lock()
        self._making_room = asyncio.Lock()
        self._weighing = asyncio.Lock()
        self._given_back = asyncio.Event()
        self._counting = asyncio.Lock()
        self._counts = 0
        self._scan: Scan | None = None
        """The last one, until its empty folders have been removed."""
        self.left_unfinished = 0
        """Files that dead processes had begun and this one has cleared away."""
        self._task: asyncio.Task[None] | None = None
        self._complaint = ""

    @property
    def ledger(self) -> Ledger | None:
        """What the directory holds, while in office."""
        return self._ledger

    def elect(self) -> None:
        """Take office if it is free. Blocking; before ``start`` only. Raises ``OSError``."""
        expected_nbytes = self._office.take()
        if expected_nbytes is not None:
            self._take_office(expected_nbytes)

    def start(self) -> None:
        """Begin passing every ``interval`` seconds, the first time at once."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def aclose(self) -> None:
        """Leave office. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
            await self._save_totals()
        self._leave_office()

    def abandon(self) -> None:
        """Leave office without waiting for a thread that hangs, and without writing anything."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._leave_office()

    def resign(self) -> None:
        """Give the office back. Blocking; from any thread, and only where nothing was started."""
        self._office.leave()

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
            errors: list[OSError] = []
            for step in (self._reap, self.count, self._evict_down, self._tidy, self._save_totals):
                try:
                    await step()
                except OSError as exc:  # what one step could not see is no reason to skip the rest
                    errors.append(exc)
                finally:
                    if step == self.count:
                        self._recovered.set()  # whatever happened: a put must not wait for ever
            if errors:
                raise errors[0]

    async def _evict_down(self) -> None:
        ledger = self._ledger
        while ledger is not None and ledger is self._ledger and ledger.excess() > 0:
            async with self._making_room:  # slice by slice: writes get their turns
                error = await self._make_room(ledger, 0, slices=1)
            if error is not None:
                raise error

    async def _change(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what changes the disk on a thread, once it takes changes. Raises ``OSError``."""

        def checked() -> T:
            self._pulse.check()
            return work(*args, **kwargs)

        return await self._pool.run(checked)

    async def _in_office(self) -> Ledger | None:
        if self._ledger is not None:
            if await self._pool.run(self._office.is_held):
                return self._ledger
            self._leave_office()  # the directory was deleted, and its lock with it
        with suppress(FileNotFoundError):
            expected_nbytes = await self._change(self._office.take)
            if expected_nbytes is not None:
                self._take_office(expected_nbytes)
        return self._ledger

    def _take_office(self, expected_nbytes: int) -> None:
        self._ledger = Ledger(self._policy, self._options.capacity, monotonic)
        self._ledger.unlisted_nbytes = expected_nbytes
        self._visits, self._scan = {}, None
        self._recovered.clear()

    def _leave_office(self) -> None:
        self._ledger = None
        self._office.leave()
        self._recovered.set()
        self._given_back.set()

    async def _reap(self) -> None:
        unfinished = await self._change(reap, self._paths)
        if unfinished:
            self.left_unfinished += unfinished
            _log.warning(
                "file:// %s: left unfinished by a process that died: %d objects",
                self._paths.root,
                unfinished,
            )

    async def count(self) -> None:
        """Bring the books up to what lies in the directory now; nothing when not in office.

        Who comes while that is being done waits for its end. Raises ``OSError`` when something
        could not be read; what was known of it stays.
        """
        before = self._counts
        async with self._counting:
            ledger = self._ledger
            if ledger is None or self._counts != before:
                return
            scan = self._scan = Scan(self._paths, ledger, self._visits)
            ledger.begin_scan()
            try:
                await self._take_in(ledger, scan)
            finally:
                ledger.end_scan()
            self._visits = scan.visits
            self._counts += 1
            if ledger is self._ledger:
                self._recovered.set()
            if scan.error is not None:
                raise scan.error

    async def _take_in(self, ledger: Ledger, scan: Scan) -> None:
        while (part := await self._pool.run(scan.more, _SLICE)) is not None:
            for shard, present in part.read.items():
                ledger.reconcile(shard, present)
            ledger.discover(part.new)
            await asyncio.sleep(0)
        for shard in ledger.shards():
            if not scan.may_exist(shard):
                ledger.reconcile(shard, set())
        used = ledger.by_use()
        while batch := await self._pool.run(lambda: tuple(itertools.islice(used, _SLICE))):
            ledger.sort(batch)
            await asyncio.sleep(0)
        if scan.error is None:
            ledger.unlisted_nbytes = 0

    async def _tidy(self) -> None:
        """What a pass does beside counting objects: empty folders go, the quarantine is weighed."""
        await self.weigh_quarantine()
        ledger, scan = self._ledger, self._scan
        if ledger is None or scan is None:
            return
        self._scan = None
        bare = scan.namespaces - scan.hidden
        empty = ledger.empty_shards()
        for shard in await self._change(sweep, self._paths, bare, self._visits.keys(), empty):
            self._visits.pop(shard, None)
            ledger.drop_shard(shard)

    async def _save_totals(self) -> None:
        """Tell the next janitor what lies here. Costs nothing when it fails: it counts anyway."""
        if self._ledger is not None:
            with suppress(OSError):
                await self._change(self._office.note, self._ledger.used_nbytes)

    # -- room ------------------------------------------------------------------------------------

    def has_room(self, nbytes: int) -> bool:
        """Whether ``grant`` would neither wait nor evict, as far as is known now."""
        if not self._options.capacity or self._ledger is None:
            return True
        return self._ledger.excess(nbytes) <= self._slack

    @property
    def _slack(self) -> int:
        """What the capacity may be exceeded by: something only while the directory is listed."""
        return 0 if self._recovered.is_set() else self._options.capacity // _SLACK

    async def grant(self, write: Write) -> Ledger | BackendError | None:
        """Make room for a write and count its bytes; give the answer to ``settle``.

        None when nobody counts here. Waits for writes that hold all the room, and, while the
        directory is being listed, once that has used up what it may be exceeded by.
        """
        capacity, nbytes = self._options.capacity, write.nbytes
        if capacity and nbytes > capacity:
            return BackendError(
                f"file://: an object of {nbytes} bytes is larger than the capacity of "
                f"{capacity} bytes of {self._paths.root}",
                hint="raise capacity, or use smaller chunks",
            )
        if not self.has_room(nbytes):
            await self._recovered.wait()
        ledger = self._ledger
        if ledger is None:
            return None
        if capacity and ledger.excess(nbytes) > self._slack:
            async with self._making_room:
                error = await self._make_room(ledger, nbytes, write)
                if error is not None:
                    return error
                ledger.granted_nbytes += nbytes
        else:
            ledger.granted_nbytes += nbytes
        return ledger

    def settle(self, ledger: Ledger, write: Write, used_ns: int, outcome: Outcome) -> None:
        """End a grant: the object counts if it was created, or the room is free again."""
        ledger.granted_nbytes -= write.nbytes
        if outcome.created:
            ledger.create(write.key, write.nbytes, used_ns, write)
        elif outcome.found is not None:
            ledger.add(write.key, *outcome.found, write)
        self._given_back.set()

    async def _make_room(
        self,
        ledger: Ledger,
        nbytes: int,
        write: Write | None = None,
        *,
        slices: int | None = None,
    ) -> BackendError | None:
        """Evict until ``nbytes`` more fit, or so many slices were removed."""
        spared: dict[ObjectKey, int] = {}
        candidates = 1
        try:
            while (excess := ledger.excess(nbytes)) > 0 and ledger is self._ledger:
                if slices is not None:
                    if slices == 0:
                        break
                    slices -= 1
                victims = ledger.take(excess, candidates, time(), write)
                if victims:
                    eviction = await self._evict(ledger, victims, excess, spared)
                    if eviction.error is not None and not eviction.freed_nbytes:
                        return eviction.error
                    candidates = 2 * candidates if eviction.spared else 1
                elif any(key in ledger for key in spared):
                    ledger.spare(spared)  # all are in use: the least recently used goes after all
                elif ledger.quarantined_nbytes:  # evidence never stands in the way of service
                    ledger.quarantined_nbytes = await self._change(keep, self._paths, 0)
                elif ledger.granted_nbytes:
                    self._given_back.clear()
                    await self._given_back.wait()
                else:
                    return NoRoomError(
                        f"file://: no room in {self._paths.root}: "
                        f"{ledger.order.name!r} gives up none of {len(ledger)} objects for this"
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
                self._on_evicted(named, ledger.order.name)
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
            nbytes = await self._change(keep, self._paths)
            if self._ledger is not None:
                self._ledger.quarantined_nbytes = nbytes
