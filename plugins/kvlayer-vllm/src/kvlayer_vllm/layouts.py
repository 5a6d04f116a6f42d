"""How this rank's tensors lie, as kvlayer's layout: native blocks, or canonical through a stager.

The form is a choice of the fleet's: ``native`` keeps the blocks as the engine packed them, copies
fastest and is read by engines of the same kind and block size only; ``canonical`` is read by all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvlayer.abc.stager import MakeStager, Stager
from kvlayer.errors import UnsupportedError
from kvlayer.layout import FUSED_HND, MLA_BLOCKS, AttentionKind, GroupLayout, KVLayout
from kvlayer.memory.slab import Slab
from kvlayer_vllm.engine import VllmConfig, attention_isa, platform
from kvlayer_vllm.groups import EngineGroup

__all__ = ["RankLayout", "caches_of", "rank_layout"]


@dataclass(frozen=True, slots=True)
class RankLayout:
    """What one rank holds. Plain values: it goes from the workers to the scheduler."""

    layout: KVLayout
    isas: tuple[str, ...]
    """How the groups are packed; empty where rows are rows."""

    @property
    def isa(self) -> str:
        """The packing in one word, for a build's name."""
        return self.isas[0] if self.isas else "rows"

    def make_stager(self) -> MakeStager:
        """What copies between these tensors and host memory."""
        return partial(_make_stager, self.isas if self._is_unpacked else ())

    @property
    def _is_unpacked(self) -> bool:
        return bool(self.isas) and self.layout.groups[0].form == "canonical"


def _make_stager(isas: Sequence[str], layout: KVLayout, _slab: Slab, threads: int) -> Stager:
    if isas:
        from kvlayer_vllm.packed_stager import PackedStager

        return PackedStager(layout, isas, threads=threads)
    from kvlayer.staging.torch_stager import TorchStager

    return TorchStager(layout, threads=threads)


def rank_layout(
    vllm_config: VllmConfig, groups: Sequence[EngineGroup], form: str, *, rank: int
) -> RankLayout:
    """The layout of tensor-parallel rank ``rank``; ``form`` is ``native`` or ``canonical``.

    Raises ``UnsupportedError`` for a device or a packing that is not known.
    """
    device = platform()
    if device != "cpu":
        raise UnsupportedError(
            f"kvlayer cannot carry KV on {device}: the layouts of its attention backends are not "
            "tested yet",
            hint="the engine serves without kvlayer",
        )
    kinds = {each.group.kind for each in groups}
    if len(kinds) > 1:
        raise UnsupportedError("kvlayer cannot carry latents (MLA) beside keys and values on a CPU")
    if kinds == {AttentionKind.MLA}:
        if not vllm_config.scheduler_config.enable_chunked_prefill:
            # vLLM turns it and its own prefix cache off for CPU_MLA: a prompt that is computed
            # after a prefix has another answer there than one computed in a single pass.
            raise UnsupportedError(
                "kvlayer cannot carry latents (MLA) where vLLM computes each prompt in one pass",
                hint="its attention for AMX does not (bfloat16); the engine serves without kvlayer",
            )
        rows = [GroupLayout(each.group, MLA_BLOCKS, each.tokens_per_block) for each in groups]
        return RankLayout(KVLayout(tuple(rows)), ())
    cache_dtype = vllm_config.cache_config.cache_dtype
    isas = [
        attention_isa(each.dtype, each.tokens_per_block, each.group.head_size, cache_dtype)
        for each in groups
    ]
    found = [
        GroupLayout(
            each.group,
            FUSED_HND,
            each.tokens_per_block,
            heads=_heads(each, rank),
            form=form if form == "canonical" else _native(isa, each),
        )
        for each, isa in zip(groups, isas, strict=True)
    ]
    return RankLayout(KVLayout(tuple(found)), tuple(isas))


def _native(isa: str, held: EngineGroup) -> str:
    """The form's name pins everything about a block that the namespace does not say."""
    return f"native:vllm-cpu-{isa}-{held.tokens_per_block}"


def _heads(held: EngineGroup, rank: int) -> tuple[int, int]:
    total = held.group.num_kv_heads
    first = rank * held.heads % total  # more ranks than heads: neighbours hold the same one
    if held.heads == 1 and total > 1:
        first = rank % total
    return first, first + held.heads


def caches_of(
    groups: Sequence[EngineGroup], layout: KVLayout, tensors: Mapping[str, Any]
) -> list[list[Any]]:
    """The registered tensors, per group in the order of its layers.

    Raises ``UnsupportedError`` where a layer has none, or one of another shape than the CPU
    backend's.
    """
    found: list[list[Any]] = []
    for each, held in zip(groups, layout.groups, strict=True):
        layers: list[Any] = []
        for name in each.layer_names:
            tensor = tensors.get(name)
            if tensor is None:
                raise UnsupportedError(f"the engine registered no KV tensor for layer {name!r}")
            shape = tuple(getattr(tensor, "shape", ()))
            if each.group.kind is AttentionKind.MLA and shape[1:2] == (1,):
                tensor, shape = tensor.squeeze(1), shape[:1] + shape[2:]  # the one head it has
            if len(shape) != len(held.axes):
                raise UnsupportedError(
                    f"layer {name!r}: expected a KV tensor with axes {held.axes}, found {shape}"
                )
            layers.append(tensor)
        found.append(layers)
    return found
