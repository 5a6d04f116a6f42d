"""Models whose KV is not that of a Llama: random weights, small, as a folder that vLLM loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvlayer_vllm.bench.models import save_random

__all__ = ["latent", "mixed", "state", "windowed"]

_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "max_position_embeddings": 8192,
}


def mixed(folder: Path) -> Path:
    """A Gemma3: three layers that see 128 tokens and one that sees all, in four KV groups."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=4,
        sliding_window=128,
        query_pre_attn_scalar=64,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        tie_word_embeddings=True,
    )
    save_random(Gemma3ForCausalLM(config), folder, embedding=0.05)
    return folder


def windowed(folder: Path) -> Path:
    """A Mistral of which every layer sees 128 tokens: one KV group."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        **_SIZES,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=2,
        sliding_window=128,
        tie_word_embeddings=False,
    )
    save_random(MistralForCausalLM(config), folder)
    return folder


def latent(folder: Path) -> Path:
    """A DeepSeek without experts: a latent of 576 numbers for each token (MLA)."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        **_SIZES,
        num_key_value_heads=4,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=64,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        tie_word_embeddings=False,
    )
    save_random(DeepseekV2ForCausalLM(config), folder)
    return folder


def state(folder: Path) -> Path:
    """A Mamba: a state in place of keys and values."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        state_size=8,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
    )
    save_random(MambaForCausalLM(config), folder)
    return folder
