"""What a lookup found, held for its user: the value that ``Cache.lookup`` yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvlayer.identity.keys import Span
from kvlayer.identity.quality import EXACT
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match

__all__ = ["PrefixHit"]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest usable prefix of a prompt.

    ``tokens`` counts from the prompt's start, tail included; ``spans`` are its chunks and tail;
    ``by_tier`` says how many tokens lie where (the nearest tier counts). Host memory it found is
    pinned until the ``async with`` block ends or the lease's deadline passes.

    It is exact (``quality`` says so), or its first ``exact_tokens`` are and the rest is of one
    quality that the request accepts. What is computed after it is of that quality, too: store it
    with ``Cache.store(quality=hit.quality)``, or not at all. A hit of a cache whose own namespace
    is of a quality is of that one, and nothing of it is exact.
    """

    tokens: int
    spans: tuple[Span, ...]
    by_tier: Mapping[str, int]
    owner: str = ""
    quality: str = EXACT
    exact_tokens: int = 0
    match: Match | None = field(default=None, repr=False, compare=False)
    """The planner's own view; for the cache."""
    lease: Lease | None = field(default=None, repr=False, compare=False)
    """The pin; for the cache."""
