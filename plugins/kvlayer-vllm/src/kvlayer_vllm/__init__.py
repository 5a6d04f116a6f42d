"""kvlayer for vLLM: a KV connector that is a miss at worst.

Names are resolved when they are first used, so finding the plugin does not import the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvlayer_vllm.connector import KVLayerConnector

__all__ = ["KVLayerConnector"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'kvlayer_vllm' has no attribute {name!r}")
    from kvlayer_vllm.connector import KVLayerConnector

    return KVLayerConnector
