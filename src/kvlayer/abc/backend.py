"""The one interface a storage backend implements: batches of objects in, aligned results out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import ClassVar, Self, TypeAlias

from kvlayer.errors import BackendError, UnsupportedError
from kvlayer.keys import ObjectKey
from kvlayer.urls import BackendURL

__all__ = [
    "Backend",
    "Capability",
    "Hit",
    "Listed",
    "Miss",
    "Read",
    "ReadResult",
    "Write",
    "WriteResult",
]


class Capability(StrEnum):
    """What a backend promises beyond the base contract."""

    LIST = "list"
    """:meth:`Backend.list` works."""
    PERSISTENT = "persistent"
    """Objects survive the process."""
    SHARED = "shared"
    """Other processes may add and remove objects at any time."""
    GPU_DIRECT = "gpu-direct"
    """Regions may be device memory."""


@dataclass(frozen=True, slots=True)
class Write:
    """One object to store: the concatenation of ``regions``.

    Each region is a contiguous memoryview of bytes whose address and length are multiples of
    4 KiB. The caller keeps them alive and unchanged until ``put`` returns.
    """

    key: ObjectKey
    regions: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.regions)


@dataclass(frozen=True, slots=True)
class Read:
    """Where to put an object's bytes from ``offset`` on.

    ``regions`` are writable memoryviews, filled in order; addresses, lengths and ``offset`` are
    multiples of 4 KiB. They belong to the caller, who may reuse them once ``get`` has returned.
    """

    key: ObjectKey
    regions: tuple[memoryview, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.regions)


@dataclass(frozen=True, slots=True)
class Hit:
    """``nbytes`` bytes were filled, fewer than asked only when the object ends there."""

    nbytes: int


@dataclass(frozen=True, slots=True)
class Miss:
    """The object is not there."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One stored object: its key, its encoded size in bytes, its last use (Unix seconds)."""

    key: ObjectKey
    nbytes: int
    used: float


ReadResult: TypeAlias = Hit | Miss | BackendError
WriteResult: TypeAlias = BackendError | None


class Backend(ABC):
    """Keyed storage for immutable objects.

    Calls may run concurrently on one event loop. A batch never raises for one bad item: results
    align with inputs and carry the error. Names are content, so two writers of one key write the
    same bytes and the first wins. One with a capacity never holds more, and makes room for what is
    new.

    Cancelling a call leaves every object whole or absent, and the call returns only once every
    buffer it was lent is untouched: memory is reused the moment it does.
    """

    scheme: ClassVar[str]
    capabilities: frozenset[Capability] = frozenset()
    on_evicted: Callable[[list[tuple[ObjectKey, int]], str], None] | None = None
    """Set by the owner: called on the loop with (key, bytes) of what was evicted, and the policy's
    name. A backend that never evicts by itself ignores it."""

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
        """Release everything once running calls have ended. Idempotent."""

    @abstractmethod
    async def contains(self, keys: Sequence[ObjectKey], /) -> list[int | None]:
        """Encoded size in bytes of each object, or None. Raises ``BackendError``."""

    @abstractmethod
    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        """Fill each read's regions in order."""

    @abstractmethod
    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        """Store objects. Storing a present key again succeeds and changes nothing."""

    @abstractmethod
    async def delete(self, keys: Sequence[ObjectKey], /) -> None:
        """Remove objects. Missing keys are ignored."""

    async def quarantine(self, keys: Sequence[ObjectKey], /) -> None:
        """Take corrupt objects out of sight so that they are never offered again.

        The default deletes them; a backend that can keeps the evidence aside.
        """
        await self.delete(keys)

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
