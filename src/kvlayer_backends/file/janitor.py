"""The one process that counts a shared directory, makes room in it and clears up after the dead."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import ParamSpec, TypeVar

from kvlayer.abc.backend import Write
from kvlayer.abc.policy import PolicyMaker
from kvlayer.identity.keys import ObjectKey
from kvlayer.runtime.offload import Offload
from kvlayer_backends.file.ledger import Ledger
from kvlayer_backends.file.objects import ObjectFiles
from kvlayer_backends.file.office import Office
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.paths import Paths, Shard
from kvlayer_backends.file.quarantine import keep
from kvlayer_backends.file.room import Evicted, Room
from kvlayer_backends.file.scan import Found, Scan, Visit
from kvlayer_backends.file.scratch import Reaped, reap
from kvlayer_backends.file.sweep import sweep

__all__ = ["Janitor"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)
_SLICE = 1_000  # objects found by one job of a thread
_AT_ONCE = 50  # of them taken into the books before the loop gets a turn


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
        pool: Offload,
        on_evicted: Evicted,
    ) -> None:
        self._paths = paths
        self._options = options
        self._policy = policy
        self._files = files
        self._pool = pool
        self.room = Room(paths, options, files=files, pool=pool, on_evicted=on_evicted)
        self._office = Office(paths.janitor_lock)
        self._visits: dict[Shard, Visit] = {}
        self._passing = asyncio.Lock()
        self._weighing = asyncio.Lock()
        self._counting = asyncio.Lock()
        self._counts = 0
        self._progress = asyncio.Event()
        self._scan: Scan | None = None
        """The last one, until its empty folders have been removed."""
        self.left_unfinished = 0
        """Files that dead processes had begun and this one has cleared away."""
        self._task: asyncio.Task[None] | None = None
        self._complaint = ""

    @property
    def ledger(self) -> Ledger | None:
        """What the directory holds, while in office."""
        return self.room.ledger

    def elect(self) -> None:
        """Take office if it is free, and clear up after the dead. Blocking; before ``start`` only.

        Raises ``OSError``.
        """
        expected_nbytes = self._office.take()
        if expected_nbytes is not None:
            self._take_office(expected_nbytes)
            self._count_unfinished(reap(self._paths))

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
        await self.room.recovered.wait()

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
            errors: list[Exception] = []
            steps = (self._reap, self.count, self._evict_down, self.weigh_quarantine, self._sweep)
            for step in (*steps, self._save_totals):
                try:
                    await step()
                except Exception as exc:  # noqa: BLE001  # no reason to skip the others
                    errors.append(exc)
                finally:
                    if step == self.count:
                        self.room.recovered.set()  # whatever happened: a put must not wait for ever
            if errors:
                raise errors[0]

    async def _evict_down(self) -> None:
        ledger = self.room.ledger
        while ledger is not None and ledger is self.room.ledger and ledger.excess() > 0:
            async with self.room.making:  # slice by slice: writes get their turns
                error = await self.room.make(ledger, 0, slices=1)
            if error is not None:
                raise error

    async def _change(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what changes the disk on a thread, once it takes changes. Raises ``OSError``."""
        return await self._pool.run(self._files.change, work, *args, **kwargs)

    async def _in_office(self) -> Ledger | None:
        if self.room.ledger is not None:
            if await self._pool.run(self._office.is_held):
                return self.room.ledger
            self._leave_office()  # the directory was deleted, and its lock with it
        with suppress(FileNotFoundError):
            expected_nbytes = await self._change(self._office.take)
            if expected_nbytes is not None:
                self._take_office(expected_nbytes)
        return self.room.ledger

    def _take_office(self, expected_nbytes: int) -> None:
        self.room.ledger = Ledger(self._policy, self._options.capacity)
        self.room.ledger.unlisted_nbytes = expected_nbytes
        self._visits, self._scan = {}, None
        self.room.recovered.clear()

    def _leave_office(self) -> None:
        self.room.ledger = None
        self._office.leave()
        self.room.recovered.set()
        self.room.given_back.set()

    async def _reap(self) -> None:
        self._count_unfinished(await self._change(reap, self._paths))

    def _count_unfinished(self, left: Reaped) -> None:
        if left.processes:
            self.left_unfinished += left.files
            _log.warning(
                "file://%s: %d processes ended without closing; %d objects were left unfinished, "
                "and what else was queued was not written",
                self._paths.root,
                left.processes,
                left.files,
            )

    async def count(self) -> None:
        """Bring the books up to what lies in the directory now; nothing when not in office.

        Who comes while that is being done waits for its end. Raises ``OSError`` when something
        could not be read; what was known of it stays.
        """
        before = self._counts
        async with self._counting:
            ledger = self.room.ledger
            if ledger is None or self._counts != before:
                return
            # The first scan finds nearly everything unknown: no use in asking of each.
            known = ledger if self.is_recovered else frozenset[str]()
            scan = self._scan = Scan(self._paths, known, self._visits)
            ledger.begin_scan()
            try:
                await self._take_in(ledger, scan)
            finally:
                ledger.end_scan()
            self._visits = scan.visits
            self._counts += 1
            if ledger is self.room.ledger:
                self.room.recovered.set()
            if scan.error is not None:
                raise scan.error

    @property
    def is_recovered(self) -> bool:
        """Whether the books are complete."""
        return self.room.recovered.is_set()

    async def progress(self) -> None:
        """Wait until a count that is under way has found more."""
        await self._progress.wait()

    async def _take_in(self, ledger: Ledger, scan: Scan) -> None:
        found: list[Found] = []
        while (part := await self._pool.run(scan.more, _SLICE)) is not None:
            for shard, present in part.read.items():
                ledger.reconcile(shard, present)
            if self.is_recovered:
                found += part.new
            else:  # nothing is given up meanwhile, and a listing is drawn from it
                await self._discover(ledger, part.new)
            self._progress.set()
            self._progress = asyncio.Event()
            await asyncio.sleep(0)
        for shard in ledger.shards():
            if not scan.may_exist(shard):
                ledger.reconcile(shard, set())
        async with self.room.making:  # what was written just now goes not before what was found
            for at in range(0, len(found), _SLICE):
                some = sorted(found[at : at + _SLICE], key=attrgetter("used_ns"))
                await self._discover(ledger, some)
            used = ledger.by_use()
            while batch := await self._pool.run(lambda: tuple(itertools.islice(used, _SLICE))):
                for at in range(0, len(batch), _AT_ONCE):
                    ledger.sort(batch[at : at + _AT_ONCE])
                    await asyncio.sleep(0)
        if scan.error is None:
            ledger.unlisted_nbytes = 0

    @staticmethod
    async def _discover(ledger: Ledger, found: Sequence[Found]) -> None:
        run = ledger.begin_run()
        for at in range(0, len(found), _AT_ONCE):
            ledger.discover(found[at : at + _AT_ONCE], run)
            await asyncio.sleep(0)

    async def _sweep(self) -> None:
        """Folders that hold nothing any more go."""
        ledger, scan = self.room.ledger, self._scan
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
        if self.room.ledger is not None:
            with suppress(OSError):
                await self._change(self._office.note, self.room.ledger.used_nbytes)

    # -- what the backend saw --------------------------------------------------------------------

    def used(self, path: Sequence[ObjectKey], stamps: Iterable[int]) -> None:
        """A path was used, root first."""
        if self.room.ledger is not None:
            self.room.ledger.use(path, stamps)

    def found(self, write: Write, nbytes: int, used_ns: int) -> None:
        """The object of a write is there, whoever wrote it."""
        if self.room.ledger is not None:
            self.room.ledger.add(write.key, nbytes, used_ns, write)

    def lost(self, keys: Iterable[ObjectKey]) -> None:
        """Objects are not there any more."""
        if self.room.ledger is not None:
            for key in keys:
                self.room.ledger.forget(key)

    async def weigh_quarantine(self) -> None:
        """Trim the quarantine and count what it holds.

        One at a time: a slower and older count must not overwrite a newer one.
        """
        async with self._weighing:
            nbytes = await self._change(keep, self._paths)
            if self.room.ledger is not None:
                self.room.ledger.quarantined_nbytes = nbytes
