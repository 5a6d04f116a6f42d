"""Remembers which models were tried: a verdict holds for a class, not for one set of weights."""

from __future__ import annotations

import logging
import time
from hashlib import sha256
from typing import Any, Final

import torch

from kvlayer.errors import UnsupportedError
from kvlayer_transformers.engine import VERSION, Model
from kvlayer_transformers.geometry import config_digest
from kvlayer_transformers.proof import Verdict, of_family, of_model

__all__ = ["forget", "verdict_of"]

_log = logging.getLogger(__name__)

_FAMILIES: dict[tuple[type[Any], str], Verdict | None] = {}
_MODELS: dict[tuple[type[Any], str], Verdict] = {}
_UNPROVEN: Final = "no small twin of this class can be built to try padding"


def verdict_of(model: Model) -> Verdict:
    """What is wrong with computing this model in pieces, and with padding its prompts.

    Tries the family on a twin and then the model itself, unless both are remembered: per class,
    configuration, dtype, attention implementation and versions, in this process. Raises
    ``UnsupportedError`` for a model that cannot be tried.
    """
    kind: type[Any] = type(model)
    family_key = (kind, config_digest(model))
    key = (kind, f"{family_key[1]}/{_structure(model)}")
    if key in _MODELS:
        return _MODELS[key]
    began = time.process_time()
    if family_key not in _FAMILIES:
        _FAMILIES[family_key] = _try_family(model)
    family = _FAMILIES[family_key]
    if family is not None and family.pieces is not None:
        return family
    own = _try_model(model, padding=family is not None and family.padding is None)
    padding = _UNPROVEN if family is None else family.padding
    _MODELS[key] = verdict = Verdict(own.pieces, padding)
    _log.info("tried %s in %.2f s CPU: %s", kind.__name__, time.process_time() - began, verdict)
    return verdict


def forget() -> None:
    """Try every model again."""
    _FAMILIES.clear()
    _MODELS.clear()


def _try_family(model: Model) -> Verdict | None:
    """None where no twin can be built."""
    try:
        return of_family(model)
    except ValueError as exc:
        _log.info("no twin of %s: %s", type(model).__name__, exc)
        return None


def _try_model(model: Model, *, padding: bool) -> Verdict:
    try:
        return of_model(model, padding=padding)
    except Exception as exc:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be tried in pieces: {type(exc).__name__}: {exc}",
            hint="a model is tried before its KV is stored; pass prove=False if you know that "
            "its prompts may be computed in pieces",
        ) from exc


def _structure(model: Model) -> str:
    """A digest of what the model is made of: its kinds of modules and of tensors."""
    modules = {f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()}
    tensors = {f"{type(p).__qualname__}:{p.dtype}" for p in model.parameters()}
    versions = f"{VERSION} {torch.__version__} {model.device.type}"
    attention: Any = model.config._attn_implementation
    text = "\n".join([versions, str(attention), *sorted(modules), *sorted(tensors)])
    return sha256(text.encode()).hexdigest()
