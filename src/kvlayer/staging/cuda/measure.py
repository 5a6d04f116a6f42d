"""What one device's link and kernels do, bare: what the pipeline's thresholds are chosen from.

Wall time of a thread that queues work and sleeps until it has ended, as the pipeline's do. Every
figure is the least of several: what disturbs a copy only ever makes it longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from kvlayer.staging.address import Side, Strip
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.copies import BatchCopy
from kvlayer.staging.cuda.pipeline import Launcher
from kvlayer.staging.cuda.runs import Runs
from kvlayer.staging.cuda.runtime import Event, Runtime, Stream
from kvlayer.staging.geometry import CacheGeometry, Plane
from kvlayer.staging.kernels.plan import gather_plan
from kvlayer.staging.kernels.tables import Layer, Piece
from kvlayer.staging.lazy import np
from kvlayer.staging.slots import BlockRun, SlotRuns

__all__ = ["SLOTS", "Figures", "bare_copy", "choose", "choose_slot", "measure"]

SLOTS = tuple(1 << n for n in range(22, 27))  # 4 to 64 MiB

_RUNS = tuple(1 << n for n in range(12, 21))  # 4 KiB to 1 MiB
_COUNTS = (2, 4, 8, 16, 32, 64, 128)
_BLOCKS = (8, 16, 32, 64, 128, 256)
_BATCHED_NBYTES = 32 << 10
_ROW_NBYTES, _ROWS = 2048, 16  # a block of 16 tokens of 8 heads of 128 16-bit floats


@dataclass(frozen=True, slots=True)
class Figures:
    """Bytes per second, unless it says seconds."""

    to_host: float
    to_device: float
    """One long copy between pinned and device memory."""
    by_run: dict[int, float]
    """The same bytes to the device in runs this long, handed over in the better way."""
    single_seconds: dict[int, float]
    batch_seconds: dict[int, float]
    """So many short runs, one by one and in a batch; empty where there is no batch."""
    by_blocks: dict[int, float]
    """A gather of this many thread blocks."""


def choose(figures: Figures) -> Calibration:
    """Thresholds for a device, but for the slot's size. Pure.

    As few thread blocks as are nearly as fast as any number: they wait for multiprocessors that the
    engine has taken, so they must be done soon once they have them. Straight loads from where a run
    costs less than a tenth more than one long copy.
    """
    fastest = max(figures.by_blocks.values())
    shortest = min(figures.by_run)
    run_seconds = shortest / figures.by_run[shortest] - shortest / figures.to_device
    return Calibration(
        blocks=_first(figures.by_blocks, lambda _, rate: rate >= 0.8 * fastest)
        or max(figures.by_blocks),
        direct_nbytes=_first(figures.by_run, lambda _, rate: rate >= 0.9 * figures.to_device)
        or 2 * max(figures.by_run),
        batch_runs=_first(
            figures.batch_seconds,
            lambda count, seconds: seconds < figures.single_seconds[count],
        )
        or 1 << 30,
        gap_nbytes=min(max(int(run_seconds * figures.to_device), 0), 1 << 20) >> 10 << 10,
    )


def choose_slot(seconds: dict[int, float]) -> int:
    """The smallest slot with which a store and a load take at most 2 % longer than with the best.

    What a slot costs is the CPU's doing and the copy engine's, so ``seconds`` are of whole calls.
    """
    best = min(seconds.values())
    return min(slot for slot, taken in seconds.items() if taken <= 1.02 * best)


def measure(
    runtime: Runtime,
    number: int,
    kernels: Launcher,
    batch: BatchCopy | None,
    *,
    nbytes: int = 64 << 20,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> Figures:
    """Take all figures of a device, with ``nbytes`` moved at a time. Blocks for some seconds.

    Allocates twice as much device memory and as much pinned host memory, and frees it.
    """
    with _bench(runtime, number, nbytes, rounds, clock) as bench:
        whole = Runs([bench.host], [bench.device], [nbytes])
        single = {n: bench.copies(bench.runs(_BATCHED_NBYTES, n), None) for n in _COUNTS}
        batched = {
            n: bench.copies(bench.runs(_BATCHED_NBYTES, n), batch)
            for n in (_COUNTS if batch is not None else ())
        }
        better = batch if batched and batched[_COUNTS[-1]] < single[_COUNTS[-1]] else None
        return Figures(
            nbytes / bench.copies(whole, None, to_host=True),
            nbytes / bench.copies(whole, None),
            {n: nbytes / bench.copies(bench.runs(n), better) for n in _RUNS},
            single,
            batched,
            {n: nbytes / bench.gather(kernels, n) for n in _BLOCKS},
        )


def bare_copy(
    runtime: Runtime, number: int, nbytes: int, *, to_host: bool, rounds: int = 1
) -> float:
    """Seconds of one long copy between pinned and device memory: the ceiling of everything."""
    with _bench(runtime, number, nbytes, rounds, time.perf_counter) as bench:
        return bench.copies(Runs([bench.host], [bench.device], [nbytes]), None, to_host=to_host)


@contextmanager
def _bench(
    runtime: Runtime, number: int, nbytes: int, rounds: int, clock: Callable[[], float]
) -> Generator[_Bench]:
    runtime.setDevice(number)
    bench = _Bench(runtime, nbytes, rounds, clock)
    try:
        yield bench
    finally:
        bench.close()


class _Bench:
    """Memory on both sides, a stream, and a way to time what is queued on it."""

    def __init__(
        self, runtime: Runtime, nbytes: int, rounds: int, clock: Callable[[], float]
    ) -> None:
        self.nbytes = nbytes
        self._runtime, self._rounds, self._clock = runtime, rounds, clock
        self.host = runtime.hostAlloc(nbytes, 0)
        self.device = runtime.malloc(nbytes)
        self.staging = runtime.malloc(nbytes)
        self.stream = Stream(runtime)
        self.end = Event(runtime)

    def close(self) -> None:
        self._runtime.freeHost(self.host)
        self._runtime.free(self.device)
        self._runtime.free(self.staging)
        self.stream.close()
        self.end.close()

    def runs(self, nbytes: int, count: int | None = None) -> Runs:
        """Runs of this length, every other one of their memory where that is large enough."""
        step = 2 * nbytes if count is not None else nbytes
        found = range(0, self.nbytes - nbytes + 1, step)[:count]
        hosts, devices = [self.host + at for at in found], [self.device + at for at in found]
        return Runs(hosts, devices, [nbytes] * len(found))

    def copies(self, runs: Runs, batch: BatchCopy | None, *, to_host: bool = False) -> float:
        """Seconds until all runs have been copied; they are given from host to device."""
        runtime = self._runtime
        kind = runtime.memcpyDeviceToHost if to_host else runtime.memcpyHostToDevice
        ends = (runs.targets, runs.sources) if to_host else (runs.sources, runs.targets)

        def queue() -> None:
            if batch is not None:
                batch(runs, self.stream.ptr)
                return
            for source, target, nbytes in zip(*ends, runs.nbytes, strict=True):
                runtime.memcpyAsync(target, source, nbytes, kind, self.stream.ptr)

        return self._least(queue)

    def gather(self, kernels: Launcher, blocks: int) -> float:
        """Seconds to gather all of the memory, in pages of 32 KiB in another order."""
        page = _ROW_NBYTES * _ROWS
        pages = self.nbytes // page
        side = Side(0, 0, _ROW_NBYTES, page, _ROW_NBYTES)
        strip = Strip(0, 1, 1, pages, _ROWS, _ROW_NBYTES, side, side)
        plane = Plane(0, 0, _ROW_NBYTES, page, _ROW_NBYTES, _ROW_NBYTES)
        geometry = CacheGeometry((plane,), 1, pages, _ROWS, _ROWS)
        ids = np.random.default_rng(1).permutation(pages)
        runs = SlotRuns(geometry, (BlockRun(0, ids),), None)
        plan = gather_plan([strip], [Layer((self.device,), 0)], [Piece(runs, self.staging)])
        table = self._runtime.malloc(plan.table.nbytes)
        try:
            self._runtime.memcpyAsync(
                table,
                plan.table.ctypes.data,
                plan.table.nbytes,
                self._runtime.memcpyHostToDevice,
                self.stream.ptr,
            )
            return self._least(lambda: kernels.launch(self.stream, plan, table, blocks=blocks))
        finally:
            self._runtime.free(table)

    def _least(self, queue: Callable[[], None]) -> float:
        """The shortest of several rounds, after one that does not count."""
        seconds: list[float] = []
        for _ in range(self._rounds + 1):
            started = self._clock()
            queue()
            self.end.record(self.stream.ptr)
            self.end.synchronize()
            seconds.append(self._clock() - started)
        return max(min(seconds[1:]), 1e-9)


def _first(found: dict[int, float], suits: Callable[[int, float], bool]) -> int | None:
    """The smallest number from which on every larger one suits as well."""
    best: int | None = None
    for number in sorted(found, reverse=True):
        if not suits(number, found[number]):
            break
        best = number
    return best
