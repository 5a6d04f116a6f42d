"""What a lookup finds: the longest prefix that loads faster than it is computed. Reads only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from kvlayer._foreign import words
from kvlayer.abc.backend import SizeResult
from kvlayer.errors import BackendError
from kvlayer.keys import ChunkChain, ObjectKey
from kvlayer.results import Cause
from kvlayer.tier import plan
from kvlayer.tier.directory import Host
from kvlayer.tier.estimate import Rate
from kvlayer.tier.guard import Call, Refused
from kvlayer.tier.loads import Loads, Wanted, down, wanted_of
from kvlayer.tier.matcher import Match
from kvlayer.tier.objects import Objects
from kvlayer.tier.planner import Planner
from kvlayer.tier.tier import LowerTier

__all__ = ["Finder"]


class Finder:
    """Asks the tiers what the directory does not know, and says what of it is worth loading."""

    def __init__(
        self,
        planner: Planner,
        objects: Objects,
        loads: Loads,
        lower: Sequence[LowerTier],
        *,
        prefill: Rate,
        clock: Callable[[], float],
    ) -> None:
        self._planner = planner
        self._objects = objects
        self._loads = loads
        self._lower = tuple(lower)
        self._prefill = prefill
        self._clock = clock

    async def find(self, chain: ChunkChain, *, at_any_price: bool = False) -> Match:
        """The longest prefix worth loading. Asks lower tiers what the directory does not know.

        Tiers are asked side by side, so a lookup pays one deadline at most, the longest.
        ``at_any_price``: nobody waits for the loading, so that it is worth any time.
        """
        asked = [tier for tier in self._lower if tier.must_ask or self._planner.has_forgotten]
        if asked and self._planner.match(chain).tokens == chain.named_tokens:
            asked = []  # there is no more of it
        until = self._clock() + max((tier.guard.deadline for tier in asked), default=0.0)
        for probes in (self._planner.probes, self._planner.tail_probes):
            if asked and (keys := probes(chain)):
                asked = await self._ask(asked, keys, until)
        rate = None if at_any_price else self._prefill.tokens_per_second
        return self._worth_loading(self._planner.match(chain), rate)

    def find_at_once(self, chain: ChunkChain) -> Match | None:
        """What :meth:`find` would answer, or None when a tier must be asked first.

        In any thread, with the planner's lock held until the match is leased.
        """
        match = self._planner.match(chain)
        has_forgotten = self._planner.has_forgotten
        must_ask = any(
            (tier.must_ask or has_forgotten) and tier.guard.serves for tier in self._lower
        )
        if must_ask and not self._planner.is_final(match):
            return None
        return self._worth_loading(match, self._prefill.tokens_per_second)

    def known(self, chain: ChunkChain) -> Match:
        """What of it is known, whatever tiers could add. Locked like :meth:`find_at_once`."""
        return self._worth_loading(self._planner.match(chain), self._prefill.tokens_per_second)

    async def _ask(
        self, tiers: Sequence[LowerTier], keys: Sequence[ObjectKey], until: float
    ) -> list[LowerTier]:
        """Note what tiers hold of ``keys``; those that answered."""
        calls: list[tuple[LowerTier, Call[list[SizeResult]]]] = []
        answered: list[LowerTier] = []
        try:
            for tier in tiers:
                try:
                    ask = partial(self._objects.contains, tier.index, keys)
                    calls.append((tier, tier.guard.start(ask)))
                except Refused as no:
                    tier.refused(no.cause)
            patience = until - self._clock()
            ended = await asyncio.gather(*(t.guard.wait(call, patience) for t, call in calls))
            for (tier, call), in_time in zip(calls, ended, strict=True):
                if not in_time:
                    if call.was_late:
                        tier.fails(Cause.DEADLINE, f"no answer within {tier.guard.deadline} s")
                    else:
                        tier.refused(Cause.DEADLINE)  # the first question took most of the time
                elif isinstance(call.error, Refused):
                    tier.refused(call.error.cause)
                elif call.error is not None:
                    tier.fails(Cause.TIER_DOWN, words(call.error))
                elif self._note(tier, keys, call.result()):
                    answered.append(tier)
        finally:
            for _, call in calls:
                call.cancel()
        return answered

    def _note(
        self, tier: LowerTier, keys: Sequence[ObjectKey], sizes: Sequence[SizeResult]
    ) -> bool:
        """Note what a tier holds; whether it answered for any key. An error is not an absence."""
        errors = [size for size in sizes if isinstance(size, BackendError)]
        if errors and len(errors) == len(keys):
            tier.fails(Cause.TIER_DOWN, words(errors[0]))
            return False
        tier.works()
        there = [key for key, size in zip(keys, sizes, strict=True) if isinstance(size, int)]
        self._planner.note(there, tier.index)
        if errors:
            tier.complains(
                Cause.TIER_DOWN, f"{len(errors)} of {len(keys)} keys: {words(errors[0])}"
            )
        return True

    def _worth_loading(self, match: Match, rate: float | None) -> Match:
        """``match`` cut where a tier is not asked for now, or where recomputing is faster."""
        dead = down(self._lower)
        if not dead and rate is None:
            return match
        best, most = self._planner.shortened(match, 0), 0.0
        while match.spans:
            needs = self._needs(match, dead)
            stops = [span.stop for span in match.spans[: len(needs)]]
            saved = plan.savings(stops, needs, self._takes if rate else _no_time, rate or 1.0)
            # A shorter hit may need other windows and save less than the longer one did.
            if len(needs) == len(match.spans) and saved[-1] > most:
                best, most = match, saved[-1]
            count = plan.worthwhile(saved)
            if count == len(match.spans):
                break
            match = self._planner.shortened(match, count)
        return best

    def _needs(self, match: Match, dead: int) -> list[dict[int, int]]:
        """Bytes each span needs from each lower tier, up to the first that no tier can give."""
        needs: list[dict[int, int]] = []
        for span, records in wanted_of(match):
            need: dict[int, int] = {}
            for record in records:
                if record.host is Host.READY:
                    continue
                live = record.tiers & ~dead
                if not live or self._loads.stuck(record):
                    return needs
                tier = (live & -live).bit_length() - 1
                nbytes = self._planner.payload(record.part, span.tokens).nbytes
                need[tier] = need.get(tier, 0) + nbytes
            needs.append(need)
        return needs

    def _takes(self, tier: int, nbytes: int) -> float:
        return self._lower[tier - 1].estimate.seconds(nbytes, self._clock())

    def budget(self, wanted: Wanted, deadline: float | None) -> float | None:
        """When a load has cost as much as computing it anew, so that it never costs twice that.

        Without the first span that is not in host memory all behind it is of no use.
        """
        ends = [] if deadline is None else [self._clock() + deadline]
        rate = self._prefill.tokens_per_second
        if rate is not None:
            absent = (s for s, found in wanted if any(r.host is not Host.READY for r in found))
            first = next(absent, None)
            tokens = 0 if first is None else wanted[-1][0].stop - first.start
            ends.append(self._clock() + tokens / rate)
        return min(ends, default=None)


def _no_time(_tier: int, _nbytes: int) -> float:
    """What loading takes where nobody knows what computing takes."""
    return 0.0
