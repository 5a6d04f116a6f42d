"""The interface of an eviction policy: which object to give up next. Pure: no clock, no I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvlayer.keys import ObjectKey

__all__ = ["EvictionPolicy"]


class EvictionPolicy(ABC):
    """Orders the objects of one tier by how cheap they are to lose.

    A policy knows every object of its tier; pinned ones it never names. Every call costs O(1) per
    key, whatever the number of objects or pins. Paths run from the start of the prompt.
    """

    name: ClassVar[str]

    @abstractmethod
    def admit(self, path: Sequence[ObjectKey], /) -> None:
        """Add objects that became resident and unpinned. A known key counts as used."""

    @abstractmethod
    def touch(self, path: Sequence[ObjectKey], /) -> None:
        """Record one use of consecutive objects of a prompt. Unknown or pinned keys are ignored."""

    @abstractmethod
    def pin(self, key: ObjectKey, /) -> None:
        """Never name this object until it is unpinned. Pinning twice is the caller's to count."""

    @abstractmethod
    def unpin(self, path: Sequence[ObjectKey], /) -> None:
        """Make pinned objects evictable again; counts as one use of the path."""

    @abstractmethod
    def demote(self, key: ObjectKey, /) -> None:
        """Prefer this object over all others for eviction (it was superseded)."""

    @abstractmethod
    def remove(self, key: ObjectKey, /) -> None:
        """Forget an object, evicted or deleted. Unknown keys are ignored."""

    @abstractmethod
    def victim(self) -> ObjectKey | None:
        """The object to give up next, or None when nothing is evictable. Does not remove it."""
