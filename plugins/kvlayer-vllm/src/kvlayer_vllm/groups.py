"""vLLM's KV cache groups as kvlayer's: what is carried, and by its name what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kvlayer.errors import UnsupportedError
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer_vllm.engine import (
    KVCacheConfig,
    KVCacheGroupSpec,
    VllmConfig,
    platform,
    total_kv_heads,
)
from kvlayer_vllm.specs import Content, content_of, refuse

__all__ = [
    "EngineGroup",
    "block_sizes",
    "engine_groups",
    "refuse_parallel",
    "rope_of",
    "state_sizes",
]

Scalar = str | int | float | bool | None

_NUMBER = re.compile(r"(?:^|\.)([0-9]+)(?=\.|$)")
# With these the angle of a key depends on how long the sequence or the batch was when it was
# computed, so a prefix does not determine its KV.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class EngineGroup:
    """A KV group with what only the engine knows of it.

    ``group.layers`` are those of this process' stage of the pipeline, by their numbers in the whole
    model; ``layer_names`` are vLLM's, in their order; ``table`` is the number of vLLM's group,
    whose block table its layers share with those of other groups of that number.
    """

    group: KVGroup
    layer_names: tuple[str, ...]
    tokens_per_block: int
    """Of a block as vLLM's scheduler counts them. Kernels may see it as several."""
    table: int
    content: Content

    @property
    def heads(self) -> int:
        """KV heads that a rank holds."""
        return self.content.heads


def engine_groups(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> list[EngineGroup]:
    """All groups of the engine, in its order.

    A group of vLLM's whose layers keep different things (``UniformTypeKVCacheSpecs``) is one for
    each of these, in the order of their first layers. Raises ``UnsupportedError``, naming the kind,
    for a group that cannot be carried.
    """
    return [
        each
        for table, found in enumerate(kv_cache_config.kv_cache_groups)
        for each in _members(vllm_config, table, found)
    ]


def block_sizes(groups: Iterable[EngineGroup]) -> list[int]:
    """Tokens of a block in each of vLLM's own groups."""
    sizes = {each.table: each.tokens_per_block for each in groups}
    return [sizes[table] for table in sorted(sizes)]


def state_sizes(groups: Iterable[EngineGroup]) -> dict[int, int]:
    """Tokens of a block in each of vLLM's own groups that keep recurrent states."""
    states = (each for each in groups if each.group.kind is AttentionKind.STATE)
    return {each.table: each.tokens_per_block for each in states}


def _members(vllm_config: VllmConfig, table: int, found: KVCacheGroupSpec) -> list[EngineGroup]:
    """vLLM's group ``table``, by what its layers keep."""
    spec, count = found.kv_cache_spec, len(found.layer_names)
    where = f"KV group {table} ({type(spec).__name__}, {count} layers)"
    if not found.layer_names:
        refuse(f"KV group {table}: a stage of the pipeline has none of its layers")
    if found.is_eagle_group:
        refuse(f"{where}: layers of a draft model")
    if not found.enable_kv_transfer or found.host_resident:
        refuse(f"{where}: not the engine's own copy of the KV")
    role = getattr(getattr(found, "role", None), "value", "default")
    if role != "default":
        refuse(f"{where}: blocks that are {role}'s")
    by_layer: Mapping[str, Any] = getattr(spec, "kv_cache_specs", {})
    kept: dict[Content, list[tuple[int, str]]] = {}
    for layer in sorted((_layer_number(name, where), name) for name in found.layer_names):
        each = by_layer.get(layer[1], spec)
        where = f"KV group {table} ({type(each).__name__}, {count} layers)"
        content = content_of(each, str(vllm_config.cache_config.cache_dtype), where)
        kept.setdefault(content, []).append(layer)
    return [
        _member(vllm_config, content, layers, where, table=table, size=int(spec.block_size))
        for content, layers in kept.items()
    ]


def _member(
    vllm_config: VllmConfig,
    content: Content,
    numbered: Sequence[tuple[int, str]],
    where: str,
    *,
    table: int,
    size: int,
) -> EngineGroup:
    layers = tuple(number for number, _ in numbered)
    if len(set(layers)) != len(layers):
        refuse(f"{where}: two layers of one number")
    is_state = content.kind is AttentionKind.STATE
    if is_state:
        _refuse_states(vllm_config, where)
    has_heads = content.kind is AttentionKind.MHA
    group = KVGroup(
        content.kind,
        layers,
        content.dtype,
        num_kv_heads=_heads(vllm_config, content.heads, where) if has_heads else 1,
        head_size=content.head_size,
        v_head_size=content.v_head_size,
        hit_rule=content.hit_rule,
        window_tokens=content.window_tokens,
        rope={} if is_state else rope_of(vllm_config.model_config.hf_text_config, layers),
        state_nbytes=content.state_nbytes,
        quantisation=content.quantisation,
    )
    return EngineGroup(group, tuple(name for _, name in numbered), size, table, content)


def _refuse_states(vllm_config: VllmConfig, where: str) -> None:
    """Recurrent states are carried where they were proven."""
    parallel = vllm_config.parallel_config
    ranks = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
    if ranks > 1:
        refuse(f"{where}: recurrent states of an engine with {ranks} ranks")
    if platform() != "cpu":
        refuse(f"{where}: recurrent states on {platform()}")


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
        refuse(f"{where}: {per_rank} of {total} KV heads on each of {ranks} ranks")
    return total


def _layer_number(name: str, where: str) -> int:
    """The one number in a name such as ``model.layers.3.self_attn.attn``."""
    numbers = _NUMBER.findall(name)
    if len(numbers) != 1:
        refuse(f"{where}: a layer named {name!r}")
    return int(numbers[0])


def refuse_parallel(vllm_config: VllmConfig) -> None:
    """Raise ``UnsupportedError``, naming the option, where ranks share out a prompt's tokens, and
    for KV of a draft model.

    A draft by ``ngram`` has no model, and no KV of its own.
    """
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise UnsupportedError(
                f"kvlayer cannot carry KV of an engine with {name} = {size} yet",
                hint="the engine serves without kvlayer",
            )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise UnsupportedError(
            f"kvlayer cannot carry KV of speculative decoding by {speculative.method!r} yet",
            hint="the engine serves without kvlayer",
        )
