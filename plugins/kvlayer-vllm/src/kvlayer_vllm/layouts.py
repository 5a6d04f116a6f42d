"""How this rank's tensors lie, as kvlayer's layout: canonical rows, or whole blocks as they are.

A view of vLLM's has the axes that its spec says, whatever the backend and the order in memory
(``specs``); the order and the size of a block are the tensor's own. The form is a choice of the
fleet's: ``canonical`` is read by all; ``native`` keeps the blocks as the engine has them and is
read by engines with the same block alone.

By default rows are canonical: on a GPU that is as fast as whole blocks are (``docs/gpu.md``), and
rows need no tails of whole blocks. Blocks that a CPU's attention has packed are native, since they
would have to be unpacked, and so are pages whose scales lie behind the rows, since nothing else can
be done with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from kvlayer.abc.stager import MakeStager, Stager
from kvlayer.errors import LayoutError, UnsupportedError
from kvlayer.layout import AttentionKind, GroupLayout, KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer_vllm.engine import VllmConfig, attention_backend, attention_isa, platform
from kvlayer_vllm.groups import EngineGroup

__all__ = ["COMPARED", "RankLayout", "caches_of", "check_device", "rank_layout"]

COMPARED: Final = frozenset(
    {
        "B12X",
        "CUTLASS_MLA",
        "DEEPSEEK_SPARSE_SWA",
        "DEEPSEEK_V32_INDEXER",
        "FLASHINFER",
        "FLASHINFER_MLA",
        "FLASHINFER_MLA_SPARSE",
        "FLASHMLA",
        "FLASHMLA_SPARSE",
        "FLASH_ATTN",
        "FLASH_ATTN_DIFFKV",
        "FLASH_ATTN_MLA",
        "FLEX_ATTENTION",
        "HPC_ATTN",
        "TRITON_ATTN",
        "TRITON_ATTN_DIFFKV",
        "TRITON_MLA",
        "TURBOQUANT",
    }
)
"""vLLM's attention backends for CUDA whose tensors the tests move and compare to the byte."""
_PACKING = "CPU_ATTN"
_CPU_LATENTS = frozenset({"CPU_MLA", "AMX_MLA"})
_LETTERS: Final = {"kv": "k", "head": "h", "token": "n", "dim": "c", "kvdim": "c"}
"""Of the axes, in vLLM's words for its layouts; ``k`` where K and V are apart."""


@dataclass(frozen=True, slots=True)
class RankLayout:
    """What one rank holds. Plain values: it goes from the workers to the scheduler."""

    layout: KVLayout
    isas: tuple[str, ...]
    """How the groups are packed; empty where rows are rows."""

    @property
    def isa(self) -> str:
        """The packing in one word, for a build's name."""
        return next((isa for isa in self.isas if isa), "rows")

    @property
    def native_step(self) -> int:
        """Chunks and tails are multiples of so many tokens; 1 where no group is native."""
        native = (each.tokens_per_block for each in self.layout.groups if each.form != "canonical")
        return math.lcm(*native)

    @property
    def state_step(self) -> int:
        """States are kept at multiples of so many tokens; 1 where there are none."""
        layouts = self.layout.groups
        return math.lcm(
            *(g.tokens_per_block for g in layouts if g.group.kind is AttentionKind.STATE)
        )

    def make_stager(self) -> MakeStager:
        """What copies between these tensors and host memory."""
        return partial(_make_stager, self.isas)


def _make_stager(isas: Sequence[str], layout: KVLayout, slab: Slab, threads: int) -> Stager:
    if not isas:  # rows of any device: through its pipeline where it has one
        from kvlayer.staging.cuda.stager import DeviceStager

        return DeviceStager(layout, slab=slab, threads=threads)
    if any(isa and each.form == "canonical" for isa, each in zip(isas, layout.groups, strict=True)):
        from kvlayer_vllm.packed_stager import PackedStager

        return PackedStager(layout, isas, threads=threads)
    from kvlayer.staging.torch_stager import TorchStager

    return TorchStager(layout, threads=threads)


def check_device() -> str:
    """``cpu`` or ``cuda``. Raises ``UnsupportedError`` for another device."""
    device = platform()
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"kvlayer cannot carry KV on {device}: the layouts of its attention backends are not "
            "tested yet",
            hint="the engine serves without kvlayer",
        )
    return device


def rank_layout(
    vllm_config: VllmConfig,
    groups: Sequence[EngineGroup],
    form: str,
    tensors: Mapping[str, Any],
    *,
    rank: int,
) -> RankLayout:
    """How rank ``rank`` of the engine holds its stage's layers; ``tensors`` are theirs, by name.

    ``form`` is ``canonical``, ``native`` or ``auto``, which is the default of the module's text.
    Raises ``UnsupportedError``, naming it, for a device, a backend, a packing or a form that cannot
    be.
    """
    tensor_ranks = int(vllm_config.parallel_config.tensor_parallel_size)
    isas = _isas(vllm_config, groups)
    found: list[GroupLayout] = []
    for number, each in enumerate(groups):
        view = _view(each, each.layer_names[0], tensors)
        heads = None
        if each.group.kind is AttentionKind.MHA:
            heads = _heads(each, rank % tensor_ranks, tensor_ranks)
        axes, size, name = _lies(each, view, form, isas[number] if isas else "")
        found.append(GroupLayout(each.group, axes, size, heads=heads, form=name))
    if len({*isas}) > 1 and "" in isas and form == "canonical":
        raise UnsupportedError(
            "kvlayer cannot carry recurrent states beside a CPU's packed blocks in form = "
            "'canonical'",
            hint="form = 'auto' keeps the blocks as they are",
        )
    return RankLayout(KVLayout(tuple(found)), isas)


def _isas(vllm_config: VllmConfig, groups: Sequence[EngineGroup]) -> tuple[str, ...]:
    """How the CPU's attention has packed the groups; empty where rows are rows."""
    device = check_device()
    groups_of_attention = [each for each in groups if each.group.kind is not AttentionKind.STATE]
    names = [name for each in groups_of_attention for name in each.layer_names]
    backends = {name: attention_backend(vllm_config, name) for name in names}
    known = COMPARED if device == "cuda" else COMPARED | _CPU_LATENTS | {_PACKING, ""}
    for layer, backend in backends.items():
        if backend not in known:
            raise UnsupportedError(
                f"kvlayer cannot carry KV of layer {layer!r}: its attention backend is "
                f"{backend or 'not known'}, and nobody has compared how that lays KV out",
                hint="choose another one (--attention-backend), or serve without kvlayer",
            )
    if device == "cuda" or COMPARED.intersection(backends.values()):
        return ()
    kinds = {each.group.kind for each in groups_of_attention}
    if not kinds:
        return ()
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
        return ()
    model = vllm_config.model_config.dtype
    cache_dtype = vllm_config.cache_config.cache_dtype
    return tuple(
        attention_isa(model, each.tokens_per_block, each.group.head_size, cache_dtype)
        if each.group.kind is not AttentionKind.STATE
        else ""
        for each in groups
    )


def _lies(each: EngineGroup, view: Any, form: str, isa: str) -> tuple[tuple[str, ...], int, str]:
    """Axes in the order of memory, tokens of a block, and the form, whose name pins the rest.

    Blocks that hold the same bytes have one name, whatever lies between them: the layouts LBHNC and
    BLHNC differ in nothing else. What a byte means is the namespace's.
    """
    axes, group = each.content.axes, each.group
    if group.kind is AttentionKind.STATE:
        return axes, each.tokens_per_block, "canonical"
    size = int(view.shape[axes.index("token")])
    if not size or each.tokens_per_block % size:
        raise UnsupportedError(
            f"layer {each.layer_names[0]!r}: expected blocks that divide the scheduler's "
            f"{each.tokens_per_block} tokens, found {size}"
        )
    if isa:
        if form != "canonical":
            return axes, size, f"native:vllm-cpu-{isa}-{size}"
        if group.dtype.startswith("fp8"):
            raise UnsupportedError(
                "kvlayer cannot carry a CPU's fp8 blocks in form = 'canonical': nobody has "
                "compared how they are packed",
                hint="on one rank form = 'auto' keeps them as they are",
            )
        return axes, size, "canonical"
    if form == "canonical" and each.content.is_paged:
        raise UnsupportedError(
            f"kvlayer cannot carry {group.quantisation or group.dtype} of layer "
            f"{each.layer_names[0]!r} in form = 'canonical': only whole blocks mean something",
            hint="on one rank form = 'auto' keeps these as they are, and the others canonical",
        )
    if form != "native" and not each.content.is_paged:
        return axes, size, "canonical"
    order = sorted(range(1, len(axes)), key=lambda axis: (-view.stride(axis), axis))
    letters = "".join(_LETTERS[axes[axis]] for axis in order if view.shape[axis] > 1)
    return ("block", *(axes[axis] for axis in order)), size, f"native:vllm-{letters}-{size}"


def _heads(held: EngineGroup, rank: int, ranks: int) -> tuple[int, int]:
    """The KV heads of one of ``ranks`` tensor-parallel ranks, as vLLM deals them out.

    Of more ranks than heads neighbours hold the same one.
    """
    replicas = max(ranks // held.group.num_kv_heads, 1)
    first = rank // replicas * held.heads
    return first, first + held.heads


def caches_of(
    groups: Sequence[EngineGroup], layout: KVLayout, tensors: Mapping[str, Any]
) -> list[list[Any]]:
    """The registered tensors as views with the layout's axes, per group in the order of its layers.

    Raises ``UnsupportedError`` where a layer has none, or one that does not lie as the layout says.
    """
    from kvlayer.staging.torch_view import GeometryReader

    found: list[list[Any]] = []
    for each, held in zip(groups, layout.groups, strict=True):
        order = [each.content.axes.index(axis) for axis in held.axes]
        views = (_view(each, name, tensors) for name in each.layer_names)
        found.append([view.permute(order) for view in views])
    nowhere = [range(0) for _ in groups]
    try:
        GeometryReader(layout).read(KVView(found, nowhere))
    except LayoutError as exc:
        forms = ", ".join(dict.fromkeys(each.form for each in layout.groups))
        raise UnsupportedError(
            f"kvlayer cannot carry these KV tensors in form {forms}: {exc}",
            hint="where a block's heads lie apart, form = 'canonical'",
        ) from None
    return found


def _view(each: EngineGroup, name: str, tensors: Mapping[str, Any]) -> Any:
    tensor = tensors.get(name)
    if tensor is None:
        raise UnsupportedError(f"the engine registered no KV tensor for layer {name!r}")
    axes = each.content.axes
    try:
        view = each.content.shaped(tensor)
        is_view = view.dim() == len(axes)
    except (RuntimeError, IndexError, AttributeError):  # whatever it is, it is none of vLLM's
        view, is_view = tensor, False
    if not is_view:
        shape = tuple(getattr(tensor, "shape", ()))
        raise UnsupportedError(f"layer {name!r}: expected a KV tensor of {axes}, found {shape}")
    return view
