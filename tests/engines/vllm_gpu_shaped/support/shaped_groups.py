"""vLLM's KV tensors in kvlayer's words: which group, which axes, and the views in their order.

The adapter knows the CPU backend's alone today. What it says of the others once it carries them
takes this file's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from shaped_specs import LAYERS, Kind, Tensors

from kvlayer.layout import AttentionKind, GroupLayout, KVGroup, KVLayout

__all__ = ["Held", "held"]

_DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.uint8: "fp8_e4m3",
}


@dataclass(frozen=True, slots=True)
class Held:
    """The tensors of one kind in one layout, as a stager takes them."""

    layout: KVLayout
    views: list[torch.Tensor]
    tokens_per_block: int

    @property
    def group(self) -> KVGroup:
        return self.layout.groups[0].group


def held(kind: Kind, tensors: Tensors, *, is_native: bool) -> Held | None:
    """None where kvlayer has no words for it."""
    from vllm.v1.kv_cache_interface import AttentionSpec

    spec = tensors.spec
    if isinstance(spec, AttentionSpec) and spec.tokens_per_state != 1:
        return None  # a group does not say how many tokens an entry holds
    group, axes = _group(spec), _axes(spec)
    views = [_shaped(spec, group, view) for view in tensors.views]
    tokens = tensors.views[0].shape[2] if group.kind is not AttentionKind.STATE else spec.block_size
    form = "canonical"
    if is_native:
        # A native form keeps a block as it lies: its axes are named in the order of memory.
        order = sorted(range(1, len(axes)), key=lambda axis: (-views[0].stride(axis), axis))
        axes = ("block", *(axes[axis] for axis in order))
        views = [view.permute(0, *order) for view in views]
        form = "native:vllm-test"
    return Held(KVLayout((GroupLayout(group, axes, tokens, form=form),)), views, tokens)


def _group(spec: Any) -> KVGroup:
    from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec, SlidingWindowMLASpec

    layers = tuple(range(LAYERS))
    if isinstance(spec, MambaSpec):
        return KVGroup(AttentionKind.STATE, layers, "int8", state_nbytes=spec.page_size_bytes)
    row, heads = spec.state_content_size_bytes, spec.num_kv_heads
    if _has_slots(spec):
        if spec.kv_quant_mode.is_nvfp4:
            return KVGroup(AttentionKind.MHA, layers, "int8", heads, row)
        return KVGroup(AttentionKind.MHA, layers, _DTYPES[spec.dtype], heads, spec.head_size)
    is_opaque = spec.state_content_bytes is not None  # bytes with scales among them
    dtype = "int8" if is_opaque else _DTYPES[spec.dtype]
    if isinstance(spec, MLAAttentionSpec | SlidingWindowMLASpec):
        size = row if is_opaque else spec.head_size
        return KVGroup(AttentionKind.MLA, layers, dtype, head_size=size)
    if is_opaque:
        return KVGroup(AttentionKind.MHA, layers, "int8", heads, row // 2, row - row // 2)
    return KVGroup(AttentionKind.MHA, layers, dtype, heads, spec.head_size, spec.head_size_v)


def _axes(spec: Any) -> tuple[str, ...]:
    from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec, SlidingWindowMLASpec

    if isinstance(spec, MambaSpec):
        return ("block", "state")
    if isinstance(spec, MLAAttentionSpec | SlidingWindowMLASpec):
        return ("block", "token", "dim")
    if not _has_slots(spec):
        return ("block", "head", "token", "kvdim")
    if spec.kv_quant_mode.is_nvfp4:
        return ("block", "kv", "head", "token", "dim")
    return ("block", "kv", "token", "head", "dim")


def _shaped(spec: Any, group: KVGroup, view: torch.Tensor) -> torch.Tensor:
    """A layer's view with the axes of :func:`_axes`."""
    if group.dtype == "int8":
        view = view.view(torch.int8)
    if group.kind is AttentionKind.MLA:
        return view.squeeze(1)
    if group.kind is AttentionKind.STATE:
        return view.squeeze(1).squeeze(1)
    if not _has_slots(spec):
        return view
    if spec.kv_quant_mode.is_nvfp4:
        return view.unflatten(1, (2, spec.num_kv_heads))
    return view.unflatten(-1, (spec.num_kv_heads, spec.head_size))


def _has_slots(spec: Any) -> bool:
    """Whether K and V lie beside each other as heads do."""
    return getattr(spec, "num_head_slots", None) is not None
