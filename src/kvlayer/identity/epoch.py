"""How long a cache's KV is that of one namespace. Pure."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Epoch"]


@dataclass(slots=True, eq=False)
class Epoch:
    """One epoch of a cache: from :meth:`kvlayer.Cache.rebind` to the next.

    Every chain that the cache makes is of the epoch in which it was made, and so is every request
    that takes it. Two epochs may have the same namespace: what lay in the engine's memory between
    them is nobody's all the same.
    """

    namespace: str
    """The digest of what the engine computes now."""
    owner: object = None
    """Whose epoch it is: another cache's says nothing here."""
    is_over: bool = False
