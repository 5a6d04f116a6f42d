"""Tiny random models, sessions on them, and a writer of GGUF files made by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvlayer import CacheConfig, ModelConfig, TierConfig
from kvlayer_transformers import Session

OpenSession = Callable[..., Session]
WriteGGUF = Callable[..., Path]

WEIGHTS = f"sha256:{'5' * 64}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On one thread sums are added in one order: outputs may be compared to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def no_verdicts_from_outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models are tried, whatever this user has tried before."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvlayer_transformers.remembered.cache_directory", lambda: folder)
        yield


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Fields of a small model whose greedy output does not repeat one token."""
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    return {**fields, **changes}


def make_model(architecture: str = "Llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random model in eval mode, of an architecture by its name in transformers."""
    text = {"Gemma3": "Gemma3TextConfig"}
    config = getattr(transformers, text.get(architecture, f"{architecture}Config"))
    torch.manual_seed(seed)
    return getattr(transformers, f"{architecture}ForCausalLM")(
        config(**tiny_config(**changes))
    ).eval()


@pytest.fixture
def tiny() -> Callable[..., Any]:
    return make_model


@pytest.fixture(scope="session")
def llama() -> Any:
    return make_model()


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """``prompt(tokens, seed=1)``: random ids; two prompts of one seed start alike."""

    def ids(tokens: int, seed: int = 1) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        found: list[int] = torch.randint(3, 512, (4096,), generator=generator)[:tokens].tolist()
        return found

    return ids


@pytest.fixture
def open_session() -> Iterator[OpenSession]:
    """``open_session(model, directory=None, chunk=16, **options)``, closed after the test.

    Host memory, and a written-through directory below it if one is given.
    """
    with ExitStack() as opened:

        def open_one(
            model: Any,
            directory: Path | None = None,
            *,
            chunk: int = 16,
            weights: str = WEIGHTS,
            numerics: Any = "portable",
            overrides: Mapping[str, Any] | None = None,
            **options: Any,
        ) -> Session:
            # Tiny models compute faster than any disk loads: reuse would depend on the clock.
            options.setdefault("report_prefill", False)
            tiers = [TierConfig(url="cpu://?capacity=16MiB")]
            if directory is not None:
                url = f"file://{directory}"
                tiers.append(TierConfig(url=url, write="through", deadline_seconds=60.0))
            config = CacheConfig(
                model=ModelConfig(weights=weights, numerics=numerics, overrides=overrides or {}),
                tiers=tuple(tiers),
                tokens_per_chunk=chunk,
            )
            return opened.enter_context(Session.open(model, config, **options))

        yield open_one


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if not value or isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


@pytest.fixture(scope="session")
def write_gguf() -> WriteGGUF:
    """``write_gguf(path, metadata, tensors)``; tensors are (name, shape, ggml type, bytes)."""

    def write(
        path: Path,
        metadata: Mapping[str, Any],
        tensors: Sequence[tuple[str, tuple[int, ...], int, bytes]],
        *,
        version: int = 3,
    ) -> Path:
        head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
        for key, value in metadata.items():
            head += _text(key) + _value(value)
        table, body = b"", b""
        for name, shape, kind, raw in tensors:
            body += b"\0" * (-len(body) % 32)
            table += _text(name) + struct.pack("<I", len(shape))
            table += struct.pack(f"<{len(shape)}Q", *reversed(shape))
            table += struct.pack("<IQ", kind, len(body))
            body += raw
        head += table
        path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
        return path

    return write


WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="session")
def tiny_gguf(write_gguf: WriteGGUF, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random byte-level Llama as GGUF, and the same model as transformers built it.

    Its KV is as large per token as that of a real small model, so that storing it takes time.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    model = make_model(
        num_hidden_layers=4,
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=320,
        max_position_embeddings=8192,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    with torch.no_grad():  # or tied embeddings repeat the last token for ever
        model.model.embed_tokens.weight.mul_(0.02)
    words = [*WORDS, *sorted(ByteLevel.alphabet()), "12", "he"]
    words += [f"unused {i}" for i in range(320 - len(words))]
    metadata = {
        "general.architecture": "llama",
        "llama.vocab_size": 320,
        "llama.block_count": 4,
        "llama.context_length": 8192,
        "llama.embedding_length": 512,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 317,
        "tokenizer.ggml.merges": ["1 2", "h e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }
    tensors = []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        place, _, module = name.removesuffix(".weight").rpartition("layers.")
        layer, _, inner = module.partition(".")
        target = f"blk.{layer}.{names[inner]}" if place else names[module]
        weight = tensor.detach().float()
        if target.endswith(("attn_q", "attn_k")):
            # What llama.cpp's converter does: a head's halves become pairs of neighbours.
            weight = weight.view(8, 2, 32, 512).transpose(1, 2).reshape(512, 512)
        raw = bytes(weight.contiguous().view(-1).view(torch.uint8).tolist())
        tensors.append((f"{target}.weight", tuple(weight.shape), 0, raw))
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, metadata, tensors), model
