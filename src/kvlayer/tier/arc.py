"""Where installed entry points still look for ``ARC``; it is in `eviction`."""

from kvlayer.eviction.arc import ARC

__all__ = ["ARC"]
