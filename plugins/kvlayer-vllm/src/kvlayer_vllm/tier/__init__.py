"""kvlayer as a tier behind vLLM's own offload: ``"module_path": "kvlayer_vllm.tier"``."""

from kvlayer_vllm.tier.manager import KVLayerTier

__all__ = ["KVLayerTier"]
