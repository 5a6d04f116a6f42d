"""What a cache tells its listeners: one dataclass per operation, sent to every sink.

Sinks are called on the cache's loop thread, in order, and must return quickly. A sink that raises
is dropped with one log line; it never reaches the serving path. With no sinks nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from itertools import count
from time import time
from typing import TypeAlias

from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause, Failure
from kvlayer.runtime.foreign import Foreign

__all__ = [
    "CacheRebound",
    "Emitter",
    "Event",
    "LookupDone",
    "ObjectQuarantined",
    "ObjectsEvicted",
    "ObjectsRemoved",
    "ObjectsStored",
    "PrefetchDone",
    "RequestStarted",
    "RetrieveDone",
    "Sink",
    "Stamp",
    "StoreDone",
    "TierChanged",
    "TransferDone",
    "TransferStarted",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What every event has, given to it when it is sent. Two events are compared without it."""

    id: int = field(default=0, compare=False, repr=False)
    """Counts the events of one cache, from 1."""
    at: float = field(default=0.0, compare=False, repr=False)
    """When it was sent, in Unix seconds."""
    request: int = field(default=0, compare=False, repr=False)
    """The ``id`` of the ``RequestStarted`` that this is part of; 0: of none. What several requests
    wait for is part of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStarted(Stamp):
    """A ``store``, ``lookup``, ``retrieve`` or ``prefetch`` (``operation``) has begun.

    Its ``...Done`` follows, with the same ``request``, unless it raises or is cancelled.
    """

    operation: str
    owner: str
    tokens: int
    """Of the prompt; of a hit that is retrieved or promoted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStarted(Stamp):
    """A lower tier was asked to move one object; it may still wait for its turn.

    A ``TransferDone`` follows when the tier has let go of the memory it was lent.
    """

    tier: str
    direction: str
    """``load`` or ``store``."""
    key: ObjectKey
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupDone(Stamp):
    """A lookup answered."""

    owner: str
    asked_tokens: int
    hit_tokens: int
    seconds: float
    by_tier: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    """Tokens of the hit by the farthest tier that each span needs, as in ``PrefixHit``."""
    quality: str = "exact"
    """What the end of the hit is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDone(Stamp):
    """A store returned; lower tiers may still be writing."""

    owner: str
    stored: int
    skipped: int
    dropped: int
    failed: tuple[Failure, ...]
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveDone(Stamp):
    """A retrieve returned."""

    owner: str
    asked_tokens: int
    tokens: int
    failed: tuple[Failure, ...]
    nbytes: int
    seconds: float
    by_tier: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    """Tokens that were loaded, by the farthest tier that each span needed; from ``first_token`` on,
    so their sum is ``tokens - first_token``."""
    nbytes_by_tier: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    """``nbytes`` by the nearest tier that had each object when the call began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchDone(Stamp):
    """A prefetch ended with ``tokens`` of the prompt in host memory. Not sent for one cancelled."""

    owner: str
    asked_tokens: int
    tokens: int
    failed: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferDone(Stamp):
    """One object moved between the host and a lower tier, or failed to (``cause``)."""

    tier: str
    direction: str
    """``load`` or ``store``."""
    key: ObjectKey
    nbytes: int
    seconds: float
    cause: Cause | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsStored(Stamp):
    """Objects were gathered from the engine: host memory, ``tier``, serves them from now on.

    What reaches or comes from a lower tier is in ``TransferDone``.
    """

    tier: str
    keys: tuple[ObjectKey, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsEvicted(Stamp):
    """Objects left a tier to make room."""

    tier: str
    policy: str
    keys: tuple[ObjectKey, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsRemoved(Stamp):
    """Objects left a tier because somebody asked for it (``evict``, ``clear``)."""

    tier: str
    keys: tuple[ObjectKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectQuarantined(Stamp):
    """A damaged object was taken out of sight."""

    tier: str
    key: ObjectKey
    cause: Cause
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRebound(Stamp):
    """The cache was bound to a namespace (digests): what is stored from now on is of ``now``.

    ``stopped`` requests of the epoch before have been told to end; their ``...Done`` follow.
    """

    before: str
    now: str
    stopped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChanged(Stamp):
    """A tier went down or came back."""

    tier: str
    ok: bool
    detail: str


Event: TypeAlias = (
    RequestStarted
    | TransferStarted
    | LookupDone
    | StoreDone
    | RetrieveDone
    | PrefetchDone
    | TransferDone
    | ObjectsStored
    | ObjectsEvicted
    | ObjectsRemoved
    | ObjectQuarantined
    | CacheRebound
    | TierChanged
)
Sink: TypeAlias = Callable[[Event], None]


_request: ContextVar[tuple[Emitter, int] | None] = ContextVar("kvlayer_request", default=None)
"""Whose request, and which, what runs now is part of. Tasks that it starts are, too."""
_UNHEARD = nullcontext()


class Emitter:
    """Sends events to sinks. Falsy when nobody listens, so callers can skip building the event."""

    __slots__ = ("_ids", "_sinks", "foreign")

    def __init__(self, sinks: Iterable[Sink] = (), foreign: Foreign | None = None) -> None:
        self._sinks: list[Sink] = list(sinks)
        self.foreign = foreign or Foreign()
        """What calling the sinks has cost."""
        self._ids = count(1)

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def request(self, operation: str, owner: str, tokens: int) -> AbstractContextManager[object]:
        """What is sent inside is part of one request, which starts now. Nothing when unheard."""
        if not self._sinks:
            return _UNHEARD
        started = RequestStarted(operation=operation, owner=owner, tokens=tokens)
        self(started)
        return _Within(self, started.id)

    def within(self, request: int) -> AbstractContextManager[object]:
        """What is sent inside is part of ``request``, or of none (0), whoever sends it."""
        return _Within(self, request) if self._sinks else _UNHEARD

    @property
    def current(self) -> int:
        """The request that what runs now is part of; 0: of none, or nobody listens."""
        if not self._sinks:
            return 0
        found = _request.get()
        return found[1] if found is not None and found[0] is self else 0

    def __call__(self, event: Event) -> None:
        number = next(self._ids)
        is_first = isinstance(event, RequestStarted)
        # An event is frozen for its listeners, and stamped once, when it is sent.
        object.__setattr__(event, "id", number)
        object.__setattr__(event, "at", time())
        object.__setattr__(event, "request", number if is_first else self.current)
        for sink in tuple(self._sinks):
            if self.foreign.call("sink", sink, event):
                continue
            if sink in self._sinks:  # it may have failed inside an event of its own
                self._sinks.remove(sink)


class _Within:
    """The time in which what is sent is part of one request, in the context of its task."""

    __slots__ = ("_token", "_value")

    def __init__(self, emit: Emitter, request: int) -> None:
        self._value = emit, request
        self._token: Token[tuple[Emitter, int] | None] | None = None

    def __enter__(self) -> None:
        self._token = _request.set(self._value)

    def __exit__(self, *error: object) -> None:
        if self._token is not None:
            with suppress(ValueError):  # closed by the garbage collector, in another context
                _request.reset(self._token)
