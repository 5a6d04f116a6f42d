"""What identifies a model's KV: its files, how it was loaded, and (if asked) who computed it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from kvlayer import CacheConfig, Namespace
from kvlayer.errors import IdentityError
from kvlayer.identity.weights import parse_weights
from kvlayer_transformers.engine import VERSION, Model
from kvlayer_transformers.geometry import Geometry, overrides_of

__all__ = ["engine_of", "identity_of"]


def identity_of(
    model: Model,
    geometry: Geometry,
    config: CacheConfig,
    *,
    weights: str = "",
    pass_tokens: int,
) -> tuple[CacheConfig, Namespace | None]:
    """``config`` with everything about the model filled in, and the namespace if it says more.

    What ``config.model`` states wins over what the model shows. With portable numerics the
    namespace is None: the core makes it from ``config.model``. Raises ``IdentityError`` when
    ``numerics = "engine"`` is asked for without weights.
    """
    stated = config.model
    weights = weights or stated.weights
    known = replace(
        stated,
        weights=weights,
        compute_dtype=stated.compute_dtype or geometry.compute_dtype,
        overrides={**overrides_of(model, _folder(weights)), **stated.overrides},
    )
    config = replace(config, model=known)
    if known.numerics == "portable":
        return config, None
    if not weights:
        raise IdentityError(
            "numerics = 'engine' needs the model's weights",
            hint="pass weights=, the model's folder or 'sha256:<64 hex digits>'",
        )
    return config, Namespace(
        weights=parse_weights(weights, whole=config.verify_weights),
        groups=geometry.groups,
        compute_dtype=known.compute_dtype,
        tokens_per_chunk=config.tokens_per_chunk,
        tokens_per_tail=config.tail_tokens,
        overrides=known.overrides,
        kv_scales=known.kv_scales,
        numerics=engine_of(model, pass_tokens),
    )


def engine_of(model: Model, pass_tokens: int) -> str:
    """Everything that decides how sums are rounded, as ``Namespace.numerics`` wants it."""
    attention: str = model.config._attn_implementation  # it has no public name
    builds = f"{VERSION}.torch-{torch.__version__}"
    name = re.sub(r"[^A-Za-z0-9_.!+-]", ".", f"{builds}.{attention}.pass-{pass_tokens}")
    return f"engine:transformers-{name}"


def _folder(weights: str) -> str:
    """The folder whose configuration belongs to ``weights``; empty when it is only a digest."""
    if not weights or weights.startswith("sha256:"):
        return ""
    path = Path(weights).expanduser()
    return str(path if path.is_dir() else path.parent)
