"""kvlayer: the KV cache of an LLM engine as shared, durable data. Import it, do not run it.

Names are resolved when they are first used (PEP 562), so importing the package costs next to
nothing in a serving process and never imports a tensor library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlayer.api.cache import Cache
    from kvlayer.api.lookup import Lookup, LookupState
    from kvlayer.api.portal import Portal
    from kvlayer.config.model import CacheConfig, ModelConfig, TierConfig
    from kvlayer.errors import KVLayerError
    from kvlayer.identity.namespace import Namespace
    from kvlayer.layout import AttentionKind, GroupLayout, HitRule, KVGroup, KVLayout, KVView
    from kvlayer.results import Cause, Explanation, Health, RetrieveReport, Stats, StoreReport
    from kvlayer.retention import Retention
    from kvlayer.scope import Content, Salt, Scope

    __version__: str

__all__ = [
    "AttentionKind",
    "Cache",
    "CacheConfig",
    "Cause",
    "Content",
    "Explanation",
    "GroupLayout",
    "Health",
    "HitRule",
    "KVGroup",
    "KVLayerError",
    "KVLayout",
    "KVView",
    "Lookup",
    "LookupState",
    "ModelConfig",
    "Namespace",
    "Portal",
    "Retention",
    "RetrieveReport",
    "Salt",
    "Scope",
    "Stats",
    "StoreReport",
    "TierConfig",
    "__version__",
]

_HOMES = {
    "api.cache": ("Cache",),
    "config.model": ("CacheConfig", "ModelConfig", "TierConfig"),
    "errors": ("KVLayerError",),
    "layout": ("AttentionKind", "GroupLayout", "HitRule", "KVGroup", "KVLayout", "KVView"),
    "api.lookup": ("Lookup", "LookupState"),
    "identity.namespace": ("Namespace",),
    "api.portal": ("Portal",),
    "results": ("Cause", "Explanation", "Health", "RetrieveReport", "Stats", "StoreReport"),
    "retention": ("Retention",),
    "scope": ("Content", "Salt", "Scope"),
}
_HOME_OF = {name: f"kvlayer.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from kvlayer._version import version

        value: object = version()
    elif name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'kvlayer' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
