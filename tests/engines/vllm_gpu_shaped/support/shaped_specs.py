"""The KV tensors of vLLM's GPU backends: 33 kinds, each in every layout that its backend takes.

Specs, page sizes and strides are vLLM's own classes'; no backend runs. Names of FlashInfer's that
its backends import and never use here are stood in for.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

__all__ = ["BLOCKS", "KINDS", "LAYERS", "Kind", "Tensors", "full_spec"]

LAYERS, BLOCKS = 3, 8
_HEADS, _HEAD_SIZE, _BLOCK = 4, 128, 16
_OPAQUE = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}


class _Absent(ModuleType):
    """A package that is not installed, as far as importing names from it goes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__class_getitem__": classmethod(lambda cls, _item: cls)})


def _stand_in(package: str, *modules: str) -> None:
    if find_spec(package) is not None:
        return
    for name in (package, *(f"{package}.{module}" for module in modules)):
        made = _Absent(name)
        made.__path__ = []
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = made


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of KV tensor. ``backend`` is the name of vLLM's backend, where one declares it."""

    name: str
    backend: str
    make: Callable[[], Any]
    has_rows: bool = True
    """A token is one row of each head; else only whole blocks mean something."""
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    """Layouts that vLLM refuses for it, and what it says."""
    cache: str = "auto"
    """vLLM's ``kv_cache_dtype``."""
    named: str = ""
    """What the backend calls itself, where its class cannot be imported here."""

    def called(self) -> str:
        """What the backend calls itself."""
        return self.named or str(self._class().get_name())

    def __str__(self) -> str:
        return self.name

    def spec(self) -> Any:
        """vLLM's description, as the backend changes it."""
        from vllm.v1.kv_cache_interface import AttentionSpec
        from vllm.v1.worker.utils import customize_attention_spec

        spec, backend = self.make(), self._class()
        if backend is None or not isinstance(spec, AttentionSpec):
            return spec
        return customize_attention_spec(backend, spec)

    def layouts(self) -> list[Any]:
        """Those that the backend takes, the one it likes best first."""
        from vllm.v1.attention.backends.utils import _DEFAULT_LAYOUT_PREFERENCE

        backend = self._class()
        declared = None if backend is None else backend.supported_kv_cache_layouts()
        return [*(declared or _DEFAULT_LAYOUT_PREFERENCE)]

    def kernel_block(self, spec: Any) -> int | None:
        """Tokens of a block as the kernels see it, where vLLM splits the scheduler's."""
        backend = self._class()
        sizes = [] if backend is None else backend.get_supported_kernel_block_sizes(spec)
        fixed = [size for size in sizes or () if isinstance(size, int)]
        if not fixed or spec.block_size in fixed:
            return None
        return max((size for size in fixed if spec.block_size % size == 0), default=None)

    def _class(self) -> Any:
        if not self.backend:
            return None
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        _stand_in("flashinfer", "decode", "prefill", "utils", "fp4_quantization", "mla", "cascade")
        return getattr(AttentionBackendEnum, self.backend).get_class()


class Tensors:
    """The layers' views of one allocation full of noise, as the engine registers them."""

    def __init__(self, kind: Kind, layout: Any) -> None:
        from vllm.v1.kv_cache_interface import KVCacheTensor, compute_layout_strides

        self.spec = spec = kind.spec()
        self.layout = layout
        self._kernel_block = kind.kernel_block(spec)
        layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
        last = layer_stride * (LAYERS - 1) + block_stride * (BLOCKS - 1) + spec.page_size_bytes
        size = max(last, layer_stride * LAYERS, block_stride * BLOCKS)
        self._tensor = KVCacheTensor(
            size=size,
            layers=[f"layer-{n}" for n in range(LAYERS)],
            layer_stride=layer_stride,
            block_stride=block_stride,
        )
        noise = torch.Generator().manual_seed(size)
        self.raw = torch.randint(-128, 128, (size,), dtype=torch.int8, generator=noise)
        self.views = self.views_of(self.raw)

    def views_of(self, raw: torch.Tensor) -> list[torch.Tensor]:
        """The layers of another allocation of the same shape: ``[block, head, token, row]``."""
        from vllm.v1.kv_cache_interface import create_kv_cache_views

        found: list[torch.Tensor] = create_kv_cache_views(
            raw,
            self.spec,
            BLOCKS,
            self.layout,
            self._tensor,
            kernel_block_size=self._kernel_block if self.layout.is_layer_compact else None,
        )
        return found


def _stored(cache: str) -> torch.dtype:
    return torch.bfloat16 if cache in ("auto", "bfloat16") else torch.uint8


def _full(cache: str = "auto", **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

        fields = {"block_size": _BLOCK, "num_kv_heads": _HEADS, "head_size": _HEAD_SIZE, **changes}
        return FullAttentionSpec(
            dtype=_stored(cache), kv_quant_mode=get_kv_quant_mode(cache), **fields
        )

    return make


def full_spec(cache: str, **changes: Any) -> Any:
    """vLLM's description of full attention whose KV is kept as ``cache`` says."""
    return _full(cache, **changes)()


def _window() -> Any:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(
        block_size=_BLOCK,
        num_kv_heads=_HEADS,
        head_size=_HEAD_SIZE,
        dtype=torch.bfloat16,
        sliding_window=64,
    )


def _latent(cache: str = "auto", *, block: int = 64) -> Callable[[], Any]:
    def make() -> Any:
        from vllm.v1.kv_cache_interface import MLAAttentionSpec, get_kv_quant_mode

        return MLAAttentionSpec(
            block_size=block,
            num_kv_heads=1,
            max_tp_shards=1,
            head_size=576,
            dtype=_stored(cache),
            cache_dtype_str=cache,
            kv_quant_mode=get_kv_quant_mode(cache),
            state_content_bytes=_OPAQUE.get(cache),
        )

    return make


def _indexer() -> Any:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return MLAAttentionSpec(
        block_size=64, num_kv_heads=1, max_tp_shards=1, head_size=132, dtype=torch.uint8
    )


def _sparse_v4(**changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        from vllm.v1 import kv_cache_interface as interface

        fields: dict[str, Any] = {
            "num_kv_heads": 1,
            "max_tp_shards": 1,
            "head_size": 512,
            "dtype": torch.uint8,
            "cache_dtype_str": "fp8_ds_mla",
            "alignment": 576,
            "model_version": "deepseek_v4",
            "state_content_bytes": 584,
            **changes,
        }
        return getattr(interface, fields.pop("kind"))(**fields)

    return make


def _mamba() -> Any:
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(
        block_size=528,
        shapes=((3, 288), (8, 16, 16)),
        dtypes=(torch.bfloat16, torch.float32),
        page_size_padded=None,
    )


_PADDED = "Page padding requires"
_SPLIT = "does not store blocks as dense, unpadded pages"
_PER_TOKEN = ("int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
KINDS = [
    Kind("FLASH_ATTN bf16", "FLASH_ATTN", _full()),
    Kind("FLASH_ATTN fp8", "FLASH_ATTN", _full("fp8"), cache="fp8"),
    Kind("FLASH_ATTN 1 KV head", "FLASH_ATTN", _full(num_kv_heads=1)),
    Kind("FLASH_ATTN sliding window", "FLASH_ATTN", _window),
    Kind("FLASH_ATTN_DIFFKV", "FLASH_ATTN_DIFFKV", _full(head_size=192, head_size_v=128)),
    Kind("TRITON_ATTN bf16", "TRITON_ATTN", _full()),
    *[
        Kind(f"TRITON_ATTN {cache}", "TRITON_ATTN", _full(cache), cache=cache)
        for cache in _PER_TOKEN
    ],
    Kind("TRITON_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV", _full(head_size=192, head_size_v=128)),
    Kind("FLASHINFER bf16", "FLASHINFER", _full()),
    Kind("FLASHINFER fp8", "FLASHINFER", _full("fp8"), cache="fp8"),
    Kind("FLASHINFER nvfp4", "FLASHINFER", _full("nvfp4"), has_rows=False, cache="nvfp4"),
    Kind(
        "FLASHINFER block 256, kernel 64",
        "FLASHINFER",
        _full(block_size=256, num_kv_heads=2),
        refused={"LHBNC": _SPLIT},
    ),
    Kind("FLEX_ATTENTION bf16", "FLEX_ATTENTION", _full()),
    Kind("B12X bf16", "B12X", _full(block_size=64)),
    Kind("HPC_ATTN", "HPC_ATTN", _full(block_size=64)),
    Kind(
        "TURBOQUANT 4bit_nc",
        "TURBOQUANT",
        _full("turboquant_4bit_nc"),
        cache="turboquant_4bit_nc",
    ),
    Kind("TRITON_MLA bf16", "TRITON_MLA", _latent(block=16)),
    Kind("CUTLASS_MLA bf16", "", _latent(block=128), named="CUTLASS_MLA"),  # wants CUDA
    Kind("FLASHMLA bf16", "FLASHMLA", _latent()),
    Kind("FLASHMLA fp8", "FLASHMLA", _latent("fp8"), cache="fp8"),
    Kind("FLASH_ATTN_MLA bf16", "", _latent(), named="FLASH_ATTN_MLA"),  # as well
    Kind("FLASHINFER_MLA bf16", "FLASHINFER_MLA", _latent()),
    Kind("FLASHMLA_SPARSE bf16", "FLASHMLA_SPARSE", _latent()),
    *[
        Kind(f"FLASHMLA_SPARSE {cache}", "FLASHMLA_SPARSE", _latent(cache), cache=cache)
        for cache in _OPAQUE
    ],
    Kind("FLASHINFER_MLA_SPARSE bf16", "FLASHINFER_MLA_SPARSE", _latent()),
    Kind(
        "DeepSeek V3.2 indexer",
        "",
        _indexer,
        has_rows=False,
        cache="fp8_ds_mla",
        named="DEEPSEEK_V32_INDEXER",
    ),
    Kind(
        "DeepSeek V4 sparse, 4 tokens an entry",
        "",
        _sparse_v4(kind="MLAAttentionSpec", block_size=256, tokens_per_state=4),
        has_rows=False,
        named="V4_FLASHMLA_SPARSE",
    ),
    Kind(
        "DeepSeek V4 window",
        "",
        _sparse_v4(kind="SlidingWindowMLASpec", block_size=64, sliding_window=128),
        has_rows=False,
        named="DEEPSEEK_SPARSE_SWA",
    ),
    Kind(
        "a hybrid's padded page",
        "FLASH_ATTN",
        _full(page_size_padded=2 * _HEADS * _BLOCK * _HEAD_SIZE * 2 + 4096),
        refused={"BHLNC": _PADDED, "LHBNC": _PADDED},
    ),
    Kind("Mamba 2 state", "", _mamba, has_rows=False),
]
