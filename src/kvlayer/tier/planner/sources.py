"""Which tier served how much of a request: taken before the load, asked after it."""

from __future__ import annotations

from collections.abc import Sequence

from kvlayer.tier.planner.match import Match

__all__ = ["Sources"]


class Sources:
    """Where each object of a match lay when this was built: the nearest tier that had it.

    An object that its nearest tier fails to deliver, so that the next one does, still counts for
    the nearest: what each tier moved is in ``TransferDone``.
    """

    def __init__(self, match: Match, tiers: Sequence[str]) -> None:
        self._tiers = tiers
        self._spans = [
            (span, [(found, max(found.tier, 0)) for cover in covers for found in cover])
            for span, covers in zip(match.spans, match.covers, strict=True)
        ]

    def tokens(self, start: int, stop: int) -> dict[str, int]:
        """Tokens of ``[start, stop)`` by the farthest tier that their span needed."""
        counts = dict.fromkeys(self._tiers, 0)
        for span, found in self._spans:
            shared = min(span.stop, stop) - max(span.start, start)
            if shared > 0:
                counts[self._tiers[max((tier for _, tier in found), default=0)]] += shared
        return counts

    def nbytes(self, start: int, stop: int) -> dict[str, int]:
        """Bytes of the objects that served tokens ``[start, stop)``, by tier."""
        counts = dict.fromkeys(self._tiers, 0)
        for span, found in self._spans:
            if span.start < stop and span.stop > start:
                for record, tier in found:
                    counts[self._tiers[tier]] += record.nbytes
        return counts
