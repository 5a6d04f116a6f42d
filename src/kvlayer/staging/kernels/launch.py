"""Launches plans on a stream. A launch returns at once; what it reads must outlive it."""

from __future__ import annotations

from typing import Any, Protocol

from kvlayer.staging.kernels.build import Function
from kvlayer.staging.kernels.plan import Plan
from kvlayer.staging.lazy import np

__all__ = ["THREADS", "Functions", "Kernels"]

THREADS = 256  # THREADS in kv.cuh


class Functions(Protocol):
    """Where kernels come from: a ``Builder``."""

    def function(self, source: str, kernel: str) -> Function:
        """A function of a ``.cu`` file."""
        ...


class Kernels:
    """The kernels of one device."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def prepare(self, plan: Plan) -> None:
        """Build what the plan needs, so that its launch does not wait for a compiler."""
        self._functions.function(plan.source, plan.kernel)

    def launch(self, stream: Any, plan: Plan, table: int, *, blocks: int) -> None:
        """Queue ``plan`` on ``stream`` (a CuPy stream), with at most ``blocks`` thread blocks.

        ``table`` is the address of a copy of ``plan.table`` that the device can read. Table, cache
        and staging memory must stay until the launch has ended; work queued on other streams that
        wrote or will overwrite them is ordered by the caller's events. The device must be the
        current one.
        """
        function = self._functions.function(plan.source, plan.kernel)
        addresses = [np.uint64(table + start) for start in plan.starts]
        numbers = [np.uint32(number) for number in plan.numbers]
        grid = (max(1, min(blocks, plan.tiles)),)
        function(grid, (THREADS,), (*addresses, *numbers), stream=stream)
