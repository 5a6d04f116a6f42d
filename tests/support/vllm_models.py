"""Models whose KV is not that of a Llama: random weights, small, as a folder that vLLM loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvlayer_vllm.bench.models import save, save_random

__all__ = ["HYBRIDS", "hybrid", "latent", "mixed", "state", "windowed"]

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


def hybrid(name: str, folder: Path) -> Path:
    """A model of ``HYBRIDS``, made once.

    What a recurrence needs, and norms, keep their initial values; matrices are large enough for
    answers to depend on all of the context.
    """
    import torch
    import transformers

    if (folder / "config.json").exists():
        return folder
    kind, changes = HYBRIDS[name]
    text = getattr(transformers, f"{kind}TextConfig", None)
    config = text or getattr(transformers, f"{kind}Config")
    made = {**_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}
    architecture = f"{kind}ForCausalLM"
    settings = config(**made)
    settings.architectures = [architecture]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(settings)
    embedding = 0.05 if made["tie_word_embeddings"] else 1.0
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim >= 2 and not any(word in key for word in ("A_log", "conv", "norm")):
                weight.normal_(0, embedding if "embed" in key else 0.08)
    model.generation_config = transformers.GenerationConfig()
    save(model, folder)
    return folder


_SSD = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "mamba_chunk_size": 64,
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron-h": (
        "NemotronH",
        {
            "head_dim": 64,
            "layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba", "attention"],
            "ssm_state_size": 64,
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "n_groups": 2,
            "chunk_size": 64,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            "head_dim": 64,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "granite-4-h": (
        "GraniteMoeHybrid",
        {
            **_SSD,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
            "attention_multiplier": 0.125,
            "position_embedding_type": "nope",
        },
    ),
    "falcon-h1": (
        "FalconH1",
        {**_SSD, "num_hidden_layers": 2, "mamba_d_ssm": 512, "head_dim": 64},
    ),
    "zamba-2": (
        "Zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_d_state": 64,
            "chunk_size": 64,
            "num_key_value_heads": 4,
            "use_mamba_kernels": False,
        },
    ),
    "mamba-2": (
        "Mamba2",
        {
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 64,
            "state_size": 64,
            "n_groups": 1,
            "chunk_size": 64,
        },
    ),
    "llama-4": (
        "Llama4",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "attention_chunk_size": 256,
            "num_local_experts": 2,
            "intermediate_size_mlp": 512,
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            "num_hidden_layers": 4,
            "head_dim": 64,
            "sliding_window": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 256,
        },
    ),
    "gemma-3n": (
        "Gemma3n",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 6,
            "head_dim": 64,
            "sliding_window": 128,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0] * 6,
            "intermediate_size": [512] * 6,
            # vLLM shares KV of the last window and the last full layer before those that share it.
            "layer_types": ["sliding_attention"] * 3
            + ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}
"""By the model's name: the beginning of transformers' names of its classes, and its sizes."""
