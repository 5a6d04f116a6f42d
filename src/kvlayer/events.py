"""What a cache tells its listeners: one dataclass per operation, sent to every sink.

Sinks are called on the cache's loop thread, in order, and must return quickly. A sink that raises
is dropped with one log line; it never reaches the serving path. With no sinks nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from kvlayer._foreign import Foreign
from kvlayer.keys import ObjectKey
from kvlayer.results import Cause, Failure

__all__ = [
    "Emitter",
    "Event",
    "LookupDone",
    "ObjectQuarantined",
    "ObjectsEvicted",
    "ObjectsRemoved",
    "ObjectsStored",
    "PrefetchDone",
    "RetrieveDone",
    "Sink",
    "StoreDone",
    "TierChanged",
    "TransferDone",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupDone:
    """A lookup answered."""

    owner: str
    asked_tokens: int
    hit_tokens: int
    seconds: float
    by_tier: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    """Tokens of the hit by the farthest tier that each span needs, as in ``PrefixHit``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDone:
    """A store returned; lower tiers may still be writing."""

    owner: str
    stored: int
    skipped: int
    dropped: int
    failed: tuple[Failure, ...]
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveDone:
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
class PrefetchDone:
    """A prefetch ended with ``tokens`` of the prompt in host memory. Not sent for one cancelled."""

    owner: str
    asked_tokens: int
    tokens: int
    failed: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferDone:
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
class ObjectsStored:
    """Objects were gathered from the engine: host memory, ``tier``, serves them from now on.

    What reaches or comes from a lower tier is in ``TransferDone``.
    """

    tier: str
    keys: tuple[ObjectKey, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsEvicted:
    """Objects left a tier to make room."""

    tier: str
    policy: str
    keys: tuple[ObjectKey, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectsRemoved:
    """Objects left a tier because somebody asked for it (``evict``, ``clear``)."""

    tier: str
    keys: tuple[ObjectKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectQuarantined:
    """A damaged object was taken out of sight."""

    tier: str
    key: ObjectKey
    cause: Cause
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChanged:
    """A tier went down or came back."""

    tier: str
    ok: bool
    detail: str


Event: TypeAlias = (
    LookupDone
    | StoreDone
    | RetrieveDone
    | PrefetchDone
    | TransferDone
    | ObjectsStored
    | ObjectsEvicted
    | ObjectsRemoved
    | ObjectQuarantined
    | TierChanged
)
Sink: TypeAlias = Callable[[Event], None]


class Emitter:
    """Sends events to sinks. Falsy when nobody listens, so callers can skip building the event."""

    __slots__ = ("_sinks", "foreign")

    def __init__(self, sinks: Iterable[Sink] = (), foreign: Foreign | None = None) -> None:
        self._sinks: list[Sink] = list(sinks)
        self.foreign = foreign or Foreign()
        """What calling the sinks has cost."""

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def __call__(self, event: Event) -> None:
        for sink in tuple(self._sinks):
            if self.foreign.call("sink", sink, event):
                continue
            if sink in self._sinks:  # it may have failed inside an event of its own
                self._sinks.remove(sink)
