"""One CUDA device at work: three streams, a ring between them, and what waits for what.

::

    engine's stream ---ready--->  compute: gather, scatter
                                  down:    ring slot -> host
                                  up:      host -> ring slot, or straight into blocks
    slot.full   its writer has ended:  gather -> copy down,  copy up -> scatter
    slot.free   its reader has ended:  copy down, scatter -> the next gather or copy up
    done        the last of a batch has ended: the thread that queued it, and nobody else, sleeps

Work is queued a batch at a time, under a lock, one batch ahead of the device; nothing in it waits
for the host. So the link stays busy while Python is slow, and what is cancelled ends with at most
two batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from threading import Lock
from typing import Protocol, TypeAlias, TypeVar

from kvlayer.layout import KVView
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.copies import BatchCopy, Copier
from kvlayer.staging.cuda.fills import Fill, LayerGroup, pack, plans_of, reads, writes
from kvlayer.staging.cuda.pinned import PinnedSlab
from kvlayer.staging.cuda.ring import Ring
from kvlayer.staging.cuda.runs import DirectSpans, Run, Spans, direct_runs
from kvlayer.staging.cuda.runtime import Event, Runtime, Stream, cuda_errors
from kvlayer.staging.cuda.tables import Arena, Arenas
from kvlayer.staging.kernels.plan import Plan, gather_plan, scatter_plan
from kvlayer.staging.lazy import np
from kvlayer.staging.moves import Move

__all__ = ["Landed", "Launcher", "Pipeline"]

T = TypeVar("T")

Landed: TypeAlias = Callable[[LayerGroup], None]
"""Told, on the thread that waits, that the layers of a group are there. Must return at once."""


class Launcher(Protocol):
    """Launches plans: ``kernels.launch.Kernels``."""

    def launch(self, stream: Stream, plan: Plan, table: int, *, blocks: int) -> None:
        """Queue a plan whose table lies at this address."""
        ...


class Pipeline:
    """Carries out batches on device ``number``. In any thread; batches queue one after the other.

    Everything it allocates, it allocates here or when a batch first needs it, and frees in
    ``close``: a ring of ``slots * slot_nbytes`` bytes of device memory, and for each batch that was
    ever in flight at once a few MiB of tables, pinned and on the device.
    """

    def __init__(
        self,
        number: int,
        runtime: Runtime,
        kernels: Launcher,
        calibration: Calibration,
        *,
        pinned: PinnedSlab | None,
        batch_copy: BatchCopy | None,
    ) -> None:
        self.number = number
        self.calibration = calibration
        self._runtime = runtime
        self._kernels = kernels
        self._pinned = pinned
        self._copier = Copier(runtime, batch_copy, calibration.batch_runs)
        self._events: list[Event] = []
        self._turn = Lock()
        runtime.setDevice(number)
        with ExitStack() as made:
            self._streams = [made.enter_context(closing(Stream(runtime))) for _ in range(3)]
            self._compute, self._down, self._up = self._streams
            self._ring = Ring(runtime, calibration.slots, calibration.slot_nbytes)
            made.callback(self._ring.close)
            self._arenas = Arenas(runtime)
            made.callback(self._arenas.close)
            self._made = made.pop_all()

    def gather(self, view: KVView, batches: Iterable[Sequence[Move]]) -> None:
        """Copy the moves' rows into their host memory, behind what the engine has queued.

        A batch is queued while the one before is under way. Blocks until nothing is in use any
        more, also when it raises.
        """
        self._one_ahead(batches, partial(self._queue_gather, view))

    def scatter(
        self, view: KVView, batches: Iterable[Sequence[LayerGroup]], landed: Landed | None = None
    ) -> None:
        """Copy from host memory into the cache, layer group by layer group.

        Once a batch is queued, ``view.loaded`` is told of each group's event, and ``landed`` of
        each group that is there, both in the order of the groups. Blocks like :meth:`gather`.
        """
        self._one_ahead(batches, partial(self._queue_scatter, view, landed))

    def close(self) -> None:
        """Free everything. No batch may be running. Idempotent."""
        with self._made:  # whatever is refused meanwhile, the rest is freed
            self._runtime.setDevice(self.number)

    # -- one batch after the other -----------------------------------------------------------------

    def _one_ahead(self, batches: Iterable[T], queue: Callable[[ExitStack, T], None]) -> None:
        """``queue`` puts on a stack what waits for the batch and gives back what it used."""
        before = ExitStack()
        try:
            for batch in batches:
                with ExitStack() as fresh:
                    queue(fresh, batch)
                    before.close()
                    before = fresh.pop_all()
        finally:
            before.close()

    def _queue_gather(self, view: KVView, stack: ExitStack, moves: Sequence[Move]) -> None:
        batch = stack.enter_context(self._batch(moves))
        with self._queueing():
            self._compute.wait(batch.marked(view.stream))
            self._ring.hold(_largest(moves))
            for fill in pack(moves, self._ring.nbytes):
                self._store(batch, view, fill)
            done = batch.marked(self._down.ptr)
        stack.callback(done.synchronize)

    def _queue_scatter(
        self,
        view: KVView,
        landed: Landed | None,
        stack: ExitStack,
        groups: Sequence[LayerGroup],
    ) -> None:
        straight = [group for group in groups if group.is_direct]
        ringed = [group for group in groups if not group.is_direct]
        batch = stack.enter_context(self._batch([move for group in groups for move in group.moves]))
        with self._queueing():
            ready = batch.marked(view.stream)
            if straight:
                self._up.wait(ready)
            if ringed:
                self._compute.wait(ready)
                self._ring.hold(_largest(move for group in ringed for move in group.moves))
            marks = [
                self._load_direct(batch, view, group)
                if group.is_direct
                else self._load(batch, view, group)
                for group in groups
            ]
        if view.loaded is not None:
            for group, mark in zip(groups, marks, strict=True):
                view.loaded(group.told(mark.ptr))
        stack.callback(_wait_for, groups, marks, landed)

    # -- one fill ----------------------------------------------------------------------------------

    def _store(self, batch: _Batch, view: KVView, fill: Fill) -> None:
        slot = self._ring.next()
        self._compute.wait(slot.free)
        plans = plans_of(fill, slot.address, view, gather_plan)
        upload, tables = batch.arena.place(plans)
        self._copier.to_device(self._compute, [upload])
        self._launch(plans, tables)
        slot.full.record(self._compute.ptr)
        self._down.wait(slot.full)
        runs = writes(fill, slot.address, batch.hosts)
        self._copier.to_host(self._down, self._cut(runs, to_host=True))
        slot.free.record(self._down.ptr)

    def _load(self, batch: _Batch, view: KVView, group: LayerGroup) -> Event:
        for fill in pack(group.moves, self._ring.nbytes):
            slot = self._ring.next()
            self._up.wait(slot.free)
            plans = plans_of(fill, slot.address, view, scatter_plan)
            upload, tables = batch.arena.place(plans)
            runs = reads(fill, slot.address, batch.hosts, batch.spans, self.calibration.gap_nbytes)
            self._copier.to_device(self._up, [upload, *self._cut(runs, to_host=False)])
            slot.full.record(self._up.ptr)
            self._compute.wait(slot.full)
            self._launch(plans, tables)
            slot.free.record(self._compute.ptr)
        return batch.marked(self._compute.ptr)

    def _load_direct(self, batch: _Batch, view: KVView, group: LayerGroup) -> Event:
        caches = view.caches[group.group]
        runs = [
            run
            for move in group.moves
            for run in direct_runs(move, batch.hosts[id(move.host)], caches, batch.straight)
        ]
        self._copier.to_device(self._up, self._cut(runs, to_host=False))
        return batch.marked(self._up.ptr)

    def _launch(self, plans: Sequence[Plan], tables: Sequence[int]) -> None:
        for plan, table in zip(plans, tables, strict=True):
            self._kernels.launch(self._compute, plan, table, blocks=self.calibration.blocks)

    def _cut(self, runs: Iterable[Run], *, to_host: bool) -> list[Run]:
        return list(runs if self._pinned is None else self._pinned.cut(runs, to_host=to_host))

    # -- one batch ---------------------------------------------------------------------------------

    @contextmanager
    def _batch(self, moves: Sequence[Move]) -> Generator[_Batch]:
        """What a batch needs until its work has ended; by then its host memory is pinned."""
        self._runtime.setDevice(self.number)
        hosts = {id(move.host): _address(move.host) for move in moves}
        if self._pinned is not None:
            for move in moves:
                self._pinned.ensure(hosts[id(move.host)], move.payload.nbytes)
        batch = _Batch(hosts, self._arenas.take(), self._event)
        try:
            yield batch
        except BaseException:
            self._drain()  # what it uses is somebody else's next
            raise
        finally:
            self._arenas.give(batch.arena)
            self._events += batch.events

    @contextmanager
    def _queueing(self) -> Generator[None]:
        """The right to queue. What fails on the way ends here: the device is left idle."""
        with self._turn:
            try:
                yield
            except BaseException:
                # A slot may be half used, with nobody's event behind it: before the next batch
                # comes, everything queued has ended.
                self._drain()
                raise

    def _drain(self) -> None:
        """Block until everything that is queued has ended. A device that refuses runs nothing."""
        for stream in self._streams:
            with suppress(*cuda_errors()):
                stream.synchronize()

    def _event(self) -> Event:
        """An event that nobody uses. Whoever asks has the right to queue."""
        if self._events:
            return self._events.pop()
        return self._made.enter_context(closing(Event(self._runtime)))


class _Batch:
    """What belongs to one batch while it is in flight."""

    def __init__(self, hosts: dict[int, int], arena: Arena, event: Callable[[], Event]) -> None:
        self.hosts = hosts
        """Addresses of host memory, by the identity of its memoryview."""
        self.arena = arena
        self.spans: dict[int, Spans] = {}
        self.straight: dict[int, DirectSpans] = {}
        self.events: list[Event] = []
        """Its own until it ends."""
        self._event = event

    def marked(self, stream: int) -> Event:
        """An event behind what is queued on a stream by now; the batch's until it ends."""
        event = self._event()
        self.events.append(event)
        event.record(stream)
        return event


def _wait_for(groups: Sequence[LayerGroup], marks: Sequence[Event], landed: Landed | None) -> None:
    """Block until the groups are there, one after the other, and tell of each."""
    for group, mark in zip(groups, marks, strict=True):
        mark.synchronize()
        if landed is not None:
            landed(group)


def _largest(moves: Iterable[Move]) -> int:
    return max(move.payload.layer_nbytes for move in moves)


def _address(host: memoryview) -> int:
    address: int = np.frombuffer(host, np.uint8).ctypes.data
    return address
