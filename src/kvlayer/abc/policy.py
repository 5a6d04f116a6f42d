"""The interface of an eviction policy: which object to give up next. Pure: no clock, no I/O."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

from kvlayer.abc.rows import Rows

__all__ = ["EvictionPolicy", "PolicyMaker"]


class EvictionPolicy(ABC):
    """Orders objects of one tier by how cheap they are to lose. Built with the tier's ``rows``.

    Objects are row numbers. A policy knows an object from ``admit`` to ``remove``. A policy names
    those that are not pinned. Paths run from the start of a prompt and name no row twice.
    Every call costs O(1) per row, whatever the number of objects or pins.

    The tier keeps the rules, so a policy checks nothing: each method says which rows it is given.
    What was demoted, what is to be kept and priorities are the tier's affair, too: it builds a
    policy for each set of objects that stand equal in these.

    A policy that raises, or names a row it must not name, is replaced by ``prefix-lru``.
    """

    name: ClassVar[str]

    def __init__(self, rows: Rows, /) -> None:
        self.rows = rows

    @abstractmethod
    def admit(self, path: Sequence[int], /) -> None:
        """Add objects that became resident, none of them known; they are the most recent now."""

    @abstractmethod
    def refresh(self, path: Sequence[int], /) -> None:
        """Known objects, none of them pinned, were stored again: they are the most recent now.

        That is no *use*: storing a prompt in steps names its beginning many times and serves no
        one.
        """

    @abstractmethod
    def touch(self, path: Sequence[int], /) -> None:
        """A request used consecutive objects of a prompt, once. None of them is pinned."""

    @abstractmethod
    def pin(self, path: Sequence[int], /) -> None:
        """Take known objects, none of them pinned, out of the order: name none of them."""

    @abstractmethod
    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        """Put pinned objects back into the order; they are the most recent now.

        ``used``: a request used them, once.
        """

    @abstractmethod
    def remove(self, row: int, /, *, evicted: bool) -> None:
        """Forget a pinned object; its number will be another's.

        ``evicted``: it made room for others. Otherwise it was deleted, or stands with others now.
        """

    @abstractmethod
    def victim(self) -> int | None:
        """The object to give up next, or None when nothing is evictable. Changes nothing."""


PolicyMaker: TypeAlias = Callable[[Rows], EvictionPolicy]
"""A policy's class, or whatever else builds a policy for a tier's rows."""
