"""A cache tensor on any torch device: its rows move as integers, through torch indexing.

Slower than a stager of the device's own, but universal, and it needs nothing but torch.
"""

from __future__ import annotations

from typing import Any

from kvlayer.layout import Tensor
from kvlayer.staging.address import Side, Strip
from kvlayer.staging.lazy import np, torch
from kvlayer.staging.moves import Transfer
from kvlayer.staging.slots import BlockRun, IntArray, LooseRows, SlotRuns
from kvlayer.staging.steps import Bytes

__all__ = ["DeviceCache"]


class DeviceCache:
    """One tensor of an engine's cache on any device, for the duration of one call."""

    def __init__(self, tensor: Tensor) -> None:
        self._item: int = tensor.element_size()
        # Integers of the same size: a float copy may quieten a NaN on some devices, and torch
        # refuses writes to the tensor itself when the engine made it in inference mode.
        self._bits: Any = getattr(torch, f"int{8 * self._item}")
        self._tensor = tensor.detach().view(self._bits)

    def gather(self, layer: Bytes, transfer: Transfer, strip: int) -> None:
        """Copy the transfer's ``strip``-th strip to the payload's layer ``layer``."""
        self._gather(layer, transfer.strips[strip], transfer.runs)

    def scatter(self, layer: Bytes, transfer: Transfer, strip: int) -> None:
        """Copy the transfer's ``strip``-th strip from the payload's layer ``layer``."""
        self._scatter(layer, transfer.strips[strip], transfer.runs)

    def _gather(self, layer: Bytes, strip: Strip, runs: SlotRuns) -> None:
        memory = torch.from_numpy(layer).view(self._bits)
        cache = self._rows(self._tensor, 0, strip, strip.cache, strip.blocks)
        for run in runs.runs:
            payload = self._run(memory, strip, run)
            payload.copy_(cache.index_select(2, self._on_device(run.ids)))
        if runs.loose is not None:
            rows, payload = self._loose(memory, strip, runs.loose)
            found = cache[:, :, *self._index(runs.loose)]
            payload[:, :, rows, 0] = found.cpu()

    def _scatter(self, layer: Bytes, strip: Strip, runs: SlotRuns) -> None:
        if not layer.flags.writeable:
            layer = layer.copy()  # torch warns about read-only memory
        memory = torch.from_numpy(layer).view(self._bits)
        cache = self._rows(self._tensor, 0, strip, strip.cache, strip.blocks)
        for run in runs.runs:
            payload = self._run(memory, strip, run)
            cache.index_copy_(2, self._on_device(run.ids), payload.to(self._tensor.device))
        if runs.loose is not None:
            rows, payload = self._loose(memory, strip, runs.loose)
            found = payload[:, :, rows, 0].to(self._tensor.device)
            cache[:, :, *self._index(runs.loose)] = found

    def _run(self, memory: Tensor, strip: Strip, run: BlockRun) -> Tensor:
        """[plane, head, block, row, element] of the run's blocks in the payload."""
        first = run.row * strip.host.token
        return self._rows(memory, first, strip, strip.host, len(run.ids))

    def _loose(self, memory: Tensor, strip: Strip, loose: LooseRows) -> tuple[Tensor, Tensor]:
        """Indices of loose rows, and [plane, head, row, 1, element] of the payload."""
        one = strip._replace(rows=1, host=strip.host._replace(block=strip.host.token))
        payload = self._rows(memory, 0, one, one.host, int(loose.rows.max()) + 1)
        return torch.from_numpy(loose.rows), payload

    def _index(self, loose: LooseRows) -> tuple[Tensor, Tensor]:
        return self._on_device(loose.blocks), self._on_device(loose.tokens)

    def _on_device(self, index: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(index)).to(self._tensor.device)

    def _rows(self, memory: Tensor, at: int, strip: Strip, side: Side, blocks: int) -> Tensor:
        item = self._item
        strides = [n // item for n in (side.plane, side.head, side.block, side.token)]
        return memory.as_strided(
            (strip.planes, strip.heads, blocks, strip.rows, strip.row_nbytes // item),
            (*strides, 1),
            memory.storage_offset() + (at + side.offset) // item,
        )
