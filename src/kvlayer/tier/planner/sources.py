"""Which tier served how much of a request: taken before the load, asked after it."""

from __future__ import annotations

from collections.abc import Sequence

from kvlayer._steps import SLICE, Steps
from kvlayer.identity.keys import Span
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.records import ObjectRecord

__all__ = ["Sources"]


class Sources:
    """Where each object of a match lay when :meth:`taking` looked: the nearest tier that had it.

    An object that its nearest tier fails to deliver, so that the next one does, still counts for
    the nearest: what each tier moved is in ``TransferDone``.
    """

    def __init__(self, tiers: Sequence[str]) -> None:
        self._tiers = tiers
        self._spans: list[tuple[Span, list[tuple[ObjectRecord, int]]]] = []

    def taking(self, match: Match) -> Steps[None]:
        """Look where all of ``match`` lies."""
        for at, (span, records) in enumerate(match.needs):
            if at and not at % SLICE:
                yield
            self._spans.append((span, [(found, max(found.tier, 0)) for found in records]))

    def served(self, start: int, stop: int) -> Steps[tuple[dict[str, int], dict[str, int]]]:
        """Who served tokens ``[start, stop)``: tokens, and bytes of objects, by tier.

        Tokens are by the farthest tier that their span needed.
        """
        tokens, nbytes = dict.fromkeys(self._tiers, 0), dict.fromkeys(self._tiers, 0)
        for at, (span, found) in enumerate(self._spans):
            if at and not at % SLICE:
                yield
            shared = min(span.stop, stop) - max(span.start, start)
            if shared <= 0:
                continue
            tokens[self._tiers[max((tier for _, tier in found), default=0)]] += shared
            for record, tier in found:
                nbytes[self._tiers[tier]] += record.nbytes
        return tokens, nbytes
