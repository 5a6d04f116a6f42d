"""What the API answers: reports, hits and the causes of misses. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kvlayer.identity.keys import Span

__all__ = [
    "Cause",
    "Explanation",
    "Failure",
    "ForeignCost",
    "Health",
    "MissedChunk",
    "OwnerStats",
    "RetrieveReport",
    "Stats",
    "StoreReport",
    "TierHealth",
    "TierStats",
]


class Cause(StrEnum):
    """Why a chunk was not served or not stored. One closed set for reports, events and metrics."""

    NEVER_STORED = "never-stored"
    SHORT = "shorter-than-a-chunk"
    NO_NAME = "no-name"
    """A token id is larger than any that is named; nothing from there on has a name."""
    EVICTED = "evicted"
    CLEARED = "cleared"
    OTHER_SALT = "other-salt"
    OTHER_NAMESPACE = "other-namespace"
    IN_FLIGHT = "in-flight"
    DEADLINE = "deadline"
    VANISHED = "vanished"
    """Another process removed the object between lookup and load."""
    EMPTY = "empty"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    MISPLACED = "misplaced"
    FOREIGN_VERSION = "foreign-version"
    TIER_DOWN = "tier-down"
    RANK_DOWN = "rank-down"
    """A rank of the engine did not move its share between its tensors and host memory."""
    NO_ROOM = "no-room"
    BUSY = "busy"
    """Too much already in flight."""
    REBOUND = "rebound"
    """The cache was bound to another namespace, or anew to the same, while the request ran."""
    SLOW = "slower-than-recomputing"
    """It is there, but loading it would take longer than computing it anew."""

    @property
    def is_damage(self) -> bool:
        """Whether the stored object itself is unusable and must be quarantined.

        What another release has written is not: it is passed over.
        """
        return self in _DAMAGE


_DAMAGE = frozenset({Cause.EMPTY, Cause.TRUNCATED, Cause.CORRUPT, Cause.MISPLACED})


@dataclass(frozen=True, slots=True)
class Failure:
    """One span that could not be stored or loaded, and why."""

    span: Span
    cause: Cause
    tier: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StoreReport:
    """What became of the spans of one store, in spans (chunks and the tail).

    ``stored``: new, readable now. ``skipped``: already there. ``dropped``: no room in host memory.
    ``failed``: a tier that was to have the span does not, and it is served from where it is; or
    nothing names it (:attr:`Cause.NO_NAME`).
    """

    stored: int = 0
    skipped: int = 0
    dropped: int = 0
    failed: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class RetrieveReport:
    """Tokens ``[0, tokens)`` of the prompt are in the engine's memory and correct.

    (From ``first_token`` on; what lies before it the engine had already.) When ``tokens`` is less
    than was asked for, ``failed`` says what ended the prefix.
    """

    tokens: int
    failed: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class MissedChunk:
    """Why one span of a prompt is not usable."""

    start: int
    stop: int
    cause: Cause
    detail: str
    """One sentence for a person: which policy and when, which field differs, which tier."""
    divergent_token: int | None = None
    """First position at which a stored prompt with the same beginning differs, when known."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which part of a prompt is usable, where it lies, and the cause of each miss after it."""

    num_tokens: int
    hit_tokens: int
    by_tier: Mapping[str, int]
    misses: tuple[MissedChunk, ...]
    encoded_nbytes: Mapping[str, int] = field(default_factory=dict[str, int])
    """By lower tier, what the usable part takes there, coded and with headers, where known."""

    def __str__(self) -> str:
        places = ", ".join(f"{n} from {tier}" for tier, n in self.by_tier.items() if n)
        whence = f" ({places})" if places else ""
        lines = [f"{self.hit_tokens} of {self.num_tokens} tokens usable{whence}"]
        lines += [f"  tokens {m.start}..{m.stop}: {m.cause}: {m.detail}" for m in self.misses]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters of one tier since it was opened. Bytes are payload bytes."""

    name: str
    objects: int
    used_nbytes: int
    capacity_nbytes: int | None
    pinned_nbytes: int
    hits: int
    misses: Mapping[Cause, int]
    stored: int
    evicted: int
    loaded_nbytes: int
    stored_nbytes: int
    inflight: int = 0
    """Calls running or waiting for their turn; ``inflight_nbytes`` is what they move."""
    inflight_nbytes: int = 0
    orphans: int = 0
    """Calls that a deadline has passed over and that have not ended yet."""
    reads: str = "closed"
    """The breaker of reads: ``closed`` (asked), ``open`` (not asked for now), ``half-open``."""
    writes: str = "closed"
    """The breaker of writes."""
    latency_seconds: float = 0.0
    """What a load takes whatever its size, as learnt from loads."""
    bytes_per_second: float | None = None
    """What a load moves beyond that; None while nothing was loaded."""
    oldest_call: str = ""
    """The lane (``reads``, ``writes``) of the call that has not ended for longest; empty: none."""
    oldest_call_seconds: float = 0.0
    """Its age, waiting for its turn included: it grows while a tier hangs."""
    demoted: int = 0
    """Dropped from host memory before its room was needed; a lower tier has them."""
    policies_replaced: int = 0
    """How often the eviction policy broke its contract and ``prefix-lru`` took its place."""
    left_unfinished: int = 0
    """Objects that a process which died had not written, as far as the tier found out."""
    queued: int = 0
    """Objects that wait in host memory for their turn to be written."""
    dropped_writes: int = 0
    """Writes given up because host memory itself was needed; stored anew when next computed."""
    foreign: int = 0
    """Objects that the tier lists in an encoding this cache does not read: never served, and
    evicted like others."""
    foreign_encodings: Mapping[str, int] = field(default_factory=dict[str, int])
    """How many of those in which encoding, such as ``2.squeeze``; of the first 64."""
    encoded_nbytes: int = 0
    """What the objects that are known take on the tier, coded and with headers, as far as is known;
    ``used_nbytes`` is what the tier itself counts, where it does."""
    set_aside: int = 0
    """Objects that failed three times in a row: not offered until they are written anew."""
    questions: int = 0
    """Calls by which lookups asked whether objects are there; ``asked_keys`` counts the objects."""
    asked_keys: int = 0


@dataclass(frozen=True, slots=True)
class OwnerStats:
    """What one owner leases. What is leased twice counts twice."""

    leases: int
    nbytes: int
    """Bytes that were in host memory when they were leased; loads come on top."""


@dataclass(frozen=True, slots=True)
class ForeignCost:
    """What calling one kind of other people's code has cost. ``longest_seconds``: of one call."""

    calls: int = 0
    errors: int = 0
    longest_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of a cache's counters."""

    tiers: tuple[TierStats, ...]
    lookups: int
    asked_tokens: int
    hit_tokens: int
    leases: int
    inflight: int
    prefill_tokens_per_second: float | None = None
    """What recomputing is taken to achieve; None while unknown."""
    owners: Mapping[str, OwnerStats] = field(default_factory=dict[str, OwnerStats])
    """Who holds leases now, by the owner that a scope or a pin names; without one under ``""``."""
    foreign: Mapping[str, ForeignCost] = field(default_factory=dict[str, ForeignCost])
    """What other people's code (``sink``, ``on_gathered``, ``on_layer``) has cost, by kind."""
    forgotten: int = 0
    """Objects of lower tiers that the directory had to forget: lookups ask the tiers since."""


@dataclass(frozen=True, slots=True)
class TierHealth:
    """Whether a tier serves, and why not."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """``ok`` when every tier serves."""

    tiers: tuple[TierHealth, ...] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        return all(t.ok for t in self.tiers)
