"""numpy and torch by name, imported when something is first read from them.

The core must import and type-check without either; staging alone needs them, and only at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["np", "torch"]


class _Module:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)  # the next read does not come here
        return value


np: Any = _Module("numpy")
torch: Any = _Module("torch")
