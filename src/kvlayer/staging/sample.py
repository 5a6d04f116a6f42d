"""Tensors to measure with: an engine's memory full of random bits, and a bare copy beside it."""

from __future__ import annotations

import time
from typing import Any

from kvlayer.layout import KVLayout, KVView
from kvlayer.staging.lazy import torch

__all__ = ["Memcpy", "paged_view"]


def paged_view(layout: KVLayout, num_blocks: int, *, seed: int, device: str = "cpu") -> KVView:
    """Random KV of a one-group layout; the view covers every block, shuffled."""
    (group,) = layout.groups
    extents = {
        "kv": 2,
        "block": num_blocks,
        "token": group.tokens_per_block,
        "head": group.head_range[1] - group.head_range[0],
        "dim": group.group.head_size,
        "kvdim": sum(group.group.planes()),
    }
    shape = [extents[axis] for axis in group.axes]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, group.group.dtype)

    def tensor() -> Any:
        return torch.randn(shape, generator=noise, device=device).to(dtype)

    layers = range(*group.layer_range)
    caches = [(tensor(), tensor()) if group.is_pair else tensor() for _ in layers]
    blocks = torch.randperm(num_blocks, generator=generator)
    offsets = torch.arange(group.tokens_per_block)
    slots = (blocks[:, None] * group.tokens_per_block + offsets).reshape(-1)
    return KVView.single(caches, slots)


class Memcpy:
    """A copy of ``nbytes`` bytes between two buffers; calling it returns its seconds."""

    def __init__(self, nbytes: int) -> None:
        self._source: Any = torch.ones(nbytes, dtype=torch.uint8)
        self._target: Any = torch.ones(nbytes, dtype=torch.uint8)

    def __call__(self) -> float:
        started = time.perf_counter()
        self._target.copy_(self._source)
        return time.perf_counter() - started
