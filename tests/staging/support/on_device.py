"""Kernels on a device, behind the face of the emulator: the same checks run on both.

Memory is managed, so that the host may look at it when nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_uint8
from typing import Any

import numpy as np

from kvlayer.staging.cuda.runtime import Stream, cupy_runtime
from kvlayer.staging.kernels.build import Builder

__all__ = ["ManagedMemory", "OnDevice"]

_ATTACH_GLOBAL = 1  # cudaMemAttachGlobal


class OnDevice:
    """Where the checks' launches get their functions. Each launch has ended when it returns."""

    def __init__(self, number: int = 0) -> None:
        self._builder = Builder(number)
        self.runtime: Any = cupy_runtime()
        self.runtime.setDevice(number)
        self._stream = Stream(self.runtime)
        self.order, self.seed = "", 0  # the device has its own

    def function(self, source: str, kernel: str) -> Callable[..., None]:
        found = self._builder.function(source, kernel)

        def launch(grid: tuple[int], block: tuple[int], args: tuple[Any, ...], **_: Any) -> None:
            found(grid, block, args, stream=self._stream)
            self._stream.synchronize()

        return launch


class ManagedMemory:
    """As ``emulator.Memory``, in memory that both sides reach."""

    def __init__(self, device: OnDevice, nbytes: int, *, fill: int | None = None) -> None:
        self._runtime = device.runtime
        self.nbytes = nbytes
        self.address: int = self._runtime.mallocManaged(max(nbytes, 1), _ATTACH_GLOBAL)
        self.array: Any = np.frombuffer((c_uint8 * nbytes).from_address(self.address), np.uint8)
        if fill is not None:
            self.array[:] = fill

    def close(self) -> None:
        self._runtime.free(self.address)
