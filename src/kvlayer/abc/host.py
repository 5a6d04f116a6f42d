"""The interface of tier 0: the backend that lends host memory instead of copying into its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

from kvlayer.memory.slab import Slab

__all__ = ["HostMemory"]


class HostMemory(ABC):
    """A backend that can be tier 0. While it is, the stack decides what its slab holds."""

    @property
    @abstractmethod
    def slab(self) -> Slab:
        """The memory, from ``open`` to ``aclose``. Raises ``ClosedError`` outside."""
