"""What the copy kernels do, by NumPy: their tables are read when the launch runs, as on a device.

The tests of the kernels hold the ``.cu`` files to the same; here only order and addresses matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gpu_sim import Access, FakeCudaError, Gpu, bytes_at, move_rows
from numpy.typing import NDArray

from kvlayer.staging.kernels import tables

__all__ = ["launch"]

_PLANE = np.dtype(tables._PLANE_FIELDS)
_MANY = 4096  # pieces of a launch: a table that names more is none
_ARGUMENTS = 10  # planes, bases, rows; numbers of planes, rows, heads; tile, lanes, segments, width


def launch(gpu: Gpu, stream: int, name: str, arguments: Sequence[int]) -> None:
    """Queue a launch of ``kv_gather`` or ``kv_scatter``."""
    if name not in ("kv_gather", "kv_scatter") or len(arguments) != _ARGUMENTS:
        raise FakeCudaError(f"no such kernel: {name} with {len(arguments)} arguments")
    planes, bases, rows, num_planes, num_rows, heads, *_ = arguments
    gpu.counts["launches"] += 1
    if gpu.counts["launches"] == gpu.failing_launch:
        raise FakeCudaError("cudaErrorLaunchFailure")

    def read() -> tuple[list[Access], list[tuple[NDArray[np.int64], NDArray[np.int64], int]]]:
        """The tables as they are now, and the rows they name: in the cache, in staging memory."""
        sizes = (num_planes * _PLANE.itemsize, num_rows * 16)
        entries = bytes_at(rows, sizes[1]).view(np.int32).reshape(-1, 4).astype(np.int64)
        entries = entries[entries[:, 0] >= 0]
        pieces = int(entries[:, 2].max()) + 1 if len(entries) else 0
        if not 0 <= pieces <= _MANY or (entries[:, 2] < 0).any():
            raise FakeCudaError("cudaErrorIllegalAddress: no table")
        base = bytes_at(bases, 8 * pieces).view(np.int64)[entries[:, 2]]
        inputs = [(np.array([planes]), sizes[0]), (np.array([rows]), sizes[1])]
        if pieces:
            inputs.append((np.array([bases]), 8 * pieces))
        found: list[tuple[NDArray[np.int64], NDArray[np.int64], int]] = []
        for plane in bytes_at(planes, sizes[0]).view(_PLANE):
            if max(plane.item()) >= 1 << 60 or plane["row_nbytes"] > 1 << 20:
                raise FakeCudaError("cudaErrorIllegalAddress: no table")
            cache = int(plane["cache"]) + (
                entries[:, 0] * int(plane["cache_block"]) + entries[:, 1] * int(plane["cache_row"])
            )
            stage = base + int(plane["stage"]) + entries[:, 3] * int(plane["stage_row"])
            found += [
                (
                    cache + head * int(plane["cache_head"]),
                    stage + head * int(plane["stage_head"]),
                    int(plane["row_nbytes"]),
                )
                for head in range(heads)
            ]
        return inputs, found

    def run() -> None:
        for cache, stage, nbytes in read()[1]:
            into, out_of = (stage, cache) if name == "kv_gather" else (cache, stage)
            move_rows(into, out_of, nbytes)

    def touched() -> tuple[list[Access], list[Access]]:
        inputs, found = read()
        caches: list[Access] = [(cache, nbytes) for cache, _, nbytes in found]
        stages: list[Access] = [(stage, nbytes) for _, stage, nbytes in found]
        gathers = name == "kv_gather"
        return [*inputs, *(caches if gathers else stages)], stages if gathers else caches

    gpu.launch(stream, name, run, touched)
