"""What lower tiers are believed to hold: what they said, and what came of it. Pure.

The caller brings the time, and holds the planner's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, repeat

from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause
from kvlayer.tier.planner.absences import Absences
from kvlayer.tier.planner.directory import Directory
from kvlayer.tier.planner.journal import Journal, Loss
from kvlayer.tier.planner.matcher import Matcher
from kvlayer.tier.planner.recent import Recent
from kvlayer.tier.planner.records import ObjectRecord

__all__ = ["Holdings"]

_MAX_ASIDE = 4096  # objects set aside that are remembered
_MAX_SERVED = 64  # namespaces
_MAX_WITHDRAWN = 65_536  # objects that went while their tier is listed


class Holdings:
    """Keeps a directory in step with lower tiers. ``tiers`` are names, that of the host first."""

    def __init__(
        self, directory: Directory, matcher: Matcher, journal: Journal, tiers: Sequence[str]
    ) -> None:
        self._directory = directory
        self._matcher = matcher
        self._journal = journal
        self._tiers = tiers
        self._absences = Absences()
        self.served: Recent[str, None] = Recent(_MAX_SERVED)
        """Namespaces that requests have used, lately. What is heard of others is passed over:
        a tier may hold those of other models, too."""
        self._withdrawn: dict[tuple[int, str], Recent[ObjectKey, None]] = {}
        """By tier and namespace that are being listed, what has gone from it meanwhile. What is
        forgotten may be noted although it has gone: a read then finds it missing."""
        self._aside: Recent[tuple[int, ObjectKey], None] = Recent(_MAX_ASIDE)
        """What a tier may hold but could not deliver."""

    def note(self, keys: Iterable[ObjectKey], tier: int, copies: Iterable[int]) -> None:
        """See ``Planner.note``."""
        for key, copy in zip(keys, chain(copies, repeat(0)), strict=False):
            if (namespace := key.namespace) not in self.served:
                continue
            if key in self._withdrawn.get((tier, namespace), ()) or (tier, key) in self._aside:
                continue
            if self._matcher.can_exist(key):
                self._absences.withdraw(tier, key)
                self._directory.note(key, tier, copy)

    def absent(self, keys: Iterable[ObjectKey], tier: int, now: float) -> None:
        """See ``Planner.absent``."""
        self._absences.believe(tier, keys, now)
        for key in keys:
            self._directory.deny(key, tier)

    def open_questions(self, tier: int, keys: Iterable[ObjectKey], now: float) -> list[ObjectKey]:
        """Those of ``keys`` that a tier has not just said to be absent."""
        return self._absences.open(tier, keys, now)

    def listing(self, tier: int, namespace: str, *, started: bool) -> None:
        """See ``Planner.listing``."""
        if started:
            self._withdrawn[tier, namespace] = Recent(_MAX_WITHDRAWN)
        else:
            self._withdrawn.pop((tier, namespace), None)

    def written(self, record: ObjectRecord, tier: int, copy: int) -> None:
        """A tier has got an object."""
        self._directory.add_tier(record, tier, copy)
        self._absences.withdraw(tier, record.key)
        self._aside.pop((tier, record.key))

    def missing(
        self,
        record: ObjectRecord,
        tier: int,
        cause: Cause,
        detail: str,
        *,
        aside: bool,
        wall: float,
    ) -> None:
        """See ``Planner.missing``."""
        if aside:
            self._aside[tier, record.key] = None
        self._withdraw(record.key, tier)
        was_seen = bool(record.tiers)
        self._directory.drop_tier(record, tier)
        if was_seen and not record.is_ready:
            self.lost(record.key, cause, tier, detail, wall)

    def vanished(
        self, keys: Iterable[ObjectKey], tier: int, cause: Cause, detail: str, wall: float
    ) -> None:
        """See ``Planner.vanished``."""
        for key in keys:
            if key.namespace not in self.served:
                continue
            self._withdraw(key, tier)
            record = self._directory.find(key)
            if record is not None and record.tiers >> tier & 1:
                self._directory.drop_tier(record, tier)
            if record is None or not record.is_ready:
                self.lost(key, cause, tier, detail, wall)

    def lost(self, key: ObjectKey, cause: Cause, tier: int, detail: str, wall: float) -> None:
        """Remember why an object is gone."""
        loss = Loss(cause, self._tiers[tier], wall, detail)
        self._journal.lost(key.namespace, key.end_hash, key.tokens, loss)

    def _withdraw(self, key: ObjectKey, tier: int) -> None:
        withdrawn = self._withdrawn.get((tier, key.namespace)) if self._withdrawn else None
        if withdrawn is not None:
            withdrawn[key] = None
