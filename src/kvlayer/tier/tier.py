"""One tier at run time: its name, its rules, its guard, its counters and what it reports."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kvlayer.abc.backend import Backend, SizeResult
from kvlayer.errors import BackendError
from kvlayer.events import (
    Emitter,
    ObjectsEvicted,
    ObjectsRemoved,
    ObjectsStored,
    TierChanged,
    TransferDone,
    TransferStarted,
)
from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause, TierHealth, TierStats
from kvlayer.runtime.foreign import words
from kvlayer.tier.guard.estimate import Estimate
from kvlayer.tier.guard.guard import Guard, Lane, Refused, TierCall
from kvlayer.tier.messages import Outcome
from kvlayer.tier.planner.recent import Recent
from kvlayer.tier.planner.records import ObjectRecord

__all__ = ["LowerTier", "Tier"]

_log = logging.getLogger(__name__)

_TRIES = 3  # failures in a row of one object at which it is set aside
_MAX_LISTED = 64  # namespaces; one that is forgotten is asked about again
_MAX_FAILING = 1024  # objects whose failures are counted; the oldest is forgotten first


@dataclass(slots=True, eq=False)
class Tier:
    """Counters of one tier since it was opened, in objects and payload bytes."""

    index: int
    name: str
    emit: Emitter
    hits: int = 0
    misses: Counter[Cause] = field(default_factory=Counter[Cause])
    stored: int = 0
    evicted: int = 0
    demoted: int = 0
    """Dropped in the background; a lower tier had them."""
    loaded_nbytes: int = 0
    stored_nbytes: int = 0

    def health(self) -> TierHealth:
        return TierHealth(self.name, ok=True)

    def stats(self, objects: int, used: int, capacity: int | None, pinned: int = 0) -> TierStats:
        """A snapshot of the counters, with what the tier holds now in objects and bytes."""
        return TierStats(
            name=self.name,
            objects=objects,
            used_nbytes=used,
            capacity_nbytes=capacity,
            pinned_nbytes=pinned,
            hits=self.hits,
            misses=dict(self.misses),
            stored=self.stored,
            evicted=self.evicted,
            loaded_nbytes=self.loaded_nbytes,
            stored_nbytes=self.stored_nbytes,
            demoted=self.demoted,
        )

    def gathers(self, keys: Sequence[ObjectKey], nbytes: int) -> None:
        """Objects came from the engine."""
        self.stored += len(keys)
        self.stored_nbytes += nbytes
        if self.emit and keys:
            self.emit(ObjectsStored(tier=self.name, keys=tuple(keys), nbytes=nbytes))

    def removed(self, keys: Sequence[ObjectKey]) -> None:
        """Objects were taken out by request."""
        if self.emit and keys:
            self.emit(ObjectsRemoved(tier=self.name, keys=tuple(keys)))

    def lost(self, policy: str, keys: Sequence[ObjectKey], nbytes: int) -> None:
        """Objects were evicted."""
        self.evicted += len(keys)
        if self.emit and keys:
            self.emit(
                ObjectsEvicted(tier=self.name, policy=policy, keys=tuple(keys), nbytes=nbytes)
            )

    def demotes(self, dropped: Sequence[ObjectRecord]) -> None:
        """Objects left in the background, and are served from below."""
        self.demoted += len(dropped)
        if self.emit and dropped:
            keys = tuple(gone.key for gone in dropped)
            nbytes = sum(gone.nbytes for gone in dropped)
            self.emit(ObjectsEvicted(tier=self.name, policy="demotion", keys=keys, nbytes=nbytes))

    def refused(self, cause: Cause) -> None:
        """Something was not done because there was no room or too much in flight."""
        self.misses[cause] += 1


@dataclass(slots=True, eq=False, kw_only=True)
class LowerTier(Tier):
    """A tier below the host: a backend behind a guard."""

    backend: Backend
    guard: Guard
    write: str
    tails: bool
    is_shared: bool
    was_empty: bool = True
    """Whether the tier held nothing when it was opened, so that the directory knows all of it."""
    listed: Recent[str, None] = field(default_factory=lambda: Recent[str, None](_MAX_LISTED))
    """Namespaces of which the directory has learnt all that the tier held."""
    estimate: Estimate = field(default_factory=Estimate)
    """How long loads take."""
    dropped: int = 0
    """Writes that were given up because host memory itself was needed."""
    set_aside: int = 0
    """Objects that failed several times in a row and are not offered until they are rewritten."""
    questions: int = 0
    """Calls that asked whether objects are there; ``asked_keys`` counts those objects."""
    asked_keys: int = 0
    on_opened: Callable[[], None] | None = None
    """Told when a breaker has opened."""
    _troubles: dict[Lane, str] = field(default_factory=dict[Lane, str])
    _failing: dict[tuple[Lane, ObjectKey], int] = field(
        default_factory=dict[tuple[Lane, ObjectKey], int]
    )
    """Failures in a row, by object."""

    def __post_init__(self) -> None:
        self.guard.on_opened = self._opened
        self.guard.on_probed = self._serves_again

    @property
    def trouble(self) -> str:
        """What went wrong last; empty while the tier serves."""
        return "; ".join(self._troubles.values())

    def health(self) -> TierHealth:
        return TierHealth(self.name, not self._troubles, self.trouble)

    def stats(self, objects: int, used: int, capacity: int | None, pinned: int = 0) -> TierStats:
        """See :meth:`Tier.stats`; with what is in flight and how the tier has been answering."""
        oldest_call, seconds = self.guard.oldest()
        return replace(
            Tier.stats(self, objects, used, capacity, pinned),
            foreign=getattr(self.backend, "foreign", 0),
            foreign_encodings=dict(getattr(self.backend, "foreign_encodings", {})),
            set_aside=self.set_aside,
            dropped_writes=self.dropped,
            questions=self.questions,
            asked_keys=self.asked_keys,
            inflight=self.guard.inflight,
            inflight_nbytes=self.guard.inflight_nbytes,
            orphans=self.guard.orphans,
            reads=self.guard.breaker(Lane.READS).state,
            writes=self.guard.breaker(Lane.WRITES).state,
            latency_seconds=self.estimate.latency,
            bytes_per_second=self.estimate.bandwidth,
            oldest_call=oldest_call,
            oldest_call_seconds=seconds,
        )

    def figure(self, name: str) -> int | None:
        """What the backend says of itself, in a property; None where it says no whole number.

        Foreign code that any thread runs: whatever it raises is no figure.
        """
        try:
            value: object = getattr(self.backend, name, None)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001  # the boundary
            _log.debug("%s cannot say its %s: %s", self.name, name, words(exc))
            return None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def works(self, lane: Lane = Lane.READS, key: ObjectKey | None = None) -> None:
        """A call succeeded in time; ``key``: what it was about, where that was one object."""
        if self._failing and key is not None:
            self._failing.pop((lane, key), None)
        self.guard.succeeded(lane)
        if self._troubles:
            self._cleared(lane, "a call succeeded")

    def fails(
        self,
        cause: Cause,
        detail: str,
        lane: Lane = Lane.READS,
        key: ObjectKey | None = None,
    ) -> None:
        """A call failed: an error or a missed deadline.

        An error about one object, ``key``, may be that object's. It becomes the tier's when
        another object fails before anything succeeds.
        """
        self.misses[cause] += 1
        if key is not None:
            self._failing[lane, key] = self._failing.pop((lane, key), 0) + 1
            if len(self._failing) > _MAX_FAILING:
                del self._failing[next(iter(self._failing))]
        if cause is Cause.DEADLINE:
            self.guard.missed(lane, detail)
        else:
            self.guard.failed(lane, detail, key)
        breaker = self.guard.breaker(lane)
        if key is None or not breaker.is_closed or breaker.failed_count > 1:
            self._troubled(lane, detail or cause)

    def is_hopeless(self, lane: Lane, key: ObjectKey) -> bool:
        """Whether an object has failed so often in a row that trying again is not worth it."""
        return self._failing.get((lane, key), 0) >= _TRIES

    def has_failed(self, lane: Lane, key: ObjectKey) -> bool | None:
        """Whether an object failed when last tried; None: too often to be tried again."""
        failures = self._failing.get((lane, key), 0)
        return None if failures >= _TRIES else failures > 0

    def drops(self, key: ObjectKey) -> None:
        """A write was given up because host memory itself was needed."""
        self.dropped += 1
        self._failing.pop((Lane.WRITES, key), None)

    def sets_aside(self, key: ObjectKey) -> None:
        """An object is not offered any more until it is rewritten."""
        self.set_aside += 1
        self._failing.pop((Lane.READS, key), None)

    def complains(self, cause: Cause, detail: str, lane: Lane = Lane.READS) -> None:
        """Something failed that no request waits for: reported, but the tier is asked on."""
        self.misses[cause] += 1
        self._troubled(lane, detail or cause)

    def transferred(self, direction: str, outcome: Outcome, call: TierCall[Outcome]) -> None:
        """An object moved between this tier and the host, or failed to.

        A cancelled transfer says nothing about the tier: whoever waited in vain has counted it.
        """
        if call.was_cancelled:
            pass
        elif outcome.cause is None:
            if not call.was_late:
                self.works(call.lane, outcome.key)
            if direction == "load":
                self.hits += 1
                self.loaded_nbytes += outcome.nbytes
            else:
                self.stored += 1
                self.stored_nbytes += outcome.nbytes
        elif isinstance(call.error, Refused):
            self.refused(outcome.cause)
        elif outcome.cause is Cause.TIER_DOWN or outcome.cause is Cause.DEADLINE:
            self.fails(outcome.cause, outcome.detail, call.lane, outcome.key)
        else:
            self.misses[outcome.cause] += 1
        if self.emit:
            self.emit(
                TransferDone(
                    tier=self.name,
                    direction=direction,
                    key=outcome.key,
                    nbytes=outcome.nbytes,
                    seconds=outcome.seconds,
                    cause=outcome.cause,
                    detail=outcome.detail,
                )
            )

    def asks(self, keys: int) -> None:
        """A call was admitted that asks whether ``keys`` objects are there."""
        self.questions += 1
        self.asked_keys += keys

    def answered(self, sizes: Sequence[SizeResult], *, is_late: bool) -> None:
        """It has said of each object asked about whether it is there. An error is not an absence.

        ``is_late``: after the deadline, which says nothing good of it.
        """
        errors = [size for size in sizes if isinstance(size, BackendError)]
        if errors and len(errors) == len(sizes):
            self.fails(Cause.TIER_DOWN, words(errors[0]))
            return
        if not is_late:
            self.works()
        if errors:
            detail = f"{len(errors)} of {len(sizes)} keys: {words(errors[0])}"
            self.complains(Cause.TIER_DOWN, detail)

    def begins(self, direction: str, key: ObjectKey, nbytes: int) -> None:
        """A call was admitted that moves one object."""
        if self.emit:
            started = TransferStarted(tier=self.name, direction=direction, key=key, nbytes=nbytes)
            self.emit(started)

    def _opened(self, lane: Lane, detail: str) -> None:
        self._troubled(lane, detail)
        if self.on_opened is not None:
            self.on_opened()

    def _serves_again(self) -> None:
        self._cleared(Lane.READS, "it answers again")

    def _troubled(self, lane: Lane, detail: str) -> None:
        if not self._troubles and self.emit:
            self.emit(TierChanged(tier=self.name, ok=False, detail=detail))
        self._troubles[lane] = detail

    def _cleared(self, lane: Lane, detail: str) -> None:
        if self._troubles.pop(lane, None) and not self._troubles and self.emit:
            self.emit(TierChanged(tier=self.name, ok=True, detail=detail))

    def must_ask(self, namespace: str) -> bool:
        """Whether it may hold more of a namespace than the directory knows."""
        return self.is_shared or not (self.was_empty or namespace in self.listed)
