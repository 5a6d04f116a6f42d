"""Between a ``DynamicCache`` and the views kvlayer copies from and into. No bytes move here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from kvlayer.layout import KVView
from kvlayer_transformers.engine import DynamicCache, Past
from kvlayer_transformers.geometry import Geometry, check_cache

__all__ = ["Layers", "allocate", "as_cache", "computed_columns", "layers_of", "view_of"]

Layers: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""K and V of every layer of the model in order, each ``(rows, heads, columns, head size)``."""


def allocate(geometry: Geometry, pads: Sequence[int], columns: int) -> Layers:
    """Uninitialised memory for ``columns`` columns of a batch, zero on padding.

    Attention gives padding no weight, but a weight of zero times an uninitialised NaN is NaN.
    """
    layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * geometry.num_layers
    for group in geometry.groups:
        for index in group.layers:
            keys, values = (
                torch.empty(
                    (len(pads), group.num_kv_heads, columns, size),
                    dtype=getattr(torch, group.dtype),
                    device=geometry.device,
                )
                for size in group.planes()
            )
            layers[index] = (keys, values)
    complete = [layer for layer in layers if layer is not None]
    for row, pad in enumerate(pads):
        for pair in complete:
            for plane in pair:
                plane[row, :, : min(pad, columns)] = 0
    return complete


def layers_of(past: Past, geometry: Geometry) -> Layers:
    """The tensors a cache holds, borrowed. Raises what ``check_cache`` raises."""
    check_cache(past, geometry.num_layers)
    return [(layer.keys, layer.values) for layer in past.layers]


def computed_columns(past: Past, geometry: Geometry) -> int:
    """How many leading columns every layer holds keys and values of.

    Less than :meth:`get_seq_length` says where a pass was interrupted between two layers.
    """
    if len(past.layers) < geometry.num_layers or not all(x.is_initialized for x in past.layers):
        return 0
    planes = [plane for keys, values in layers_of(past, geometry) for plane in (keys, values)]
    return min(plane.shape[-2] if plane.ndim > 1 else 0 for plane in planes)


def as_cache(layers: Layers, columns: int) -> Past:
    """A ``DynamicCache`` of the first ``columns`` columns, on the same memory."""
    past: Past = DynamicCache()
    for index, (keys, values) in enumerate(layers if columns else ()):
        # An update of nothing sets a layer up without the copy a real one would make.
        past.update(keys[:, :, :0], values[:, :, :0], index)
        past.layers[index].keys = keys[:, :, :columns]
        past.layers[index].values = values[:, :, :columns]
    return past


def view_of(layers: Layers, geometry: Geometry, row: int, start: int, stop: int) -> KVView:
    """One row's columns ``[start, stop)``, where its tokens lie. Borrowed, never copied."""
    caches = [[(layers[i][0][row], layers[i][1][row]) for i in g.layers] for g in geometry.groups]
    stream = 0
    if geometry.device.type == "cuda":
        stream = torch.cuda.current_stream(geometry.device).cuda_stream
    return KVView(caches, [range(start, stop)] * len(caches), stream)
