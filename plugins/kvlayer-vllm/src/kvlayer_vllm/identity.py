"""What identifies a model's KV: its files, how vLLM loaded it and, if asked, the engine's build."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from kvlayer import CacheConfig, Namespace
from kvlayer.errors import IdentityError, UnsupportedError
from kvlayer.identity.weights import parse_weights, process_weights
from kvlayer.layout import KVGroup
from kvlayer_vllm.engine import VllmConfig, engine_version

__all__ = ["namespace_of", "overrides_of", "weights_of"]

Scalar = str | int | float | bool

_COMPUTE = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def namespace_of(
    vllm_config: VllmConfig, groups: Sequence[KVGroup], config: CacheConfig, *, isa: str
) -> Namespace:
    """The identity of what this engine computes. Reads the model's files once, to digest them.

    What ``config.model`` states wins over what the engine shows. ``isa`` joins the build where
    ``numerics = "engine"`` asks for it. Raises ``IdentityError`` and ``UnsupportedError``.
    """
    stated, model = config.model, vllm_config.model_config
    dtype = _COMPUTE.get(model.dtype)
    if dtype is None:
        raise UnsupportedError(f"kvlayer cannot carry KV of a model computed in {model.dtype}")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedError(
            "kvlayer cannot carry KV whose scales the engine learns while it runs",
            hint="leave calculate_kv_scales off",
        )
    if vllm_config.weight_transfer_config is not None:
        raise UnsupportedError(
            "kvlayer cannot carry KV of weights that are replaced while the engine serves "
            "(weight_transfer_config)",
            hint="the engine serves without kvlayer",
        )
    return Namespace(
        weights=weights_of(vllm_config, stated.weights, whole=config.verify_weights),
        groups=tuple(groups),
        compute_dtype=stated.compute_dtype or dtype,
        tokens_per_chunk=config.tokens_per_chunk,
        tokens_per_tail=config.tail_tokens,
        overrides={**overrides_of(vllm_config), **stated.overrides},
        kv_scales=stated.kv_scales,
        numerics="portable" if stated.numerics == "portable" else _build(isa),
    )


def weights_of(vllm_config: VllmConfig, stated: str = "", *, whole: bool = False) -> str:
    """The digest of the files the engine loaded its weights from.

    Of weights that no file holds (``load_format = "dummy"``) and that nobody states it is one that
    no other process has. ``whole``: see ``kvlayer.identity.weights``. Raises ``IdentityError``
    where the files are not on this machine.
    """
    if stated:
        return parse_weights(stated, whole=whole)
    if vllm_config.load_config.load_format == "dummy":
        return process_weights()
    model = vllm_config.model_config
    place = getattr(model, "model_weights", "") or model.model
    if Path(place).expanduser().exists():
        return parse_weights(place, whole=whole)
    return parse_weights(_hub_folder(place, model.revision), whole=whole)


def _hub_folder(name: str, revision: str | None) -> str:
    """Where the hub's cache keeps a model that the engine has just loaded."""
    hub: Any = import_module("huggingface_hub")
    try:
        return str(hub.snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError) as exc:  # not there, or no name the hub could have
        raise IdentityError(
            f"the files of {name!r} are not on this machine: {exc}",
            hint='state them in kv_connector_extra_config: {"model": {"weights": "/path"}}',
        ) from None


def overrides_of(vllm_config: VllmConfig) -> dict[str, Scalar]:
    """How the model differs from its files: what was said when it was loaded."""
    model, load = vllm_config.model_config, vllm_config.load_config
    found: dict[str, Any] = {
        "quantization": model.quantization,
        "hf_config_path": getattr(model, "hf_config_path", None),
        "load_format": None if load.load_format in _SAME_WEIGHTS else load.load_format,
        "model_loader": load.model_loader_extra_config or None,
        "hf_overrides": _hf_overrides(model.hf_overrides),
        "multimodal": _media(getattr(model, "multimodal_config", None)),
    }
    return {
        f"vllm.{key}": value if isinstance(value, Scalar) else _canonical(value)
        for key, value in found.items()
        if value
    }


def _media(config: Any) -> dict[str, Any]:
    """How the engine was told to see media: vLLM's hash of an image is of what a request said."""
    found = {name: getattr(config, name, None) for name in _MEDIA}
    if found["video_pruning_rate"]:
        found["video_pruning_method"] = config.video_pruning_method
    return {name: value for name, value in found.items() if value}


_MEDIA = (
    "mm_processor_kwargs",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "video_pruning_rate",
)
_SAME_WEIGHTS = frozenset({"auto", "hf", "safetensors", "pt", "dummy", "mistral", "gguf"})
"""Ways of reading the files that make no difference to what was read."""


def _hf_overrides(given: object) -> object:
    if not callable(given):
        return given
    raise IdentityError(
        "hf_overrides is a function, and nothing can tell what it changes",
        hint="give the changes as a mapping",
    )


def _build(isa: str) -> str:
    """Everything that decides how sums are rounded, as ``Namespace.numerics`` wants it."""
    name = re.sub(r"[^A-Za-z0-9_.!+-]", ".", f"{engine_version()}.torch-{torch.__version__}.{isa}")
    return f"engine:vllm-{name}"


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
