"""One CUDA device at work: three streams, a ring between them, and what waits for what.

::

    engine's stream ---ready--->  compute: gather, scatter
                                  down:    ring slot -> host
                                  up:      host -> ring slot, or straight into blocks
    ready       what the engine had queued by its event, or when a call began: before any batch
    slot.full   its writer has ended:  gather -> copy down,  copy up -> scatter
    slot.free   its reader has ended:  copy down, scatter -> the next gather or copy up
    done        the last of a batch has ended: the thread that queued it, and nobody else, sleeps

Work is queued a batch at a time, under a lock, one batch ahead of the device; nothing in it waits
for the host. So the link stays busy while Python is slow, and what is cancelled ends with at most
two batches. What a batch does is worked out before it takes the lock (:mod:`programs`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from threading import Lock
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from kvlayer.layout import KVView
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.copies import BatchCopy, Copier
from kvlayer.staging.cuda.fills import LayerGroup, pack
from kvlayer.staging.cuda.pinned import PinnedSlab
from kvlayer.staging.cuda.programs import Program, Programs
from kvlayer.staging.cuda.ring import Ring, Slot
from kvlayer.staging.cuda.runs import Runs
from kvlayer.staging.cuda.runtime import Event, Recorded, Runtime, Stream, cuda_errors
from kvlayer.staging.cuda.tables import Arena, Arenas
from kvlayer.staging.kernels.plan import Plan
from kvlayer.staging.lazy import np
from kvlayer.staging.moves import Move

__all__ = ["Call", "Landed", "Launcher", "Pipeline"]

T = TypeVar("T")

Landed: TypeAlias = Callable[[LayerGroup], None]
"""Told, on the thread that waits, that the layers of a group are there. Must return at once."""


class Launcher(Protocol):
    """Launches plans: ``kernels.launch.Kernels``."""

    def launch(self, stream: Stream, plan: Plan, table: int, *, blocks: int) -> None:
        """Queue a plan whose table lies at this address."""
        ...


class Call:
    """What the batches of one gather or scatter have in common. ``Pipeline.call`` makes it."""

    def __init__(self, view: KVView, programs: Programs, marks: Marks) -> None:
        self.view = view
        self.programs = programs
        self.marks = marks
        self.hosts: dict[int, int] = {}
        """Addresses of host memory, by the identity of its memoryview."""

    @property
    def ready(self) -> Event | Recorded:
        """Behind what the engine had queued when the call began, or by its own event."""
        ready = self.view.ready
        return self.marks.taken[0] if ready is None else Recorded(ready.cuda_event)


class Pipeline:
    """Carries out batches on device ``number``. In any thread; batches queue one after the other.

    A call is ``call``, ``begin``, ``gather`` or ``scatter`` of its batches, at once or in parts,
    and, whatever happens, ``end``.

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

    def call(self, view: KVView, *, gather: bool) -> Call:
        """A gather or a scatter that is to begin. Asks nothing of the device."""
        cut = None if self._pinned is None else self._pinned.cut
        programs = Programs(view, gather=gather, gap=self.calibration.gap_nbytes, cut=cut)
        return Call(view, programs, Marks(self._event))

    def begin(self, call: Call) -> None:
        """Its batches follow what the engine has queued, by its event or by now."""
        self._runtime.setDevice(self.number)
        if call.view.ready is None:
            with self._turn:
                call.marks.marked(call.view.stream)

    def end(self, call: Call) -> None:
        """None of its batches is under way, or will be."""
        self._events += call.marks.taken

    def gather(self, call: Call, batches: Iterable[Sequence[Move]]) -> None:
        """Copy the moves' rows into their host memory.

        A batch is queued while the one before is under way. Blocks until nothing is in use any
        more, also when it raises.
        """
        self._one_ahead(batches, partial(self._queue_gather, call))

    def scatter(
        self, call: Call, batches: Iterable[Sequence[LayerGroup]], landed: Landed | None = None
    ) -> None:
        """Copy from host memory into the cache, layer group by layer group.

        Once a batch is queued, ``view.loaded`` is told of each group's event, and ``landed`` of
        each group that is there, both in the order of the groups. Blocks like :meth:`gather`.
        """
        self._one_ahead(batches, partial(self._queue_scatter, call, landed))

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

    def _queue_gather(self, call: Call, stack: ExitStack, moves: Sequence[Move]) -> None:
        batch = stack.enter_context(self._batch(call, moves))
        nbytes = self._slot_nbytes(moves)
        program = call.programs.of([*pack(moves, nbytes)], call.hosts)
        with self._queueing():
            self._compute.wait(call.ready)
            table, fillings = self._placed(program, batch, nbytes, to_host=True)
            self._copier.to_device(self._compute, table)
            for filling in fillings:
                self._store(filling)
            done = batch.marks.marked(self._down.ptr)
        stack.callback(done.synchronize)

    def _queue_scatter(
        self,
        call: Call,
        landed: Landed | None,
        stack: ExitStack,
        groups: Sequence[LayerGroup],
    ) -> None:
        moves = [move for group in groups for move in group.moves]
        batch = stack.enter_context(self._batch(call, moves))
        nbytes = self._slot_nbytes(m for g in groups if not g.is_direct for m in g.moves)
        works = [
            call.programs.straight(group.moves, call.hosts)
            if group.is_direct
            else call.programs.of([*pack(group.moves, nbytes)], call.hosts)
            for group in groups
        ]
        with self._queueing():
            if any(group.is_direct for group in groups):
                self._up.wait(call.ready)
            if not all(group.is_direct for group in groups):
                self._compute.wait(call.ready)
            marks = [
                self._load_direct(batch, work)
                if isinstance(work, Runs)
                else self._load_group(batch, work, nbytes)
                for work in works
            ]
        if call.view.loaded is not None:
            for group, mark in zip(groups, marks, strict=True):
                call.view.loaded(group.told(mark.ptr))
        stack.callback(_wait_for, groups, marks, landed)

    # -- what is queued ----------------------------------------------------------------------------

    def _placed(
        self, program: Program, batch: _Batch, nbytes: int, *, to_host: bool
    ) -> tuple[Runs, list[_Filling]]:
        """How the program's table gets to the device; the program in slots of ``nbytes`` bytes."""
        self._ring.hold(nbytes)
        slots = self._ring.take(len(program.launches))
        addresses = [slot.address for slot in slots]
        program.place(addresses)
        upload, table = batch.arena.place(program.table)
        copies = program.copies(addresses, to_host=to_host)
        return upload, [
            _Filling(slot, plans, table, runs)
            for slot, plans, runs in zip(slots, program.launches, copies, strict=True)
        ]

    def _store(self, filling: _Filling) -> None:
        slot, plans, table, copies = filling
        self._compute.wait(slot.free)
        self._launch(plans, table)
        slot.full.record(self._compute.ptr)
        self._down.wait(slot.full)
        self._copier.to_host(self._down, copies)
        slot.free.record(self._down.ptr)

    def _load(self, filling: _Filling) -> None:
        slot, plans, table, copies = filling
        self._up.wait(slot.free)
        self._copier.to_device(self._up, copies)
        slot.full.record(self._up.ptr)
        self._compute.wait(slot.full)
        self._launch(plans, table)
        slot.free.record(self._compute.ptr)

    def _load_group(self, batch: _Batch, program: Program, nbytes: int) -> Event:
        table, (first, *rest) = self._placed(program, batch, nbytes, to_host=False)
        for filling in (first._replace(copies=table.and_then(first.copies)), *rest):
            self._load(filling)
        return batch.marks.marked(self._compute.ptr)

    def _load_direct(self, batch: _Batch, runs: Runs) -> Event:
        self._copier.to_device(self._up, runs)
        return batch.marks.marked(self._up.ptr)

    def _launch(self, plans: Sequence[Plan], table: int) -> None:
        for plan in plans:
            self._kernels.launch(self._compute, plan, table, blocks=self.calibration.blocks)

    def _slot_nbytes(self, moves: Iterable[Move]) -> int:
        """Bytes of a slot that holds any layer of these moves. Slots may grow, and never shrink."""
        return max([self._ring.nbytes, *(move.payload.layer_nbytes for move in moves)])

    # -- one batch ---------------------------------------------------------------------------------

    @contextmanager
    def _batch(self, call: Call, moves: Sequence[Move]) -> Generator[_Batch]:
        """What a batch needs until its work has ended; by then its host memory is pinned."""
        self._runtime.setDevice(self.number)
        for move in moves:
            address = call.hosts.get(id(move.host))
            if address is None:
                address = call.hosts[id(move.host)] = _address(move.host)
            if self._pinned is not None and not self._pinned.is_whole:
                self._pinned.ensure(address, move.payload.nbytes)
        batch = _Batch(self._arenas.take(), Marks(self._event))
        try:
            yield batch
        except BaseException:
            self._drain()  # what it uses is somebody else's next
            raise
        finally:
            self._arenas.give(batch.arena)
            self._events += batch.marks.taken

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


class Marks:
    """Events that are one batch's, or one call's, until it ends: then others may record them."""

    def __init__(self, event: Callable[[], Event]) -> None:
        self.taken: list[Event] = []
        self._event = event

    def marked(self, stream: int) -> Event:
        """An event behind what is queued on a stream by now."""
        event = self._event()
        self.taken.append(event)
        event.record(stream)
        return event


class _Batch(NamedTuple):
    """What belongs to one batch while it is in flight."""

    arena: Arena
    marks: Marks


class _Filling(NamedTuple):
    """A slot, what is launched and what is copied to fill and to empty it."""

    slot: Slot
    plans: Sequence[Plan]
    table: int
    copies: Runs


def _wait_for(groups: Sequence[LayerGroup], marks: Sequence[Event], landed: Landed | None) -> None:
    """Block until the groups are there, one after the other, and tell of each."""
    for group, mark in zip(groups, marks, strict=True):
        mark.synchronize()
        if landed is not None:
            landed(group)


def _address(host: memoryview) -> int:
    address: int = np.frombuffer(host, np.uint8).ctypes.data
    return address
