"""kvlayer for Hugging Face transformers: generation that begins where stored KV ends.

Names are resolved when they are first used, so listing commands does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlayer_transformers.generation import Generation, Loaded
    from kvlayer_transformers.geometry import Geometry
    from kvlayer_transformers.session import Session

__all__ = ["Generation", "Geometry", "Loaded", "Session"]

_HOME_OF = {
    "Generation": "generation",
    "Geometry": "geometry",
    "Loaded": "generation",
    "Session": "session",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kvlayer_transformers' has no attribute {name!r}")
    value: object = getattr(import_module(f"kvlayer_transformers.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
