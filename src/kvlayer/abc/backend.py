"""The one interface a storage backend implements: batches of objects in, aligned results out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import ClassVar, NamedTuple, Self, TypeAlias

from kvlayer.codec.frame import contradicts_header, parent_of, stands_for
from kvlayer.errors import BackendError, UnsupportedError
from kvlayer.identity.keys import ObjectKey
from kvlayer.retention import ORDINARY, Retention
from kvlayer.urls import BackendURL

__all__ = [
    "Backend",
    "Capability",
    "Damaged",
    "DeleteResult",
    "Hit",
    "Lent",
    "Listed",
    "Miss",
    "Read",
    "ReadResult",
    "SizeResult",
    "Version",
    "Write",
    "WriteResult",
    "contradicts_header",
    "parent_of",
    "stands_for",
]

Version: TypeAlias = Hashable
"""Tells the bytes under a key from others that lay there before or will: opaque but to the backend
that made it, equal for equal bytes only. None where a backend cannot tell."""


class Capability(StrEnum):
    """What a backend promises beyond the base contract."""

    LIST = "list"
    """:meth:`Backend.list` works."""
    PERSISTENT = "persistent"
    """Objects survive the process."""
    SHARED = "shared"
    """Other processes may add and remove objects at any time."""
    REVOCABLE = "revocable"
    """A cancelled ``get`` or ``put`` returns within 100 ms. Only to such a backend is memory lent
    that its owner must have back at once."""


@dataclass(frozen=True, slots=True)
class Write:
    """One object to store: the concatenation of ``regions``.

    Each region is a contiguous memoryview of bytes, of any address and length; where all are
    multiples of 4 KiB, direct I/O is possible. The caller keeps them alive and unchanged until
    ``put`` returns.

    The rest is for a backend that chooses what to keep: the object holds ``tokens`` tokens of a
    prompt from ``first_token`` on (no tokens: nobody said), and ``retention`` is what the request
    asked for. ``parent`` is the end hash (32 bytes) of what comes right before it in that prompt;
    it is empty at the prompt's start, and where nobody said. Without what ends there an object
    serves nobody, so a backend should give up the object first.
    """

    key: ObjectKey
    regions: tuple[memoryview, ...]
    first_token: int = 0
    tokens: int = 0
    retention: Retention = ORDINARY
    parent: bytes = b""

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.regions)


@dataclass(frozen=True, slots=True)
class Read:
    """Where to put an object's bytes from ``offset`` on.

    ``regions`` are writable memoryviews, filled in order; addresses, lengths and ``offset`` are
    any, and multiples of 4 KiB where direct I/O should be possible. They belong to the caller, who
    may reuse them once ``get`` has returned. Not a byte outside them is written.

    ``landed``, where it is given, may be called once this item's bytes are all there, with their
    number, on the thread that moved them and before ``get`` returns: the caller looks at them
    while they are in that processor's cache, and need not wait for the rest of the batch. From
    then on this item's memory is the caller's again. It takes the time of a checksum and never
    raises. A backend whose bytes arrive on the loop leaves it.
    """

    key: ObjectKey
    regions: tuple[memoryview, ...]
    offset: int = 0
    landed: Callable[[int], object] | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.regions)


@dataclass(frozen=True, slots=True)
class Hit:
    """``nbytes`` bytes were filled, fewer than asked only when the object ends there.

    ``version`` names the bytes that were read, for :meth:`Backend.quarantine`.
    """

    nbytes: int
    version: Version = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Miss:
    """The object is not there."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One stored object: its key, its encoded size in bytes, its last use (Unix seconds)."""

    key: ObjectKey
    nbytes: int
    used: float


class Damaged(NamedTuple):
    """An object whose bytes are not what was stored, and which bytes those were."""

    key: ObjectKey
    version: Version = None


@dataclass(slots=True, eq=False)
class Lent:
    """An object's bytes where its backend has them, read-only, until the lending ends."""

    regions: tuple[memoryview, ...]
    version: Version = None
    was_held: bool = False
    """Set when the lending has ended: whether the bytes were the object's all the while. If not,
    what was read of them is void."""


SizeResult: TypeAlias = int | BackendError | None
ReadResult: TypeAlias = Hit | Miss | BackendError
WriteResult: TypeAlias = BackendError | None
DeleteResult: TypeAlias = BackendError | None


class Backend(ABC):
    """Keyed storage for immutable objects.

    Calls may run concurrently on one event loop. A batch never raises for one bad item: results
    align with inputs and carry the error. Names are content, so two writers of one key write the
    same bytes and the first wins. An object whose length contradicts its own header is no object:
    ``put`` replaces it (:func:`contradicts_header` looks at a header). One with a capacity never
    holds more, and makes room for what is new. While it still finds out what lies there, after
    ``open``, it takes writes and may hold a sixteenth of the capacity more, and what was written
    by a process that was killed before it noted that; writes beyond that wait.

    Cancelling a call leaves every object whole or absent, and the call returns only once every
    buffer it was lent is untouched: memory is reused the moment it does.
    """

    scheme: ClassVar[str]
    capabilities: frozenset[Capability] = frozenset()
    on_evicted: Callable[[list[tuple[ObjectKey, int]], str], None] | None = None
    """Set by the owner: called on the loop with (key, bytes) of what was evicted, and the policy's
    name. A backend that never evicts by itself ignores it."""
    on_stored: Callable[[list[tuple[ObjectKey, int]]], None] | None = None
    """Set by the owner: called on the loop with (key, bytes) of what the backend has found to be
    there without being asked. A hint; one that hears of nothing ignores it."""

    @classmethod
    @abstractmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        """Build an unopened backend. Touches neither network nor disk.

        Raises ``ConfigError`` for an unknown option or a bad value.
        """

    @abstractmethod
    async def open(self) -> None:
        """Acquire what the backend needs on the running loop. Raises ``BackendError``."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release everything once running calls have ended, introduced memory too. Idempotent."""

    @abstractmethod
    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        """Encoded size in bytes of each object, None for one that is absent.

        An error is not an absence: of an object that cannot be looked at the answer is the error.
        """

    @abstractmethod
    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        """Fill each read's regions in order."""

    @abstractmethod
    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        """Store objects. Storing a present key again succeeds and changes nothing."""

    @abstractmethod
    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        """Remove objects: None for each that is gone, or was missing; else what prevented it."""

    async def quarantine(self, items: Sequence[Damaged], /) -> list[DeleteResult]:
        """Take corrupt objects out of sight so that they are never offered again.

        Answers as :meth:`delete` does. Only the bytes that were read go: an object that has
        another ``version`` by now was written anew and stays. Without a version whatever lies
        there goes.

        The default deletes, and is for backends that give no versions; a backend that can keeps
        the evidence aside.
        """
        return await self.delete([item.key for item in items])

    async def touch(self, keys: Sequence[ObjectKey], /) -> None:
        """Hint that objects were used, the most valuable last. The default ignores it."""

    async def describe(self, namespace: str, canonical: bytes, /) -> None:
        """Remember what a namespace's digest stands for, for people and for ``explain``.

        ``canonical`` hashes to ``namespace``. Called once when a cache opens; a failure is not
        worth an error. The default forgets it.
        """

    async def namespaces(self) -> Mapping[str, bytes]:
        """Namespaces described so far: digest -> canonical form. The default knows none."""
        return {}

    async def introduce(self, region: memoryview, /) -> None:
        """Be told of memory that reads and writes will often lie in, to register it once.

        At any time while it is open. Memory that was not introduced is lent, too. A failure is
        not worth an error. The default does nothing.
        """

    async def withdraw(self, region: memoryview, /) -> None:
        """Forget a region that was introduced: it is about to be unmapped.

        Returns when no call uses it. A region that was never introduced is ignored. The default
        does nothing, and is for backends to which ``introduce`` means nothing.
        """

    def lend(
        self, keys: Sequence[ObjectKey], /
    ) -> AbstractAsyncContextManager[Sequence[Lent | None]]:
        """Objects to be read in place while the context lasts; aligned with ``keys``.

        None for one that is absent or has to be read by :meth:`get`. Nothing waits for a lending:
        an object may be evicted meanwhile, and leaving the context says so (``Lent.was_held``).
        The default lends nothing.
        """
        return nullcontext([None] * len(keys))

    def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        """Every object whose key starts with ``prefix``. Needs ``Capability.LIST``."""
        raise UnsupportedError(f"{self.scheme}:// cannot list its objects (asked for {prefix!r})")

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        await self.aclose()
