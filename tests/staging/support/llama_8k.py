"""A prompt of 8,192 tokens of Llama-3-8B in bf16: 1 GiB, lent by an engine that has no GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kvlayer.abc.stager import HostCopy
from kvlayer.identity.keys import Part
from kvlayer.layout import NHD, AttentionKind, Axes, KVGroup, KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload

__all__ = ["IN_ORDER", "PAYLOAD_NBYTES", "SHUFFLED", "Lent", "layout", "lent"]

LLAMA = KVGroup(AttentionKind.MHA, tuple(range(32)), "bfloat16", 8, 128)
BLOCK, CHUNK, TOKENS = 16, 256, 8192
PAYLOAD_NBYTES = 1 << 30  # 128 KiB a token
IN_ORDER = torch.arange(TOKENS // BLOCK)
SHUFFLED = torch.randperm(TOKENS // BLOCK, generator=torch.Generator().manual_seed(1))


class Lent(NamedTuple):
    """What a call takes. Nobody touches the memory, so it costs nothing."""

    slab: Slab
    view: KVView
    copies: list[HostCopy]

    def close(self) -> None:
        self.copies.clear()
        self.slab.close()


def layout(axes: Axes = NHD, form: str = "canonical") -> KVLayout:
    return KVLayout.single(LLAMA, axes, tokens_per_block=BLOCK, form=form)


def lent(layout: KVLayout, blocks: torch.Tensor, kind: type[torch.Tensor] = torch.Tensor) -> Lent:
    """The whole prompt in these blocks of tensors of this kind, and its chunks in a slab."""
    (held,) = layout.groups
    payload = Payload.of(LLAMA, Part(0, (0, 32), (0, 8), held.form), CHUNK)
    extent = {"kv": 2, "block": TOKENS // BLOCK, "token": BLOCK, "head": 8, "dim": 128}
    shape = [extent[axis] for axis in held.axes]
    cache: Any = torch.empty(shape, dtype=torch.bfloat16).as_subclass(kind)
    slots = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).reshape(-1)
    slab = Slab(PAYLOAD_NBYTES)
    copies = [
        HostCopy(payload, slab.view(at * payload.nbytes, payload.nbytes), at * CHUNK, CHUNK)
        for at in range(TOKENS // CHUNK)
    ]
    return Lent(slab, KVView.single([cache] * 32, slots), copies)
