"""How runs are handed to a copy engine: one call each, or one call for all of them.

CuPy has no ``cudaMemcpyBatchAsync``; NVIDIA's ``cuda-bindings`` do (CUDA 12.8 and newer). It saves
most of the half microsecond of CPU that a run costs otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

from kvlayer.errors import UnsupportedError
from kvlayer.staging.cuda.runs import Runs
from kvlayer.staging.cuda.runtime import Runtime, Stream

__all__ = ["BatchCopy", "Copier", "find_batch_copy"]

_log = logging.getLogger(__name__)

BatchCopy: TypeAlias = Callable[[Runs, int], None]
"""Queue all runs on the stream of this handle, in any order among them."""


class Copier:
    """Queues copies on streams. ``batch_runs`` runs and more go to ``batch`` where there is one.

    A batch that is refused, as by a driver that is older than the bindings, is the last one: the
    runs are copied one by one from then on, and the log says so.
    """

    def __init__(self, runtime: Runtime, batch: BatchCopy | None, batch_runs: int) -> None:
        self._runtime = runtime
        self._batch = batch
        self._batch_runs = batch_runs

    def to_device(self, stream: Stream, runs: Runs) -> None:
        """Queue copies from host memory, which must stay as it is until they have ended."""
        self._copy(stream, runs, self._runtime.memcpyHostToDevice)

    def to_host(self, stream: Stream, runs: Runs) -> None:
        """Queue copies to host memory, which nobody else may touch until they have ended."""
        self._copy(stream, runs, self._runtime.memcpyDeviceToHost)

    def _copy(self, stream: Stream, runs: Runs, kind: int) -> None:
        if self._batch is not None and len(runs.nbytes) >= self._batch_runs:
            try:
                self._batch(runs, stream.ptr)
            except UnsupportedError as exc:
                self._batch = None
                _log.warning("%s: runs are copied one by one, which takes more of the CPU", exc)
            else:
                return
        copy, queue = self._runtime.memcpyAsync, stream.ptr
        for source, target, nbytes in zip(*runs, strict=True):
            copy(target, source, nbytes, kind, queue)


def find_batch_copy() -> BatchCopy | None:
    """``cudaMemcpyBatchAsync`` through ``cuda.bindings``; None where it is not installed."""
    try:
        cuda: Any = import_module("cuda.bindings.runtime")
        copy = cuda.cudaMemcpyBatchAsync
    except (ImportError, AttributeError):  # not there, or of a CUDA before 12.8
        return None
    attributes = cuda.cudaMemcpyAttributes()
    attributes.srcAccessOrder = cuda.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream

    def batch(runs: Runs, stream: int) -> None:
        count = len(runs.nbytes)
        # CUDA 12 also returns which copy failed.
        error, *_ = copy(
            runs.targets, runs.sources, runs.nbytes, count, [attributes], [0], 1, stream
        )
        if int(error):
            raise UnsupportedError(f"cudaMemcpyBatchAsync failed: {error!r}")

    return batch
