"""What leaves host memory when it gets full, decided. Pure: no loop, no clock, no I/O.

The caller holds the directory's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from kvlayer.tier.planner.host import HostTier
from kvlayer.tier.planner.records import ObjectRecord

__all__ = ["DemotionStep", "DemotionTargets", "PendingWrite", "end_leaving", "plan_leaving"]

_WALK = 256  # victims looked at in one go: the directory's lock is held meanwhile

PendingWrite: TypeAlias = tuple[ObjectRecord, int]
"""An object and the tiers it has to be written to first (bit t: tier t)."""


@dataclass(frozen=True, slots=True)
class DemotionTargets:
    """Which lower tiers take what leaves host memory. Bit t stands for tier t."""

    demote: int = 0
    """Written only now."""
    others: int = 0
    """Written when an object is stored; asked again where that failed."""
    whole_only: int = 0
    """Those of them that take no tails."""
    tokens_per_chunk: int = 1

    def wanted(self, found: ObjectRecord) -> int:
        """Tiers that have to get an object before it may go.

        Every tier that is written only now; where no tier has the object, also those that should
        have got it when it was stored.
        """
        span = found.chunk.span
        if span is None:
            return 0
        takers = -1 if span.tokens >= self.tokens_per_chunk else ~self.whole_only
        missing = self.demote & takers & ~found.tiers
        return missing or (0 if found.tiers else self.others & takers)


@dataclass(slots=True)
class DemotionStep:
    """One step of making room."""

    dropped: list[ObjectRecord] = field(default_factory=list[ObjectRecord])
    """Gone; a lower tier serves them."""
    writes: list[PendingWrite] = field(default_factory=list[PendingWrite])
    """Held until they are written or could not be: give them to :func:`end_leaving`."""


def plan_leaving(
    host: HostTier, keep_nbytes: int, outlets: DemotionTargets, at_once: int, now: float
) -> DemotionStep:
    """Look at the policy's next victims, as many as hold what is used beyond ``keep_nbytes``.

    What lower tiers have is dropped, what they lack is held and to be written, at most ``at_once``
    objects. What no tier takes stays: a store that needs the room gives it up first, and loses
    nothing that a tier would have taken. It counts as if it were gone, or everything used more
    lately would have to go in its place. So does what other moves still hold.

    ``now``: Unix seconds.
    """
    step = DemotionStep()
    kept: list[ObjectRecord] = []
    for _ in range(_WALK):
        if host.extents.used - host.aside_nbytes <= keep_nbytes or len(step.writes) >= at_once:
            break
        victim = host.victim(now)
        if victim is None:
            break
        wanted = outlets.wanted(victim)
        if victim.tiers and not wanted:
            host.drop(victim, evicted=True)
            step.dropped.append(victim)
            continue
        host.take(victim)
        if wanted:
            step.writes.append((victim, wanted))
        else:
            kept.append(victim)
    host.let_go(kept)
    return step


def end_leaving(host: HostTier, ways: Sequence[PendingWrite]) -> list[ObjectRecord]:
    """Writes of ``ways`` ended or were given up: drop what a lower tier has; returns that.

    What a request has used since stays, and so does what another move still holds.
    """
    gone: list[ObjectRecord] = []
    for record, _ in ways:
        may_go = record.tiers and record.pins == 1 and host.is_leaving(record)
        host.let_go((record,))
        if may_go:
            host.drop(record, evicted=True)
            gone.append(record)
    return gone
