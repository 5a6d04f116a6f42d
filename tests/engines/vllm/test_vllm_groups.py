"""What an engine keeps, group by group, as vLLM's own specs describe it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvlayer import AttentionKind
from kvlayer.errors import UnsupportedError
from kvlayer.layout import HitRule
from kvlayer_vllm.groups import engine_groups

NAMES = ["model.layers.1.self_attn.attn", "model.layers.0.self_attn.attn"]


def state(**changes: Any) -> Any:
    """vLLM's description of a layer with a recurrent state, as prefix caching has it."""
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    fields: dict[str, Any] = {
        "block_size": 32,
        "shapes": ((8, 16), (4, 4)),
        "dtypes": (torch.float32, torch.float32),
        "mamba_cache_mode": "align",
    }
    return MambaSpec(**{**fields, **changes})


def test_a_sliding_window_needs_only_its_last_tokens(
    vllm_config: Any, spec: Any, kv_cache_config: Any
) -> None:
    full, window = engine_groups(
        vllm_config,
        kv_cache_config(
            (NAMES[:1], spec("FullAttentionSpec")),
            (NAMES[1:], spec("SlidingWindowSpec", sliding_window=128)),
        ),
    )
    assert full.group.hit_rule is HitRule.EVERY_CHUNK
    assert window.group.hit_rule is HitRule.TRAILING and window.group.window_tokens == 128


def test_a_latent_is_kept_without_heads(vllm_config: Any, spec: Any, kv_cache_config: Any) -> None:
    latent = spec("MLAAttentionSpec", num_kv_heads=1, head_size=576, block_size=16)
    (found,) = engine_groups(vllm_config, kv_cache_config((NAMES, latent)))
    assert found.group.kind is AttentionKind.MLA and found.group.head_size == 576


def test_what_cannot_be_carried_is_refused_by_its_name(
    vllm_config: Any, spec: Any, kv_cache_config: Any
) -> None:
    import torch

    cases = [
        (
            kv_cache_config((NAMES, state(mamba_cache_mode="none"))),
            r"group 0 \(MambaSpec, 2 layers\): recurrent states in mode 'none'",
        ),
        (
            kv_cache_config((NAMES, state(num_speculative_blocks=2))),
            "recurrent states with speculative decoding",
        ),
        (
            kv_cache_config((NAMES, spec("FullAttentionSpec", dtype=torch.uint8))),
            "keys and values of torch.uint8",
        ),
        (kv_cache_config((NAMES, spec("FullAttentionSpec")), is_eagle_group=True), "draft model"),
        (kv_cache_config((["model.a.0.b.1.attn"], spec("FullAttentionSpec"))), "a layer named"),
    ]
    for config, message in cases:
        with pytest.raises(UnsupportedError, match=message):
            engine_groups(vllm_config, config)


def test_recurrent_states_are_refused_where_they_were_not_proven(
    vllm_config: Any, changed: Any, kv_cache_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kv_cache_config((NAMES, state()))
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        several = changed(vllm_config, "parallel_config", **{name: 2})
        with pytest.raises(UnsupportedError, match="recurrent states of an engine with 2 ranks"):
            engine_groups(several, config)
    monkeypatch.setattr("kvlayer_vllm.groups.platform", lambda: "cuda")
    with pytest.raises(UnsupportedError, match="recurrent states on cuda"):
        engine_groups(vllm_config, config)


def test_states_are_named_by_all_that_says_what_their_bytes_mean(
    vllm_config: Any, kv_cache_config: Any
) -> None:
    """Another split of as many bytes has another name: nothing of it is ever found."""
    import torch
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum as Kinds

    long = ((8, 64, 128), (4, 1536), (3, 7), (5, 11), (13, 17), (19, 23))
    specs = [
        state(),
        state(shapes=((16, 8), (4, 4))),
        state(shapes=((4, 4), (8, 16))),
        state(dtypes=(torch.float32, torch.bfloat16)),
        state(mamba_type=Kinds.GDN_ATTN),
        state(shapes=long, dtypes=(torch.float32,) * 6),
        state(shapes=long[::-1], dtypes=(torch.float32,) * 6),
    ]
    groups = [engine_groups(vllm_config, kv_cache_config((NAMES, each)))[0].group for each in specs]
    assert len({each.quantisation for each in groups}) == len(groups)
    assert groups[0].quantisation == "mamba2:8x16+4x4:float32+float32"
    assert groups[0].state_nbytes == 4 * (8 * 16 + 4 * 4) == groups[1].state_nbytes
    assert {each.hit_rule for each in groups} == {HitRule.BOUNDARY}
    assert not groups[0].rope


def test_models_that_no_cpu_build_runs_are_carried_by_their_specs(
    vllm_config: Any, spec: Any, kv_cache_config: Any
) -> None:
    """Jamba, Kimi-Linear, DeepSeek V3.2: what vLLM would say of their layers."""
    import torch
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum as Kinds
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    latent = spec("MLAAttentionSpec", num_kv_heads=1, head_size=576)
    bf16 = {"dtypes": (torch.bfloat16, torch.float32)}
    jamba = state(shapes=((512, 3), (512, 16)), mamba_type=Kinds.MAMBA1, **bf16)
    kimi = state(shapes=((3, 1536), (4, 128, 128)), mamba_type=Kinds.GDN_ATTN, **bf16)
    indexer = spec("MLAAttentionSpec", num_kv_heads=1, head_size=132, dtype=torch.uint8)
    both = UniformTypeKVCacheSpecs(
        block_size=32, kv_cache_specs={"model.layers.0.attn": latent, "model.layers.0.ix": indexer}
    )
    cases = {
        "jamba": [(NAMES[:1], jamba), (NAMES[1:], spec("FullAttentionSpec"))],
        "kimi": [(NAMES[:1], kimi), (NAMES[1:], latent)],
        "indexer": [(["model.layers.0.attn", "model.layers.0.ix"], both)],
    }
    found = {
        name: [
            (str(each.group.kind), str(each.group.hit_rule), each.group.quantisation.split(":")[0])
            for each in engine_groups(vllm_config, kv_cache_config(*groups))
        ]
        for name, groups in cases.items()
    }
    assert found == {
        "jamba": [("state", "boundary", "mamba1"), ("mha", "every-chunk", "")],
        "kimi": [("state", "boundary", "gdn_attn"), ("mla", "every-chunk", "")],
        "indexer": [("mla", "every-chunk", ""), ("mla", "every-chunk", "indexer")],
    }


def test_attention_in_chunks_needs_the_last_unfinished_chunk(
    vllm_config: Any, spec: Any, kv_cache_config: Any
) -> None:
    chunked = spec("ChunkedLocalAttentionSpec", attention_chunk_size=64)
    (found,) = engine_groups(vllm_config, kv_cache_config((NAMES, chunked)))
    assert found.group.hit_rule is HitRule.CHUNKED and found.group.window_tokens == 64
    full = kv_cache_config((NAMES, spec("FullAttentionSpec", attention_chunk_size=64)))
    with pytest.raises(UnsupportedError, match="attention in chunks of 64 tokens"):
        engine_groups(vllm_config, full)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(
    kind: str, vllm_config: Any, spec: Any, kv_cache_config: Any, changed: Any
) -> None:
    config = SimpleNamespace(rope_parameters={"rope_type": kind, "rope_theta": 1.0})
    other = changed(vllm_config, "model_config", hf_text_config=config)
    with pytest.raises(UnsupportedError, match=kind):
        engine_groups(other, kv_cache_config((NAMES, spec("FullAttentionSpec"))))
