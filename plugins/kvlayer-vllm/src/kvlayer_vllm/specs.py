"""What one layer keeps, by vLLM's description of it: rows, rows with their scales, or whole pages.

Since 0.31 every layer of vLLM's is a view ``[block, head, token, content]``, whatever its backend
and however its strides run. A spec says what the content is. What nobody has compared with bytes is
refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from typing import Any, NoReturn

import torch

from kvlayer.errors import UnsupportedError
from kvlayer.layout import FUSED_HND, MLA_BLOCKS, STATE_BLOCKS, AttentionKind, HitRule

__all__ = ["Content", "content_of", "refuse"]

_ELEMENTS: Mapping[str, str] = {
    "torch.float32": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
}
_FP8: Mapping[str, str] = {
    "auto": "fp8_e4m3",  # what a checkpoint's own scheme means, of which only workers hear more
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
}
"""Elements with one scale for the layer, which is the checkpoint's, by vLLM's ``cache_dtype``."""
_ROWS_WITH_SCALES = frozenset(
    {
        "int8_per_token_head",
        "fp8_per_token_head",
        "int4_per_token_head",
        "turboquant_k8v4",
        "turboquant_4bit_nc",
        "turboquant_k3v4_nc",
        "turboquant_3bit_nc",
        "fp8_ds_mla",
        "nvfp4_ds_mla",
    }
)
"""A token of a head is one run of bytes, with all that is needed to read it."""
_PAGES_WITH_SCALES = frozenset({"nvfp4", "nvfp4_4over6"})
"""The scales of a block lie behind its rows: a row alone means nothing."""
_INDEXER = "indexer"
"""Keys of a sparse attention's indexer, which has no other name in vLLM: pages, too."""
_LATENTS = frozenset({"MLAAttentionSpec", "SlidingWindowMLASpec"})
_KINDS = (
    frozenset({"FullAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec"}) | _LATENTS
)

_LONGEST_NAME = 64  # of a quantisation, which the states' name is here


@dataclass(frozen=True, slots=True)
class Content:
    """What a layer's tensor holds for a token, on this rank."""

    kind: AttentionKind
    dtype: str
    """Of :data:`kvlayer.layout.DTYPE_NBYTES`."""
    heads: int
    head_size: int
    v_head_size: int | None = None
    window_tokens: int | None = None
    quantisation: str = ""
    is_paged: bool = False
    """Only whole blocks mean something: a block's scales lie behind its rows."""
    state_nbytes: int = 0
    """Of a recurrent state, all its tensors together."""
    is_chunked: bool = False
    """``window_tokens`` are those of an attention chunk, which no token looks beyond."""
    slots: str = ""
    """K and V lie beside each other as heads do, in place of one behind the other: ``flat`` with
    all heads in one row, ``heads`` with one row for each."""

    @property
    def hit_rule(self) -> HitRule:
        """Which tokens of a prefix must be there."""
        if self.kind is AttentionKind.STATE:
            return HitRule.BOUNDARY
        if self.window_tokens is None:
            return HitRule.EVERY_CHUNK
        return HitRule.CHUNKED if self.is_chunked else HitRule.TRAILING

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of what :meth:`shaped` returns."""
        if self.kind is AttentionKind.STATE:
            return STATE_BLOCKS
        if self.kind is AttentionKind.MLA:
            return MLA_BLOCKS
        if not self.slots:
            return FUSED_HND
        if self.slots == "flat":
            return ("block", "kv", "token", "head", "dim")
        return ("block", "kv", "head", "token", "dim")

    def shaped(self, tensor: Any) -> Any:
        """A registered tensor as a view with :attr:`axes`: no copy, and of the dtype's own type.

        Raises ``RuntimeError`` for a tensor that has not vLLM's four axes; a latent may have lost
        its one head.
        """
        if self.kind is AttentionKind.STATE:
            return tensor.flatten(1).view(torch.int8)[:, : self.state_nbytes]
        if self.dtype == "int8" and tensor.dtype is torch.uint8:
            tensor = tensor.view(torch.int8)
        if self.kind is AttentionKind.MLA:
            return tensor.squeeze(1) if tensor.dim() == 4 else tensor
        if self.slots == "flat":
            return tensor.unflatten(-1, (self.heads, self.head_size))
        return tensor.unflatten(1, (2, self.heads)) if self.slots else tensor


def content_of(spec: Any, cache_dtype: str, where: str) -> Content:
    """What a layer of vLLM's ``spec`` keeps; ``cache_dtype`` is what the engine quantises KV to.

    Raises ``UnsupportedError``, naming the kind, for what cannot be carried; ``where`` begins the
    text.
    """
    kind = type(spec).__name__
    if kind == "MambaSpec":
        return _state(spec, where)
    if kind not in _KINDS:
        refuse(where)
    is_chunked = kind == "ChunkedLocalAttentionSpec"
    if not is_chunked and getattr(spec, "attention_chunk_size", None):
        refuse(f"{where}: attention in chunks of {spec.attention_chunk_size} tokens")
    if getattr(spec, "non_causal", False):
        refuse(f"{where}: attention that is not causal")
    if spec.tokens_per_state != 1:
        refuse(f"{where}: several tokens in one entry")
    window = getattr(spec, "sliding_window", None) if kind.startswith("SlidingWindow") else None
    if window is not None and spec.extra_retained_tokens:
        refuse(f"{where}: a window that keeps {spec.extra_retained_tokens} tokens more")
    if getattr(spec, "bounded_replay", False):
        refuse(f"{where}: a window that is computed again with every hit")
    if is_chunked:
        found = _heads(spec, cache_dtype, int(spec.attention_chunk_size), where)
        return replace(found, is_chunked=True)
    find = _latent if kind in _LATENTS else _heads
    return find(spec, cache_dtype, window, where)


def _state(spec: Any, where: str) -> Content:
    """A recurrent state: opaque bytes, named by all that decides what they mean."""
    if spec.mamba_cache_mode != "align":
        refuse(
            f"{where}: recurrent states in mode {spec.mamba_cache_mode!r}, which keeps none at "
            "boundaries (prefix caching turns mode 'align' on)"
        )
    if spec.num_speculative_blocks:
        refuse(f"{where}: recurrent states with speculative decoding")
    shapes = "+".join("x".join(map(str, shape)) for shape in spec.shapes)
    dtypes = "+".join(str(dtype).removeprefix("torch.") for dtype in spec.dtypes)
    kind = str(getattr(spec.mamba_type, "name", spec.mamba_type)).lower()
    name = f"{kind}:{shapes}:{dtypes}"
    if len(name) > _LONGEST_NAME:
        name = f"{kind}:{sha256(name.encode()).hexdigest()[:24]}"
    nbytes = sum(
        prod(shape) * dtype.itemsize for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    )
    return Content(AttentionKind.STATE, "int8", 1, 0, quantisation=name, state_nbytes=nbytes)


def _latent(spec: Any, cache_dtype: str, window: int | None, where: str) -> Content:
    stated = getattr(spec, "cache_dtype_str", None)
    name = stated or ("auto" if not spec.kv_quant_mode else cache_dtype)
    row, dtype = int(spec.head_size), _ELEMENTS.get(str(spec.dtype))
    is_indexer = str(getattr(spec, "cache_role", "")).endswith("INDEXER")
    quantisation, is_paged = "", is_indexer
    if dtype is None and stated is None and not spec.kv_quant_mode:
        dtype, quantisation, is_paged = "int8", _INDEXER, True
    elif spec.state_content_bytes is not None:
        if name not in _ROWS_WITH_SCALES:
            refuse(f"{where}: a latent of {name}")
        # Of DeepSeek V4 on the scales of a page lie behind all of its rows.
        is_paged = is_paged or getattr(spec, "model_version", None) is not None
        dtype, quantisation, row = "int8", name, int(spec.state_content_bytes)
    elif dtype is None:
        dtype = _FP8.get(name) if spec.kv_quant_mode else None
    elif name not in ("auto", dtype):
        dtype = None
    if dtype is None:
        refuse(f"{where}: a latent of {name}")
    return Content(
        AttentionKind.MLA,
        dtype,
        1,
        row,
        window_tokens=window,
        quantisation=quantisation,
        is_paged=is_paged,
    )


def _heads(spec: Any, cache_dtype: str, window: int | None, where: str) -> Content:
    dtype = _ELEMENTS.get(str(spec.dtype))
    if dtype is None and spec.kv_quant_mode:
        dtype = _FP8.get(cache_dtype)
    heads, size, v_size = int(spec.num_kv_heads), int(spec.head_size), int(spec.head_size_v)
    slots, row = spec.num_head_slots, spec.state_content_bytes
    is_whole = size == v_size and row == heads * size * spec.dtype.itemsize
    if dtype is not None and slots is row is None:
        values = None if v_size == size else v_size
        return Content(AttentionKind.MHA, dtype, heads, size, values, window)
    if dtype is not None and slots == 2 and is_whole:
        return Content(AttentionKind.MHA, dtype, heads, size, None, window, slots="flat")
    named = cache_dtype if spec.kv_quant_mode else ""
    if named in _PAGES_WITH_SCALES and slots == 2 * heads:
        return Content(
            AttentionKind.MHA,
            "int8",
            heads,
            int(row),
            window_tokens=window,
            quantisation=named,
            is_paged=True,
            slots="heads",
        )
    if named not in _ROWS_WITH_SCALES or slots is not None or row is None:
        refuse(f"{where}: keys and values of {spec.dtype}{named and f' kept as {named}'}")
    half = int(row) // 2
    return Content(AttentionKind.MHA, "int8", heads, half, int(row) - half, window, named)


def refuse(what: str) -> NoReturn:
    """Raise ``UnsupportedError`` for ``what``."""
    raise UnsupportedError(
        f"kvlayer cannot carry {what}",
        hint="it carries full attention, sliding windows, attention in chunks and latents (MLA) in "
        "float32, float16, bfloat16 and the quantised forms that its README lists, and recurrent "
        "states; the engine serves without kvlayer",
    )
