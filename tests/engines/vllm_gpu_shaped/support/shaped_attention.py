"""A GPU's attention backend on a CPU: its cache layout and its kernel that writes the cache.

That kernel runs in Triton's interpreter. The attention itself is computed by torch from the same
cache, in a second in place of a minute.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

__all__ = ["WRITES", "triton_attention"]

WRITES = [0]
"""How often the backend's kernel has written to the cache."""

_BACKEND = "vllm.v1.attention.backends.triton_attn"


def triton_attention() -> None:
    """vLLM's CPU platform answers with the backend ``TRITON_ATTN``. For good."""
    platform: Any = import_module("vllm.platforms.cpu").CpuPlatform
    platform.get_attn_backend_cls = classmethod(
        lambda cls, *args, **how: f"{_BACKEND}.TritonAttentionBackend"
    )
    # The kernels' tile sizes are chosen by it.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    backend: Any = import_module(_BACKEND)
    write = backend.triton_reshape_and_cache_flash

    def counted(*args: Any, **how: Any) -> None:
        WRITES[0] += 1
        write(*args, **how)

    backend.triton_reshape_and_cache_flash = counted
    backend.unified_attention = attention


def attention(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    window_size: tuple[int, int],
    block_table: torch.Tensor,
    softcap: float,
    **_: Any,
) -> None:
    """Rows of the cache by block table; ``k`` and ``v`` are ``[block, token, head, dim]``."""
    size, starts = k.shape[1], cu_seqlens_q.tolist()
    groups = q.shape[1] // k.shape[2]
    assert not softcap
    for index, count in enumerate(seqused_k.tolist()):
        first, stop = starts[index], starts[index + 1]
        if stop <= first:
            continue
        blocks = block_table[index, : -(-count // size)].long()
        keys = k[blocks].flatten(0, 1)[:count].repeat_interleave(groups, 1)
        values = v[blocks].flatten(0, 1)[:count].repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[first:stop], keys) * softmax_scale
        asks = torch.arange(count - (stop - first), count)[:, None]
        seen = torch.arange(count)[None]
        hidden = seen > asks
        if window_size[0] >= 0:
            hidden = hidden | (seen < asks - window_size[0])
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[first:stop] = torch.einsum("hqk,khd->qhd", weights, values)
