"""What a chunk of vLLM's host memory is called: our namespace, and in it vLLM's hash of the chunk.

vLLM's name of a chunk is a hash of its tokens and of all before them. It says nothing of the
model's weights, nor of how the bytes lie in a chunk, nor of where the hashes begin. The namespace
does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from kvlayer import CacheConfig, Namespace
from kvlayer.errors import UnsupportedError
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer_vllm.engine import KVCacheConfig, VllmConfig, attention_isa, platform
from kvlayer_vllm.engine_offload import OffloadingSpec
from kvlayer_vllm.identity import namespace_of

__all__ = ["described", "name_of", "namespace_for"]


def name_of(key: bytes) -> bytes:
    """The name of a chunk in its namespace; ``key`` is vLLM's, a hash of any length and a group."""
    return sha256(key).digest()


def namespace_for(
    spec: OffloadingSpec,
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    config: CacheConfig,
    *,
    nbytes: int,
    root: str | None,
    is_shared: bool,
) -> Namespace:
    """Of chunks of ``nbytes``, whose hashes begin at ``root`` (``hash_root``). ``is_shared``: that
    a tier outlives this process.

    Raises ``UnsupportedError`` where vLLM's hashes begin with a random number and a tier is shared,
    and what :func:`kvlayer_vllm.identity.namespace_of` raises.
    """
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if root is None and is_shared:
        raise UnsupportedError(
            f"vLLM's block hashes ({algorithm}) begin with a random number in each process: nobody "
            "else would ask for what is stored under them",
            hint="set PYTHONHASHSEED, the same for all engines; or take the algorithm sha256; or "
            "keep KV in cpu:// alone",
        )
    chunk = max(group.tokens_per_block for group in spec.config.groups)
    chunk *= spec.config.cache.blocks_per_chunk
    opaque = KVGroup(
        AttentionKind.STATE, (0,), "int8", state_nbytes=nbytes, quantisation="vllm-offload"
    )
    isas = _isas(vllm_config, kv_cache_config)
    named = namespace_of(
        vllm_config,
        [opaque],
        replace(config, tokens_per_chunk=chunk, tokens_per_tail=chunk),
        isa="+".join(isas) or "rows",
    )
    said = described(spec, algorithm, root or "of this process", isas)
    return replace(named, overrides={**named.overrides, "vllm.offload": said})


def described(spec: OffloadingSpec, algorithm: str, root: str, isas: Sequence[str]) -> str:
    """All that decides what the bytes of a chunk mean, and what its hash is a hash of."""
    config = spec.config
    parallel = config.parallel
    ranks = [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size]
    is_alike = parallel.is_parallelism_agnostic or config.replicated_layout
    layers = [[group.tokens_per_block, list(group.layer_names)] for group in config.groups]
    found: dict[str, Any] = {
        "hash": [algorithm, root, config.cache.tokens_per_hash],
        "blocks": config.cache.blocks_per_chunk,
        "groups": sha256(json.dumps(layers).encode()).hexdigest()[:32],
        "dtype": str(config.model.dtype),
        "page": config.worker_kv_bytes_per_block,
        "layout": config.kv_cache_layout,
        "canonical": config.canonical_layout,
        "replicated": config.replicated_layout,
        "ranks": None if is_alike else [*ranks, parallel.world_size],
        "packed": list(isas),
    }
    return json.dumps(found, sort_keys=True, separators=(",", ":"))


def _isas(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> list[str]:
    """How a CPU packs the blocks of each group with heads; empty on other devices."""
    if platform() != "cpu":
        return []
    cache_dtype = str(vllm_config.cache_config.cache_dtype)
    specs: list[Any] = []
    for group in kv_cache_config.kv_cache_groups:
        by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        specs += by_layer.values() if by_layer else [group.kv_cache_spec]
    return sorted(
        {
            attention_isa(
                vllm_config.model_config.dtype, spec.block_size, spec.head_size, cache_dtype
            )
            for spec in specs
            if hasattr(spec, "num_kv_heads") and hasattr(spec, "head_size")
        }
    )
