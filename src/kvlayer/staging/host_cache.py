"""A cache tensor in host memory: its rows move as opaque bytes, through numpy views.

Rows are numpy void elements: one memmove each whatever the dtype, and NaN payloads survive.
Measured on one core with blocks of 16 tokens and rows of 256 bytes: numpy's indexed read beats
``torch.index_select`` in every layout, ``take`` beats both where the cache is contiguous, and for
writes a copy per block wins unless its rows are few and long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from kvlayer.layout import Tensor
from kvlayer.staging.address import Side, Strip
from kvlayer.staging.lazy import np, torch
from kvlayer.staging.slots import BlockRun, LooseRows, SlotRuns

if TYPE_CHECKING:
    from numpy import uint8, void
    from numpy.typing import NDArray

__all__ = ["Bytes", "HostCache"]

Bytes: TypeAlias = "NDArray[uint8]"
_Rows: TypeAlias = "NDArray[void]"

# A copy of its own pays from this many bytes on; below, one indexed copy of all blocks is faster.
_READ_NBYTES = 128 * 1024
_WRITE_NBYTES = 16 * 1024
_LONG_ROW = 32 * 1024  # one memmove of this size costs more than the Python around it


class HostCache:
    """One CPU tensor of an engine's cache, for the duration of one call."""

    def __init__(self, tensor: Tensor) -> None:
        # The whole storage as bytes: strips reach rows of any dtype and stride through it, and
        # numpy checks each against its bounds.
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self._memory: Bytes = storage.numpy()
        self._base: int = tensor.storage_offset() * tensor.element_size()

    def gather(self, host: Bytes, at: int, strip: Strip, runs: SlotRuns) -> None:
        """Copy a strip's rows to the layer that starts at ``host[at]``."""
        whole = strip.whole_blocks()
        for run in runs.runs:
            cache, payload = self._views(host, at, whole, run)
            if _mean_nbytes(run, whole) >= _READ_NBYTES or len(run.stretches) == 1:
                _copy_stretches(payload, cache, run, gather=True)
            # On any other memory ``take`` would first copy the whole cache.
            elif cache.flags.c_contiguous and payload.flags.c_contiguous:
                np.take(cache, run.ids, axis=2, out=payload, mode="clip")
            elif whole.row_nbytes >= _LONG_ROW:
                _copy_stretches(payload, cache, run, gather=True)
            else:
                payload[...] = cache[:, :, run.ids]
        if runs.loose is not None:
            cache, payload = self._loose_views(host, at, strip, runs.loose)
            payload[:, :, runs.loose.rows] = cache[:, :, runs.loose.blocks, runs.loose.tokens]

    def scatter(self, host: Bytes, at: int, strip: Strip, runs: SlotRuns) -> None:
        """Copy a strip's rows from the layer that starts at ``host[at]``."""
        whole = strip.whole_blocks()
        for run in runs.runs:
            cache, payload = self._views(host, at, whole, run)
            indexed = _mean_nbytes(run, whole) < _WRITE_NBYTES
            if whole.rows == 1:
                indexed = whole.row_nbytes <= _LONG_ROW
            if indexed and len(run.stretches) > 1:
                cache[:, :, run.ids] = payload
            else:
                _copy_stretches(payload, cache, run, gather=False)
        if runs.loose is not None:
            cache, payload = self._loose_views(host, at, strip, runs.loose)
            cache[:, :, runs.loose.blocks, runs.loose.tokens] = payload[:, :, runs.loose.rows]

    def _views(self, host: Bytes, at: int, strip: Strip, run: BlockRun) -> tuple[_Rows, _Rows]:
        """[plane, head, block, row] of the cache, and of the run's blocks in the payload."""
        payload = _rows(host, at + run.row * strip.host.token, strip, strip.host, len(run.ids))
        return _rows(self._memory, self._base, strip, strip.cache, strip.blocks), payload

    def _loose_views(
        self, host: Bytes, at: int, strip: Strip, loose: LooseRows
    ) -> tuple[_Rows, _Rows]:
        """[plane, head, block, row] of the cache, and [plane, head, row] of the payload."""
        cache = _rows(self._memory, self._base, strip, strip.cache, strip.blocks)
        one = strip._replace(rows=1, host=strip.host._replace(block=strip.host.token))
        return cache, _rows(host, at, one, one.host, int(loose.rows.max()) + 1)[..., 0]


def _copy_stretches(payload: _Rows, cache: _Rows, run: BlockRun, *, gather: bool) -> None:
    """One strided copy per stretch of neighbouring blocks."""
    for position, block, count in run.stretches:
        here = payload[:, :, position : position + count]
        there = cache[:, :, block : block + count]
        if gather:
            here[...] = there
        else:
            there[...] = here


def _mean_nbytes(run: BlockRun, strip: Strip) -> float:
    """Bytes of an average stretch."""
    block = strip.planes * strip.heads * strip.rows * strip.row_nbytes
    return len(run.ids) * block / len(run.stretches)


def _rows(memory: Bytes, base: int, strip: Strip, side: Side, blocks: int) -> _Rows:
    rows: _Rows = np.ndarray(
        (strip.planes, strip.heads, blocks, strip.rows),
        dtype=f"V{strip.row_nbytes}",
        buffer=memory.data,
        offset=base + side.offset,
        strides=(side.plane, side.head, side.block, side.token),
    )
    return rows
