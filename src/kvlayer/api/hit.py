"""What a lookup found, held for its user: the value that ``Cache.lookup`` yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvlayer.identity.keys import Span
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.matcher import Match

__all__ = ["PrefixHit"]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest usable prefix of a prompt.

    ``tokens`` counts from the prompt's start, tail included; ``spans`` are its chunks and tail;
    ``by_tier`` says how many tokens lie where (the nearest tier counts). Host memory it found is
    pinned until the ``async with`` block ends or the lease's deadline passes.
    """

    tokens: int
    spans: tuple[Span, ...]
    by_tier: Mapping[str, int]
    owner: str = ""
    match: Match | None = field(default=None, repr=False, compare=False)
    """The planner's own view; for the cache."""
    lease: Lease | None = field(default=None, repr=False, compare=False)
    """The pin; for the cache."""
