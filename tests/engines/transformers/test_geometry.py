"""What a model keeps per token, what is refused, and what tells two set-ups apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from kvlayer.errors import UnsupportedError
from kvlayer.layout import DENSE
from kvlayer_transformers import Geometry
from kvlayer_transformers.engine import check_version
from kvlayer_transformers.geometry import check_cache, overrides_of

Tiny = Callable[..., Any]

LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def test_a_llama_is_one_group_of_all_layers(llama: Any) -> None:
    geometry = Geometry.of(llama)
    (group,) = geometry.groups
    assert group.layers == (0, 1, 2)
    assert (group.num_kv_heads, group.head_size, group.v_head_size) == (2, 16, None)
    assert (group.dtype, geometry.compute_dtype) == ("float32", "float32")
    assert dict(group.rope) == {"rope_type": "default", "rope_theta": 10000.0}
    assert geometry.layout.groups[0].axes == DENSE


def test_the_dtype_is_that_of_the_tensors(tiny: Tiny) -> None:
    geometry = Geometry.of(tiny().to(torch.bfloat16))
    assert (geometry.groups[0].dtype, geometry.compute_dtype) == ("bfloat16", "bfloat16")


def test_layers_with_different_rope_are_different_groups(tiny: Tiny) -> None:
    model = tiny("Gemma3", num_hidden_layers=6, head_dim=16, sliding_window=48)
    sliding, full = Geometry.of(model).groups
    assert (sliding.layers, full.layers) == ((0, 1, 2, 3, 4), (5,))
    assert sliding.rope["rope_theta"] != full.rope["rope_theta"]


def test_a_number_in_the_rope_is_one_name_however_it_is_written(tiny: Tiny) -> None:
    thetas = [
        Geometry.of(tiny(rope_parameters={"rope_type": "default", "rope_theta": theta})).groups
        for theta in (10000, 10000.0)
    ]
    assert thetas[0] == thetas[1]


def test_values_may_be_shorter_than_keys(tiny: Tiny) -> None:
    model = tiny(
        "DeepseekV3",
        num_key_value_heads=4,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    )
    past = DynamicCache()
    model(torch.tensor([[5]]), past_key_values=past)
    (group,) = Geometry.of(model).groups
    keys, values = past.layers[0].keys, past.layers[0].values
    assert group.planes() == (keys.shape[3], values.shape[3])
    assert keys.shape[3] != values.shape[3]


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        ("Qwen3Next", LINEAR, "LinearAttentionLayer"),
        ("Mamba", {"state_size": 16}, "LinearAttentionLayer"),
        ("DeepseekV32", {"num_key_value_heads": 4}, "DynamicIndexedLayer"),
        ("Rwkv", {"attention_hidden_size": 64}, "0 of the model's 3 layers"),
    ],
)
def test_a_model_whose_past_is_no_keys_and_values_is_refused_by_kind(
    tiny: Tiny, architecture: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedError, match=named):
        Geometry.of(tiny(architecture, **changes))


def test_an_encoder_decoder_is_refused_by_name() -> None:
    config = T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=4, d_kv=16, vocab_size=512)
    with pytest.raises(UnsupportedError, match="t5, an encoder-decoder"):
        Geometry.of(T5ForConditionalGeneration(config))


def test_one_rank_of_a_tensor_parallel_model_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    monkeypatch.setattr(type(model), "tp_size", 2)
    with pytest.raises(UnsupportedError, match="tensor-parallel"):
        Geometry.of(model)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "long_factor": [2.0] * 8,
            "short_factor": [1.0] * 8,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rope_that_depends_on_the_prompts_length_is_refused(
    tiny: Tiny, rope: dict[str, Any]
) -> None:
    model = tiny(max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope})
    with pytest.raises(UnsupportedError, match=str(rope["rope_type"])):
        Geometry.of(model)


def test_dynamic_rope_really_makes_kv_depend_on_the_prompts_length(tiny: Tiny) -> None:
    """Why it is refused: the same tokens have other keys in a longer prompt."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny(max_position_embeddings=64, rope_parameters=rope)
    short, long = DynamicCache(), DynamicCache()
    ids = torch.arange(100)[None] + 3
    with torch.no_grad():
        model(ids[:, :50], past_key_values=short)
        model(ids, past_key_values=long)
    assert not torch.allclose(short.layers[0].keys, long.layers[0].keys[:, :, :50], atol=1e-2)


def filled(past: Any, model: Any) -> Any:
    with torch.no_grad():
        model(torch.arange(60)[None] + 3, past_key_values=past)
    return past


def test_a_plain_dynamic_cache_is_carried(llama: Any) -> None:
    check_cache(filled(DynamicCache(), llama), 3)
    check_cache(filled(DynamicCache(config=llama.config), llama), 3)


def test_caches_of_other_kinds_are_refused_by_kind(tiny: Tiny, llama: Any) -> None:
    mistral = tiny("Mistral", sliding_window=48)
    static = filled(StaticCache(config=llama.config, max_cache_len=64), llama)
    offloaded = DynamicCache()
    offloaded.offloading = True
    for past, named in [
        (filled(DynamicCache(config=mistral.config), mistral), "DynamicSlidingWindowLayer"),
        (static, "StaticCache"),
        (offloaded, "offloaded"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
        (((torch.zeros(1),),), "tuple"),
        (None, "NoneType"),
        (DynamicCache(), "0 of the model's 3 layers"),
    ]:
        with pytest.raises(UnsupportedError, match=named):
            check_cache(past, 3)


def test_a_model_as_published_has_no_overrides(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, use_cache=False)
    assert overrides_of(loaded, str(tmp_path)) == {}


def test_a_configuration_changed_at_load_is_an_override(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    loaded = type(model).from_pretrained(tmp_path, rms_norm_eps=1e-3, rope_parameters=rope)
    for folder in (str(tmp_path), ""):  # without a folder, the one the model says it came from
        found = overrides_of(loaded, folder)
        assert found.keys() == {"rms_norm_eps", "rope_parameters"}
        assert found["rms_norm_eps"] == 1e-3


def test_a_model_from_nowhere_is_named_by_its_whole_configuration(tiny: Tiny) -> None:
    digests = [overrides_of(tiny(**changes), "") for changes in ({}, {}, {"rms_norm_eps": 1e-3})]
    assert digests[0].keys() == {"config"}
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


@pytest.mark.parametrize("version", ["5.16.0", "5.16.0.dev0", "5.23.1", "5.20.0rc1"])
def test_a_tested_version_is_accepted(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["4.57.0", "5.15.9", "5.24.0", "6.0.0", "5.x"])
def test_an_untested_version_is_refused_in_one_clear_line(version: str) -> None:
    with pytest.raises(UnsupportedError, match=r"outside the tested range, 5\.16 to 5\.23"):
        check_version(version)
