"""vLLM's KV cache groups as kvlayer's: what is carried, and by its name what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from kvlayer.errors import UnsupportedError
from kvlayer.layout import AttentionKind, HitRule, KVGroup
from kvlayer_vllm.engine import KVCacheConfig, KVCacheGroupSpec, VllmConfig, total_kv_heads

__all__ = ["EngineGroup", "engine_groups", "refuse_parallel", "rope_of"]

Scalar = str | int | float | bool | None

_DTYPES: Mapping[str, str] = {
    "torch.float32": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
}
_NUMBER = re.compile(r"(?:^|\.)([0-9]+)(?=\.|$)")
# With these the angle of a key depends on how long the sequence or the batch was when it was
# computed, so a prefix does not determine its KV.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """A KV group with what only the engine knows of it.

    ``layer_names`` are vLLM's, in the order of ``group.layers``; ``heads`` is how many KV heads a
    rank holds.
    """

    group: KVGroup
    layer_names: tuple[str, ...]
    tokens_per_block: int
    heads: int
    dtype: Any
    """The engine's own, of torch."""


def engine_groups(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> list[EngineGroup]:
    """All groups of the engine, in its order.

    Raises ``UnsupportedError``, naming the kind, for a group that cannot be carried.
    """
    return [
        _engine_group(vllm_config, index, spec)
        for index, spec in enumerate(kv_cache_config.kv_cache_groups)
    ]


def _engine_group(vllm_config: VllmConfig, index: int, found: KVCacheGroupSpec) -> EngineGroup:
    spec = found.kv_cache_spec
    kind = type(spec).__name__
    where = f"KV group {index} ({kind}, {len(found.layer_names)} layers)"
    if kind not in ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"):
        _refuse(where)
    if found.is_eagle_group:
        _refuse(f"{where}: layers of a draft model")
    if not found.enable_kv_transfer or found.host_resident:
        _refuse(f"{where}: not the engine's own copy of the KV")
    if kind != "MLAAttentionSpec" and getattr(spec, "attention_chunk_size", None):
        _refuse(f"{where}: attention in chunks of {spec.attention_chunk_size} tokens")
    if getattr(spec, "non_causal", False):
        _refuse(f"{where}: attention that is not causal")
    if spec.tokens_per_state != 1:
        _refuse(f"{where}: several tokens in one entry")
    dtype = _DTYPES.get(str(spec.dtype))
    if dtype is None or spec.kv_quant_mode:
        _refuse(f"{where}: keys and values of {spec.dtype}")
    numbered = sorted((_layer_number(name, where), name) for name in found.layer_names)
    layers = tuple(number for number, _ in numbered)
    if len(set(layers)) != len(layers):
        _refuse(f"{where}: two layers of one number")
    rope = rope_of(vllm_config.model_config.hf_text_config, layers)
    names = tuple(name for _, name in numbered)
    if kind == "MLAAttentionSpec":
        if getattr(spec, "cache_dtype_str", None) not in (None, "auto", dtype):
            _refuse(f"{where}: a latent of {spec.cache_dtype_str}")
        group = KVGroup(AttentionKind.MLA, layers, dtype, head_size=spec.head_size, rope=rope)
        return EngineGroup(group, names, spec.block_size, 1, spec.dtype)
    window = spec.sliding_window if kind == "SlidingWindowSpec" else None
    if window is not None and spec.extra_retained_tokens:
        _refuse(f"{where}: a window that keeps {spec.extra_retained_tokens} tokens more")
    v_head_size = spec.head_size_v
    group = KVGroup(
        AttentionKind.MHA,
        layers,
        dtype,
        num_kv_heads=_heads(vllm_config, spec.num_kv_heads, where),
        head_size=spec.head_size,
        v_head_size=None if v_head_size == spec.head_size else v_head_size,
        hit_rule=HitRule.EVERY_CHUNK if window is None else HitRule.TRAILING,
        window_tokens=window,
        rope=rope,
    )
    return EngineGroup(group, names, spec.block_size, spec.num_kv_heads, spec.dtype)


def rope_of(text_config: Any, layers: Iterable[int]) -> dict[str, Scalar]:
    """Everything the model's configuration says about the rotation of K in these layers, flat.

    Numbers are floats, so 10000 and 10000.0 are one name; lists become their JSON. Layers of
    several kinds have the kind in front of each name. Raises ``UnsupportedError`` where a prefix
    does not determine its KV.
    """
    kinds: list[str] = getattr(text_config, "layer_types", None) or []
    found = sorted({kinds[n] if n < len(kinds) else "full_attention" for n in layers})
    flat: dict[str, Scalar] = {}
    for kind in found:
        parameters: Mapping[str, Any] = getattr(text_config, "rope_parameters", None) or {}
        if any(isinstance(value, Mapping) for value in parameters.values()):
            parameters = parameters.get(kind) or {}
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            raise UnsupportedError(
                f"RoPE of type {parameters['rope_type']!r} rotates keys by the length of the whole "
                "sequence, so KV of a prefix is not reusable",
                hint="load the model with a fixed RoPE scaling (linear, yarn, llama3)",
            )
        prefix = f"{kind}." if len(found) > 1 else ""
        flat |= {f"{prefix}{key}": _flat(value) for key, value in parameters.items()}
    return flat


def _flat(value: object) -> Scalar:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if value is None or isinstance(value, str | bool):
        return cast("Scalar", value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _heads(vllm_config: VllmConfig, per_rank: int, where: str) -> int:
    ranks = int(vllm_config.parallel_config.tensor_parallel_size)
    if ranks == 1:
        return per_rank  # also where layers differ in it
    total = total_kv_heads(vllm_config)
    if max(total // ranks, 1) != per_rank:
        _refuse(f"{where}: {per_rank} of {total} KV heads on each of {ranks} ranks")
    return total


def _layer_number(name: str, where: str) -> int:
    """The one number in a name such as ``model.layers.3.self_attn.attn``."""
    numbers = _NUMBER.findall(name)
    if len(numbers) != 1:
        _refuse(f"{where}: a layer named {name!r}")
    return int(numbers[0])


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"kvlayer cannot carry {what}",
        hint="it carries full attention, sliding windows and latents (MLA) in float32, float16 or "
        "bfloat16; the engine serves without kvlayer",
    )


def refuse_parallel(vllm_config: VllmConfig) -> None:
    """Raise ``UnsupportedError``, naming the option, for KV of several ranks or of a draft model.

    A draft by ``ngram`` has no model, and no KV of its own. Nor is an engine carried that schedules
    ahead: its runner may overwrite blocks of preempted requests before it says so.
    """
    parallel = vllm_config.parallel_config
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise UnsupportedError(
                f"kvlayer cannot carry KV of an engine with {name} = {size} yet",
                hint="the engine serves without kvlayer",
            )
    if vllm_config.scheduler_config.async_scheduling:
        raise UnsupportedError(
            "kvlayer cannot carry KV of an engine that schedules ahead (async_scheduling) yet",
            hint="--no-async-scheduling; until then the engine serves without kvlayer",
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise UnsupportedError(
            f"kvlayer cannot carry KV of speculative decoding by {speculative.method!r} yet",
            hint="the engine serves without kvlayer",
        )
