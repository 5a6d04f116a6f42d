"""What one store has to do, and what is left of it when some of it fails. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from kvlayer.identity.keys import ChunkChain, Span
from kvlayer.results import Cause, Failure
from kvlayer.tier.messages import Outcome, Piece
from kvlayer.tier.planner.promises import Promise
from kvlayer.tier.planner.records import ObjectRecord

__all__ = ["Holds", "Keeps", "Reservation", "StorePlan"]

Holds: TypeAlias = Callable[[int, Span], bool]
"""``holds(g, span)``: whether the engine still has what group g needs of the span, where
it needs only some spans."""

Keeps: TypeAlias = Callable[[ObjectRecord], bool]
"""Whether an object must not make room, because a tier is still to get it."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot being filled: the record, its piece, and the span it belongs to."""

    span: Span
    record: ObjectRecord
    piece: Piece


@dataclass(slots=True)
class StorePlan:
    """What one store has to do, in prompt order, as far as it is planned."""

    chain: ChunkChain
    holds: Holds
    keeps: Keeps | None = None
    dead: int = 0
    """Bit t: tier t is not asked for now. What only such tiers have is stored anew."""
    promise: Promise | None = None
    """Says to others what it is about to store."""
    unplanned: deque[Span] = field(default_factory=deque[Span])
    held: list[ObjectRecord] = field(default_factory=list[ObjectRecord])
    """What host memory has of the prompt: it stays while slots are reserved."""
    gathers: list[Reservation] = field(default_factory=list[Reservation])
    first: Span | None = None
    """The first span that something was reserved for."""
    spans: list[Span] = field(default_factory=list[Span])
    skipped: list[tuple[Span, tuple[ObjectRecord, ...]]] = field(default_factory=list)
    joined: list[tuple[Span, Promise]] = field(default_factory=list)
    """What others are storing right now: theirs may fail yet."""
    dropped: list[Span] = field(default_factory=list[Span])
    is_blocked: bool = False
    """Room for the first unplanned span would cost what is not written yet."""
    evicted: list[ObjectRecord] = field(default_factory=list[ObjectRecord])

    @property
    def is_planned(self) -> bool:
        """Whether nothing more is to be planned, for now or at all."""
        return not self.unplanned or self.is_blocked

    @property
    def planned(self) -> int:
        """How many spans are planned and not gathered yet."""
        return len(self.spans) + len(self.skipped)

    def part_done(self) -> None:
        """What was planned so far is gathered: go on with what is not planned yet."""
        self.gathers, self.spans, self.skipped, self.dropped = [], [], [], []

    def refuse(self, cause: Cause, tier: str, detail: str) -> list[Failure]:
        """Keep nothing of what was planned; a failure for each of its spans."""
        lost, self.gathers, self.spans = self.spans, [], []
        return [Failure(span, cause, tier, detail) for span in lost]

    def cut(self, missed: Sequence[Outcome] | None, tier: str) -> list[Failure]:
        """Keep what comes before the first span of which something was ``missed``.

        None: the gather raised, and nothing is kept. Returns a failure, in ``tier``, for each span
        that the outcomes cost: later chunks are useless alone.
        """
        failed = {outcome.key: outcome for outcome in missed or ()}
        first = next((slot for slot in self.gathers if slot.record.key in failed), None)
        if missed is None:
            self.gathers = []
        if missed is None or first is None:
            return []
        start, outcome = first.span.start, failed[first.record.key]
        lost = [span for span in self.spans if span.start >= start]
        self.gathers = [slot for slot in self.gathers if slot.span.start < start]
        self.spans = [span for span in self.spans if span.start < start]
        assert outcome.cause is not None
        return [Failure(span, outcome.cause, tier, outcome.detail) for span in lost]
