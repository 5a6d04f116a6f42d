"""Where installed entry points still look for policies of recency; they are in `eviction`."""

from kvlayer.eviction.lru import LRU, PrefixLRU

__all__ = ["LRU", "PrefixLRU"]
