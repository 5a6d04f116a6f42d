"""What a transformers model keeps per token: its KV groups, layout and load-time overrides.

Shapes and dtypes come from the tensors the model itself produces for one token, so they hold for
every architecture; what cannot be seen in tensors (RoPE, overrides) comes from its configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NoReturn, TypeAlias, cast

import torch

from kvlayer.errors import UnsupportedError
from kvlayer.layout import DENSE, AttentionKind, GroupLayout, KVGroup, KVLayout
from kvlayer_transformers.code import Code
from kvlayer_transformers.contents import foreign_digest
from kvlayer_transformers.engine import (
    AutoConfig,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    Model,
    Past,
    check_version,
)
from kvlayer_transformers.loaded import changed_modules, changed_tensors
from kvlayer_transformers.watch import check_ready

__all__ = ["Geometry", "check_cache", "config_digest", "overrides_of"]

Scalar: TypeAlias = str | int | float | bool

_DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# With these the angle of a key depends on how long the sequence was when it was computed, so a
# prefix does not determine its KV.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_QUANTISED = "quantization_config"
# Fields of a config that say where it came from or how text is read, never what KV becomes.
_BOOKKEEPING = frozenset(
    {
        *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id"),
        *("initializer_range", "attention_dropout", "chunk_size_feed_forward"),
    }
)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The KV groups of a model and where its tensors live.

    Layers of a group have equal heads, head sizes, dtype and RoPE. ``compute_dtype`` is the dtype
    of the model's weights.
    """

    groups: tuple[KVGroup, ...]
    compute_dtype: str
    device: torch.device

    @classmethod
    def of(cls, model: Model) -> Geometry:
        """Run the model on one token and look at what it kept.

        Raises ``UnsupportedError``, naming the kind, for a model whose past is not one key and
        one value per token and layer.
        """
        check_version()
        if not (hasattr(model, "config") and hasattr(model, "generate")):
            raise UnsupportedError(
                f"a {type(model).__name__} is no model that generates",
                hint="pass what AutoModelForCausalLM.from_pretrained(...) returns",
            )
        config = model.config.get_text_config(decoder=True)
        _check_model(model, config)
        check_ready(model)
        past: Past = DynamicCache()
        with torch.no_grad():  # as generate: what works there may fail in inference_mode
            one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
            model(one, past_key_values=past, use_cache=True)
        check_cache(past, config.num_hidden_layers)
        columns = past.layers[0].keys.shape[-2]
        if columns != 1:
            _refuse(f"a past of {columns} columns for one token: the model adds its own")
        if len({layer.keys.device for layer in past.layers}) > 1:
            _refuse("a past that is spread over several devices")
        kinds: list[str] = getattr(config, "layer_types", None) or ["full_attention"] * len(
            past.layers
        )
        members: dict[tuple[Any, ...], list[int]] = {}
        for index, (layer, kind) in enumerate(zip(past.layers, kinds, strict=True)):
            rope = tuple(sorted(_rope(config, kind).items()))
            shape = (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            members.setdefault((rope, layer.keys.dtype, *shape), []).append(index)
        groups = tuple(
            KVGroup(
                AttentionKind.MHA,
                tuple(layers),
                _dtype_name(dtype),
                num_kv_heads=heads,
                head_size=head_size,
                v_head_size=None if v_head_size == head_size else v_head_size,
                rope=dict(rope),
            )
            for (rope, dtype, heads, head_size, v_head_size), layers in members.items()
        )
        return cls(groups, _dtype_name(model.dtype), past.layers[0].keys.device)

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def layout(self) -> KVLayout:
        """Dense: one row of a batch, ``(head, token, dim)``, K and V apart; slot is column."""
        return KVLayout(tuple(GroupLayout(group, DENSE) for group in self.groups))


def check_cache(past: Past, num_layers: int) -> None:
    """Raise ``UnsupportedError`` unless ``past`` keeps every key and value of every layer.

    ``past`` may be any object. Only a ``DynamicCache`` of plain ``DynamicLayer`` does:
    sliding-window layers drop what left the window, static and quantised ones hold other bytes,
    linear attention holds a state.
    """
    if type(past) is not DynamicCache:
        _refuse(f"a {type(past).__name__}")
    if past.offloading:
        _refuse("an offloaded DynamicCache")
    for index, layer in enumerate(past.layers):
        if type(layer) is not DynamicLayer:
            _refuse(f"a cache whose layer {index} is a {type(layer).__name__}")
    if len(past.layers) != num_layers or any(layer.keys is None for layer in past.layers):
        held = sum(layer.keys is not None for layer in past.layers)
        _refuse(f"a cache that holds keys for {held} of the model's {num_layers} layers")


def overrides_of(model: Model, folder: str) -> dict[str, Scalar]:
    """How the model differs from its files: quantisation and configuration changed at load time.

    Layers and tensors that replaced the class's own without a word in the configuration (torchao's
    ``quantize_``, quanto) are named by a digest of their kinds and of samples of their content.
    Functions that are neither transformers' nor torch's, by a digest of their code. Parameters that
    are not those of the ``safetensors`` in ``folder``, and modules that are not as the class makes
    them of the configuration, by digests of what they are: see :mod:`kvlayer_transformers.loaded`.

    ``folder`` holds the files the weights digest was made of; when it is empty, the place the
    model says it came from is used. Without either the whole configuration is named by its
    digest, which shares less but never wrongly.
    """
    config = _shaping(model.config)
    published = _published(folder or model.config.name_or_path)
    added: dict[str, Scalar] = {
        key: f"sha256:{digest}"
        for key, digest in _in_memory(model, folder, quantised=bool(config.get(_QUANTISED)))
        if digest is not None
    }
    if published is None:
        return {"config": f"sha256:{config_digest(model)}", **added}
    return added | {
        key: value if isinstance(value := config.get(key), Scalar) else _canonical(value)
        for key in sorted(config.keys() | published.keys())
        if config.get(key) != published.get(key)
    }


def _in_memory(model: Model, folder: str, *, quantised: bool) -> Iterator[tuple[str, str | None]]:
    """Digests of what files and configuration do not say."""
    yield "code", Code(model).foreign()
    if quantised:
        return
    foreign = foreign_digest(model)
    yield "modules", foreign
    if foreign is None:
        yield "tensors", changed_tensors(model, folder)
        yield "numbers", changed_modules(model)


def config_digest(model: Model) -> str:
    """sha256, in hex, of every field of the configuration that may shape KV."""
    return sha256(_canonical(_shaping(model.config)).encode()).hexdigest()


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"kvlayer cannot carry {what}",
        hint="kvlayer carries decoders on one device that keep a key and a value per token and "
        "layer, in a DynamicCache() made without a config",
    )


def _check_model(model: Model, text_config: Any) -> None:
    """Refuse what can be told without running the model."""
    config = model.config
    if (getattr(model, "tp_size", None) or 1) > 1:
        _refuse("one rank's share of the heads: the model is tensor-parallel")
    if config.is_encoder_decoder:
        _refuse(f"the cross-attention cache of {config.model_type}, an encoder-decoder model")
    for layer in DynamicCache(config=text_config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            _refuse(f"the {type(layer).__name__} of {config.model_type}")
    kinds: set[str] = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    for kind in sorted(kinds):
        rope_type = _rope(text_config, kind).get("rope_type")
        if rope_type in _LENGTH_DEPENDENT_ROPE:
            raise UnsupportedError(
                f"RoPE of type {rope_type!r} rotates keys by the length of the whole sequence, so "
                "KV of a prefix is not reusable",
                hint="load the model with a fixed RoPE scaling (linear, yarn, llama3)",
            )


def _rope(config: Any, layer_kind: str) -> dict[str, Scalar | None]:
    """Everything the config says about the rotation of K in layers of one kind, flat.

    Numbers are floats, so 10000 and 10000.0 are one name; lists become their JSON.
    """
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        parameters = parameters.get(layer_kind) or {}
    return {key: _flat(value) for key, value in parameters.items()}


def _flat(value: object) -> Scalar | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if value is None or isinstance(value, str | bool) else _canonical(value)


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _DTYPES:
        _refuse(f"keys and values of {dtype}")
    return _DTYPES[dtype]


def _shaping(config: Any) -> dict[str, Any]:
    """The fields of a config that may shape KV, nested configs included."""
    return dict(_without(config.to_dict(), _BOOKKEEPING))


def _published(place: str) -> dict[str, Any] | None:
    """The fields of the config in a folder or hub cache; None when there is none to be read."""
    try:
        return _shaping(AutoConfig.from_pretrained(place, local_files_only=True)) if place else None
    except (OSError, ValueError):
        return None


def _without(fields: Mapping[str, Any], names: frozenset[str]) -> Iterable[tuple[str, Any]]:
    for key, value in fields.items():
        if key not in names:
            nested = isinstance(value, Mapping)
            inner = cast("Mapping[str, Any]", value)
            yield key, dict(_without(inner, names)) if nested else value


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
