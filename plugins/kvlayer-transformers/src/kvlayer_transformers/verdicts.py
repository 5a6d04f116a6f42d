"""Remembers which models were tried: a verdict holds for a class, not for one set of weights."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

import torch

from kvlayer.errors import UnsupportedError
from kvlayer_transformers.code import Code
from kvlayer_transformers.engine import VERSION, Model
from kvlayer_transformers.geometry import config_digest
from kvlayer_transformers.proof import RECIPE, TooSlow, Verdict, of_family, of_model
from kvlayer_transformers.remembered import Remembered

__all__ = ["forget", "verdict_of"]

_log = logging.getLogger(__name__)

_FAMILIES: dict[tuple[type[Any], str], Verdict | None] = {}
_MODELS: dict[tuple[type[Any], str], Verdict] = {}
_UNPROVEN: Final = "no small twin of this class can be built to try padding"


def verdict_of(model: Model, *, remembered: Remembered | None = None) -> Verdict:
    """What is wrong with computing this model in pieces, and with padding its prompts.

    Tries the family on a twin and then the model itself, unless both are remembered: per class and
    its code, configuration, dtype, attention implementation and versions. In this process for
    every class; in the user's cache folder for classes of transformers, where nothing is wrong.
    A model that is not tried in its time is believed to be like its twin, in this process; the log
    says so. Raises ``UnsupportedError`` for a model that cannot be tried.
    """
    kind: Any = model.__class__
    config, attention = config_digest(model), model.config._attn_implementation
    code = Code(model)
    family_key = (kind, f"{RECIPE}/{config}/{code.digest()}/{attention}")
    dtypes = sorted({f"{type(p).__qualname__}:{p.dtype}" for p in model.parameters()})
    key = (kind, "/".join([family_key[1], model.device.type, *dtypes]))
    if key in _MODELS:
        return _MODELS[key]
    name = f"{kind.__module__}.{kind.__qualname__}/{VERSION}/{torch.__version__}/{key[1]}"
    shared = kind.__module__.startswith("transformers.models.") and code.foreign() is None
    remembered = Remembered() if remembered is None else remembered
    known = remembered.get(name) if shared else None
    verdict, is_whole = (known, True) if known is not None else _try(model, family_key)
    _MODELS[key] = verdict
    if shared and known is None and is_whole and verdict.pieces is None:
        remembered.put(name, verdict)
    return verdict


def _try(model: Model, family_key: tuple[type[Any], str]) -> tuple[Verdict, bool]:
    """The verdict, and whether nothing was left out."""
    began = time.process_time()
    if family_key not in _FAMILIES:
        _FAMILIES[family_key] = _try_family(model)
    family = _FAMILIES[family_key]
    if family is not None and family.pieces is not None:
        return family, True
    own = _try_model(model, family)
    pieces = None if own is None else own.pieces
    verdict = Verdict(pieces, _UNPROVEN if family is None else family.padding)
    seconds = time.process_time() - began
    _log.info("tried %s in %.2f s CPU: %s", type(model).__name__, seconds, verdict)
    return verdict, own is not None


def forget() -> None:
    """Try every model again that was tried in this process."""
    _FAMILIES.clear()
    _MODELS.clear()


def _try_family(model: Model) -> Verdict | None:
    """None where no twin can be built."""
    try:
        return of_family(model)
    except ValueError as exc:
        _log.info("no twin of %s: %s", type(model).__name__, exc)
        return None


def _try_model(model: Model, family: Verdict | None) -> Verdict | None:
    """None for a model that is too slow to be tried, where its family was."""
    try:
        return of_model(model, padding=family is not None and family.padding is None)
    except TooSlow as exc:
        if family is None:
            raise UnsupportedError(
                f"{type(model).__name__} was not tried in pieces: {exc}, and no small twin of its "
                "class can be built",
                hint="pass prove=False if you know that its prompts may be computed in pieces",
            ) from exc
        name = type(model).__name__
        _log.warning("%s itself was not tried: %s. A small twin of its class was", name, exc)
        return None
    except Exception as exc:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be tried in pieces: {type(exc).__name__}: {exc}",
            hint="a model is tried before its KV is stored; pass prove=False if you know that "
            "its prompts may be computed in pieces",
        ) from exc
