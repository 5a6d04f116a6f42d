"""A stand-in for an engine's memory: paged KV tensors of random bits in any layout."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvlayer.layout import AttentionKind, GroupLayout, KVLayout, KVView

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype an engine would use for a logical KV dtype."""
    return _DTYPES[name]


def random_bits(shape: Sequence[int], itemsize: int, seed: int) -> torch.Tensor:
    """Random bit patterns, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(_BITS[itemsize])
    return torch.randint(
        info.min, info.max, tuple(shape), generator=generator, dtype=_BITS[itemsize]
    )


@dataclass
class Engine:
    """Tensors of one rank: ``caches[g][i]`` as the layout says, ``num_blocks`` blocks each."""

    layout: KVLayout
    num_blocks: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.caches: list[list[Any]] = []
        number = self.seed * 1000
        for group in self.layout.groups:
            lo, hi = group.layer_range
            layers: list[Any] = []
            for _ in range(lo, hi):
                tensors = []
                for plane in range(2 if group.is_pair else 1):
                    number += 1
                    bits = random_bits(self._shape(group, plane), group.group.itemsize, number)
                    tensors.append(bits.view(_DTYPES[group.group.dtype]))
                layers.append(tuple(tensors) if group.is_pair else tensors[0])
            self.caches.append(layers)

    def _shape(self, group: GroupLayout, plane: int) -> list[int]:
        heads = group.head_range[1] - group.head_range[0]
        rows = group.group.planes()
        dim = rows[plane] if group.is_pair else (rows[0] if rows else 0)
        tokens = group.tokens_per_block
        if "block" not in group.axes:
            tokens = self.num_blocks * group.tokens_per_block
        extent = {
            "kv": 2,
            "block": self.num_blocks,
            "token": tokens,
            "head": heads,
            "dim": dim,
            "kvdim": sum(rows),
            "state": group.group.state_nbytes // group.group.itemsize,
        }
        return [extent[axis] for axis in group.axes]

    def slots(self, count: int, *, seed: int = 0) -> torch.Tensor:
        """Slots for ``count`` tokens in randomly chosen blocks."""
        size = self.layout.groups[0].tokens_per_block
        if "block" not in self.layout.groups[0].axes:
            return torch.arange(count)
        blocks = random.Random(seed).sample(range(self.num_blocks), -(-count // size))
        return (
            torch.tensor(blocks, dtype=torch.int64)[:, None] * size + torch.arange(size)
        ).reshape(-1)[:count]

    def view(self, slots: Any) -> KVView:
        """A view in which every group uses the same slots."""
        return KVView(self.caches, [slots] * len(self.layout.groups))

    def read(self, slots: Any, *, heads: tuple[int, int] | None = None) -> list[torch.Tensor]:
        """The bits at these slots: per group, layer and plane, ``[token, head, dim]``.

        Straight indexing, one naive step after the other: the oracle of the tests. ``heads``
        selects heads by their number in the model. State groups are left out.
        """
        found: list[torch.Tensor] = []
        for group, layers in zip(self.layout.groups, self.caches, strict=True):
            for cache in layers if group.group.kind is not AttentionKind.STATE else ():
                found += [p[slots].contiguous() for p in self._planes(group, cache, heads)]
        return found

    @staticmethod
    def _planes(
        group: GroupLayout, cache: Any, heads: tuple[int, int] | None
    ) -> list[torch.Tensor]:
        """Each plane as ``[slot, head, dim]`` integers."""
        bits = _BITS[group.group.itemsize]
        tensors = cache if isinstance(cache, tuple) else (cache,)
        planes = []
        for tensor in tensors:
            named = dict(zip(group.axes, range(tensor.ndim), strict=True))
            order = [
                named[axis]
                for axis in ("block", "token", "kv", "head", "dim", "kvdim")
                if axis in named
            ]
            moved = tensor.view(bits).permute(order)
            if "block" not in named:
                moved = moved[None]
            flat = moved.reshape(-1, *moved.shape[2:])
            if "kv" in named:
                planes += [flat[:, 0], flat[:, 1]]
            elif "kvdim" in named:
                k = group.group.planes()[0]
                planes += [flat[..., :k], flat[..., k:]]
            else:
                planes.append(flat)
        planes = [p if p.ndim == 3 else p[:, None, :] for p in planes]
        if heads is not None and group.group.kind is AttentionKind.MHA:
            lo = group.head_range[0]
            planes = [p[:, heads[0] - lo : heads[1] - lo] for p in planes]
        return planes


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two reads agree bit for bit."""
    return len(left) == len(right) and all(
        torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )
