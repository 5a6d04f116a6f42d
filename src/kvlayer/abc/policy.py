"""The interface of an eviction policy: which object to give up next. Pure: no clock, no I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from kvlayer.keys import ObjectKey

__all__ = ["EvictionPolicy"]


class EvictionPolicy(ABC):
    """Orders the objects of one tier by how cheap they are to lose. Built without arguments.

    A policy knows every object of its tier; pinned ones it never names. Every call costs O(1) per
    key, whatever the number of objects or pins. Paths run from the start of the prompt.
    """

    name: ClassVar[str]

    @abstractmethod
    def admit(self, path: Sequence[ObjectKey], /) -> None:
        """Add objects that became resident; they are the most recent now.

        A known key becomes recent again, but is not *used*: storing a prompt in steps names its
        beginning many times and serves no one. A pinned key becomes evictable when it is unpinned,
        and when it was not known before, that unpinning belongs to its arrival and is no use.
        """

    @abstractmethod
    def touch(self, path: Sequence[ObjectKey], /) -> None:
        """Record that a request used consecutive objects of a prompt, once.

        Unknown or pinned keys are ignored.
        """

    @abstractmethod
    def pin(self, key: ObjectKey, /) -> None:
        """Never name this object until it is unpinned. Pinning twice is the caller's to count.

        A key that is not known yet may be pinned: it is about to be admitted.
        """

    @abstractmethod
    def unpin(self, path: Sequence[ObjectKey], /) -> None:
        """Make pinned objects evictable again; counts as one use of the path.

        A pinned key that was never admitted is forgotten.
        """

    @abstractmethod
    def demote(self, key: ObjectKey, /) -> None:
        """Prefer this object over all others for eviction, in the order of these calls.

        A later use takes that back. A pinned object comes first once it is unpinned.
        """

    @abstractmethod
    def remove(self, key: ObjectKey, /) -> None:
        """Forget an object. Unknown keys are ignored.

        One that ``victim`` named last, or that was demoted, made room for others; any other was
        deleted. A policy that learns from what it evicted may tell the two apart.
        """

    @abstractmethod
    def victim(self) -> ObjectKey | None:
        """The object to give up next, or None when nothing is evictable. Does not remove it."""
