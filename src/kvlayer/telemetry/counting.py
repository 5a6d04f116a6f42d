"""Events as figures: to which families each of them adds, whoever keeps the sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from kvlayer.events import (
    CacheRebound,
    Event,
    LookupDone,
    ObjectQuarantined,
    ObjectsEvicted,
    ObjectsRemoved,
    ObjectsStored,
    PrefetchDone,
    RequestStarted,
    RetrieveDone,
    StoreDone,
    TierChanged,
    TransferDone,
    TransferStarted,
)
from kvlayer.results import Failure
from kvlayer.telemetry import families
from kvlayer.telemetry.families import Family

__all__ = ["EventCounter"]


class EventCounter(ABC):
    """A sink that breaks events down into amounts of ``families``; a subclass keeps them.

    ``labels`` are the values of ``family.labels``, in their order.
    """

    @abstractmethod
    def add(self, family: Family, amount: float, *labels: str) -> None:
        """A counter of ``families.COUNTERS`` grows by ``amount``."""

    @abstractmethod
    def observe(self, family: Family, seconds: float, *labels: str) -> None:
        """Something of ``families.HISTOGRAMS`` took ``seconds``."""

    def own(self, owner: str, family: Family, amount: float) -> None:
        """A counter of ``families.OWNER_COUNTERS`` grows. Nobody's business by default."""

    def __call__(self, event: Event) -> None:
        match event:
            case LookupDone():
                self._lookup(event)
            case StoreDone():
                self._store(event)
            case RetrieveDone():
                self._retrieve(event)
            case PrefetchDone():
                self.observe(families.PREFETCH_SECONDS, event.seconds)
                self.add(families.PREFETCH_TOKENS, event.tokens)
                self._failures("prefetch", event.failed)
            case TransferDone():
                self._transfer(event)
            case ObjectsEvicted(tier=tier, policy=policy):
                self.add(families.EVICTED_OBJECTS, len(event.keys), tier, policy)
                self.add(families.EVICTED_BYTES, event.nbytes, tier, policy)
            case ObjectQuarantined():
                self.add(families.QUARANTINED, 1, event.tier, event.cause)
            case ObjectsStored() | ObjectsRemoved() | CacheRebound():
                pass  # the first is counted with its store, the second is somebody's wish
            case RequestStarted() | TransferStarted():
                pass  # counted when they are done; stats have the oldest that is not
            case TierChanged():
                self.add(families.TIER_CHANGES, 1, event.tier, "up" if event.ok else "down")

    # -- one operation each ----------------------------------------------------------------------

    def _lookup(self, event: LookupDone) -> None:
        found = event.hit_tokens
        outcome = "full" if found == event.asked_tokens else "partial" if found else "none"
        self.add(families.LOOKUPS, 1, outcome)
        self.observe(families.LOOKUP_SECONDS, event.seconds)
        self.add(families.LOOKUP_ASKED, event.asked_tokens)
        self._by_tier(families.LOOKUP_HIT, event.by_tier)
        self.own(event.owner, families.OWNER_ASKED, event.asked_tokens)
        self.own(event.owner, families.OWNER_HIT, found)

    def _store(self, event: StoreDone) -> None:
        self.observe(families.STORE_SECONDS, event.seconds)
        for outcome, count in (
            ("stored", event.stored),
            ("skipped", event.skipped),
            ("dropped", event.dropped),
            ("failed", len(event.failed)),
        ):
            self.add(families.STORE_SPANS, count, outcome)
        self.add(families.STORE_BYTES, event.nbytes)
        self._failures("store", event.failed)
        self.own(event.owner, families.OWNER_STORED, event.nbytes)

    def _retrieve(self, event: RetrieveDone) -> None:
        self.observe(families.RETRIEVE_SECONDS, event.seconds)
        self._by_tier(families.RETRIEVE_TOKENS, event.by_tier)
        self._by_tier(families.RETRIEVE_BYTES, event.nbytes_by_tier)
        self._failures("retrieve", event.failed)
        self.own(event.owner, families.OWNER_LOADED, event.nbytes)

    def _transfer(self, event: TransferDone) -> None:
        if event.cause is not None:
            self.add(families.TRANSFER_FAILURES, 1, event.tier, event.direction, event.cause)
            return
        self.add(families.TRANSFERS, 1, event.tier, event.direction)
        self.add(families.TRANSFER_BYTES, event.nbytes, event.tier, event.direction)
        self.observe(families.TRANSFER_SECONDS, event.seconds, event.tier, event.direction)

    def _failures(self, operation: str, failed: Iterable[Failure]) -> None:
        for failure in failed:
            self.add(families.FAILURES, 1, operation, failure.tier, failure.cause)

    def _by_tier(self, family: Family, amounts: Mapping[str, int]) -> None:
        for tier, amount in amounts.items():
            self.add(family, amount, tier)
