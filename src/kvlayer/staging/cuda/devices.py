"""The CUDA devices of one stager and the slab they share: opened when used, closed together."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from kvlayer.memory.slab import Slab
from kvlayer.staging.cuda import calibration
from kvlayer.staging.cuda.copies import find_batch_copy
from kvlayer.staging.cuda.pinned import PIECE_NBYTES, PinnedSlab
from kvlayer.staging.cuda.pipeline import Pipeline
from kvlayer.staging.cuda.runtime import Runtime, cuda_errors, cupy_runtime
from kvlayer.staging.kernels.build import Builder
from kvlayer.staging.kernels.launch import Kernels
from kvlayer.staging.lazy import np

if TYPE_CHECKING:
    from kvlayer.staging.cuda.calibration import Calibration

__all__ = ["Devices", "device_kind"]


class Devices:
    """Pipelines by device number. Every method blocks; not thread-safe.

    ``thresholds`` count in place of what is kept for the device.
    """

    def __init__(
        self,
        slab: Slab | None,
        thresholds: Calibration | None = None,
        *,
        piece_nbytes: int = PIECE_NBYTES,
    ) -> None:
        self._slab = slab
        self._thresholds = thresholds
        self._piece_nbytes = piece_nbytes
        self._pipelines: list[Pipeline] = []
        self._pinned: PinnedSlab | None = None

    def open(self, number: int) -> Pipeline:
        """Build the kernels and allocate what device ``number`` needs.

        Raises ``UnsupportedError`` where CuPy, a driver or the right architecture is missing or
        the kernels do not compile, and CuPy's errors where the device refuses.
        """
        builder = Builder(number)
        for kernel in ("kv_gather", "kv_scatter"):
            builder.function("copy", kernel)  # now, not when a request waits for it
        runtime = cupy_runtime()
        if self._pinned is None and self._slab is not None:
            self._pinned = _pinned(runtime, self._slab, self._piece_nbytes)
        kept, _ = calibration.load(device_kind(runtime, number))
        pipeline = Pipeline(
            number,
            runtime,
            Kernels(builder),
            self._thresholds or kept,
            pinned=self._pinned,
            batch_copy=find_batch_copy(),
        )
        self._pipelines.append(pipeline)
        return pipeline

    def pin_next(self) -> bool:
        """Pin one more piece of the slab; whether there are others."""
        return self._pinned is not None and self._pinned.pin_next()

    @property
    def pinned_nbytes(self) -> int:
        """Bytes of the slab that are pinned."""
        return 0 if self._pinned is None else self._pinned.pinned_nbytes

    def close(self) -> None:
        """Free and unpin everything. No batch may be running. Idempotent."""
        # A device that has failed refuses to free; what it holds goes with the process.
        for pipeline in self._pipelines:
            with suppress(*cuda_errors()):
                pipeline.close()
        self._pipelines.clear()
        if self._pinned is not None:
            with suppress(*cuda_errors()):
                self._pinned.close()
            self._pinned = None


def device_kind(runtime: Runtime, number: int) -> str:
    """Model and architecture, by which calibrations are kept."""
    properties = runtime.getDeviceProperties(number)
    name = properties["name"]
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return f"{text} sm_{properties['major']}{properties['minor']}"


def _pinned(runtime: Runtime, slab: Slab, piece_nbytes: int) -> PinnedSlab:
    with slab.view(0, slab.nbytes) as whole:
        address: int = np.frombuffer(whole, np.uint8).ctypes.data
    return PinnedSlab(runtime, address, slab.nbytes, piece_nbytes=piece_nbytes)
