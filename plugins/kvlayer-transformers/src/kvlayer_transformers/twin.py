"""A small float32 twin of a model: the same class and kinds of layers, random weights, on the CPU.

The twin shows what the *code* of a family does (which columns attend to which, how positions are
counted), which does not depend on sizes. Sizes that decide where something begins, such as a
window, become small enough for a short prompt to pass them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Final, cast

import torch

from kvlayer_transformers.engine import Model, quiet

__all__ = ["PROMPT_IDS", "WINDOW", "build", "randomise", "twin_of"]

PROMPT_IDS: Final = (8, 384)
"""Ids for prompts of a twin, from and below: the first and the last of its ids are markers."""
WINDOW: Final = 24
"""A twin's sliding window, or its chunk of attention, in tokens."""

_VOCABULARY: Final = 512
_POSITIONS: Final = 512
_MAX_LAYERS: Final = 6
_MAX_PARAMETERS: Final = 64_000_000
_INNER_SIZE: Final = 64

_LAYERS: Final = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    *("encoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"),
)
_HEAD_COUNTS: Final = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads"),
    *("decoder_attention_heads", "encoder_attention_heads"),
)
_WIDTHS: Final = ("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim")
_INNER: Final = ("ffn_dim", "d_ff", "dim_ff", "n_inner", "ffn_hidden_size", "d_inner")
_WINDOWS: Final = (
    *("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size"),
    *("attention_window", "local_attention_window", "local_window_size"),
)
# Upper bounds; what is smaller already stays.
_AT_MOST: Final[Mapping[str, int]] = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), _POSITIONS),
    "original_max_position_embeddings": 64,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_selected_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    "num_nextn_predict_layers": 0,
    "image_size": 64,
    "vocab_size_per_layer_input": _VOCABULARY,
    "hidden_size_per_layer_input": 16,
}


def twin_of(model: Model, *, seed: int = 0) -> Model:
    """A twin of ``model`` in eval mode. Raises ``ValueError`` when none can be built.

    Leaves the caller's random state, default dtype and default device as they are.
    """
    return build(type(model), model.config, seed=seed)


def build(model_class: Any, config: Any, *, seed: int = 0) -> Model:
    """A small model of a class, from a configuration of any size. See :func:`twin_of`."""
    reasons: list[str] = []
    shrinks: tuple[Callable[[Any], Any], ...] = (_small, _small_text, _few_layers)
    for shrink in shrinks:
        try:
            with _quietly():
                return _instance(model_class, shrink(config), seed)
        except Exception as exc:  # noqa: BLE001  # somebody else's constructor: anything may come
            reasons.append(f"{type(exc).__name__}: {exc}")
    raise ValueError("; ".join(dict.fromkeys(reasons)))


def randomise(model: Model, seed: int) -> Model:
    """Weights so large that attending to something else gives another answer. In place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def _small(config: Any) -> Any:
    """A configuration with few and narrow layers, each kind of layer kept, and a small window."""
    small = _few_layers(config)
    fields = _fields(small)
    old_heads, old_width = _first(fields, _HEAD_COUNTS), _first(fields, _WIDTHS)
    if isinstance(old_heads, int) and isinstance(old_width, int):
        size = int(fields.get("head_dim") or old_width // old_heads)
        heads = 2 if size > 128 else 4
        _set(small, _HEAD_COUNTS, heads)
        _set(small, _WIDTHS, heads * size)
        kv_heads = fields.get("num_key_value_heads")
        if isinstance(kv_heads, int):
            shared = 1 if kv_heads == 1 else heads // 2
            small.num_key_value_heads = heads if kv_heads >= old_heads else shared
    for name, value in _fields(small).items():
        if isinstance(value, int) and not isinstance(value, bool):
            if name in _INNER or name.endswith("intermediate_size"):
                setattr(small, name, min(value, _INNER_SIZE))
            elif name in _AT_MOST:
                setattr(small, name, min(value, _AT_MOST[name]))
    return small


def _small_text(config: Any) -> Any:
    """The text part alone, for classes that take it from a configuration of several parts."""
    return _small(config.get_text_config(decoder=True))


def _few_layers(config: Any) -> Any:
    """A copy with few layers, a small vocabulary and a small window; widths stay."""
    small = copy.deepcopy(config)
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            setattr(small, name, _small(inner))
    fields = _fields(small)
    layers = _first(fields, _LAYERS)
    if isinstance(layers, int):
        chosen = _representatives(fields.get("layer_types"), layers)
        for name, value in fields.items():
            each = cast("Sequence[Any]", value) if isinstance(value, list) else ()
            if len(each) == layers > 1:
                setattr(small, name, [each[index] for index in chosen])
        _set(small, _LAYERS, len(chosen))
    if isinstance(fields.get("vocab_size"), int):
        small.vocab_size = min(fields["vocab_size"], _VOCABULARY)
    markers = count(_VOCABULARY - 1, -1)
    for name, value in fields.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            # Image markers and the like get ids of their own, which no prompt of a twin has.
            setattr(small, name, 0 if name == "pad_token_id" else min(value, next(markers)))
    _set(small, _WINDOWS, WINDOW)
    return small


def _representatives(kinds: list[str] | None, layers: int) -> list[int]:
    """Indices of the layers to keep: a beginning with every kind, or one of each kind."""
    if not kinds or len(kinds) != layers:
        return list(range(min(layers, 2)))
    firsts = sorted({kinds.index(kind) for kind in kinds})
    beginning = max(firsts[-1] + 1, 2)
    return list(range(min(beginning, layers))) if beginning <= _MAX_LAYERS else firsts


def _fields(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = config.__dict__
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _first(fields: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _set(config: Any, names: Iterable[str], value: int) -> None:
    """Give every number of these names a value; what is absent or None stays so."""
    fields = _fields(config)
    for name in names:
        found = fields.get(name)
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            setattr(config, name, value)


def _instance(model_class: Any, config: Any, seed: int) -> Model:
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"a twin of {model_class.__name__} would have {size:,} parameters")
    state = torch.get_rng_state()
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            model = model_class._from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation=_attention(config)
            )
    finally:
        torch.set_rng_state(state)
    return randomise(model, seed).eval()


def _attention(config: Any) -> str | None:
    """The model's way to compute attention, where a CPU has it."""
    named = config._attn_implementation
    return named if named in ("eager", "sdpa") else None


@contextmanager
def _quietly() -> Generator[None]:
    """Without the warnings of models that are built in unusual sizes."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield
