"""What a lookup finds: the longest prefix that loads faster than it is computed. Reads only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from kvlayer._steps import SLICE, Steps
from kvlayer.identity.keys import ChunkChain, ObjectKey
from kvlayer.runtime.turns import in_turns, to_the_end
from kvlayer.tier.guard.estimate import Rate
from kvlayer.tier.planner import plan
from kvlayer.tier.planner.asking import Search
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match, Run
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.promises import Promise
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.tier import LowerTier
from kvlayer.tier.transfer.loads import Loads, Wanted, down
from kvlayer.tier.transfer.objects import Objects
from kvlayer.tier.transfer.promised import settled
from kvlayer.tier.transfer.questions import Questions

__all__ = ["Finder"]

_TRIES = 4
"""So many shorter hits are tried as they come. After that each is at most half of the last, or what
host memory has."""


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
        self._loads = loads
        self._lower = tuple(lower)
        self._prefill = prefill
        self._clock = clock
        self._questions = {tier.index: Questions(tier, planner, objects, clock) for tier in lower}

    async def find(self, chain: ChunkChain, *, at_any_price: bool = False) -> Match:
        """What :meth:`found` finds; nothing keeps it from going."""
        async with self.found(chain, at_any_price=at_any_price) as match:
            return match

    @asynccontextmanager
    async def found(
        self, chain: ChunkChain, *, at_any_price: bool = False
    ) -> AsyncGenerator[Match]:
        """The longest prefix worth loading of what was seen, held until the block ends.

        Tiers are asked about every chunk. Being held is no use of it. ``at_any_price``: nobody
        waits for the loading, so that it is worth any time.
        """
        await self._learn(chain, every=True)
        held: list[ObjectRecord] = []
        try:
            match = await in_turns(self._planner.holding(chain, chain.num_tokens, (), held))
            match = await in_turns(self._seen(match))
            yield await in_turns(self._worth_loading(match, self._rate(at_any_price)))
        finally:
            await to_the_end(self._planner.letting_go(held))

    async def lease(
        self,
        chain: ChunkChain,
        *,
        owner: str,
        seconds: float,
        presume: bool = True,
        patience: float = 0.0,
        at_any_price: bool = False,
        is_holding: bool = False,
    ) -> tuple[Match, Lease]:
        """The longest prefix worth loading, leased. Asks tiers what the directory does not know.

        ``presume``: not about every chunk, see :mod:`kvlayer.tier.planner.asking`. Tiers are asked
        side by side, so a lookup pays one deadline at most, the longest. Where another request is
        storing what comes next, that is waited for, ``patience`` seconds in all; nothing is leased
        meanwhile.
        """
        runs = await self._learn(chain, every=not presume)
        rate = self._rate(at_any_price)
        loop = asyncio.get_running_loop()
        until = loop.time() + patience
        promised: tuple[Promise, bytes] | None = None

        def choose(match: Match) -> Steps[Match | None]:
            nonlocal promised
            if loop.time() < until:
                promised = self._planner.promised(match, self._clock())
                if promised is not None:
                    return None
            if not presume:
                match = yield from self._seen(match)
            return (yield from self._worth_loading(match, rate))

        while True:
            leased = await in_turns(
                self._planner.leasing(
                    chain, runs, choose, owner=owner, seconds=seconds, is_holding=is_holding
                )
            )
            if leased is not None:
                return leased
            assert promised is not None
            await settled(*promised, until - loop.time())

    def lease_at_once(
        self, chain: ChunkChain, *, owner: str, seconds: float
    ) -> tuple[Match, Lease] | None:
        """What :meth:`lease` would answer, or None when a tier must be asked first.

        In any thread.
        """
        rate = self._rate()

        def is_open(search: Search | None) -> Steps[bool]:
            if search is None:
                return False
            tiers = _bits(t for t in self._asked(search.chain) if t.guard.serves)
            if not tiers:
                return False
            return bool((yield from self._planner.questions(search, tiers, self._clock())))

        def choose(match: Match) -> Steps[Match | None]:
            if not match.is_whole and self._asked(chain):
                exact = match
                if chain.accepts:
                    exact = yield from self._planner.matching(chain.accepting())
                if (yield from is_open(self._planner.search(exact, every=False))):
                    return None
            for number in range(len(chain.accepts)):
                more = yield from self._planner.searching_accepted(chain, number, (), every=False)
                if (yield from is_open(more)):
                    return None
            return (yield from self._worth_loading(match, rate))

        return self._planner.lease_match(chain, (), choose, owner=owner, seconds=seconds)

    def lease_known(
        self, chain: ChunkChain, runs: Sequence[Run] = (), *, owner: str, seconds: float
    ) -> tuple[Match, Lease]:
        """What is known of a prompt, or presumed (``runs``), leased. In any thread."""
        rate = self._rate()
        leased = self._planner.lease_match(
            chain, runs, partial(self._worth_loading, rate=rate), owner=owner, seconds=seconds
        )
        assert leased is not None
        return leased

    async def _learn(self, chain: ChunkChain, *, every: bool) -> Sequence[Run]:
        """Ask lower tiers about a prompt, round by round; what may be presumed of it.

        In the exact namespace first, then about what follows in each that is accepted.
        """
        namespaces = [chain.namespace, *(each.namespace for each in chain.accepts)]
        asked = [tier for namespace in namespaces for tier in self._asked(chain, namespace)]
        if not asked:
            return ()
        until = self._clock() + max(tier.guard.deadline for tier in asked)
        match = await in_turns(self._planner.matching(chain.accepting()))
        search = self._planner.search(match, every=every)
        runs = [*await self._learn_by(search, until)]
        for number in range(len(chain.accepts)):
            more = await in_turns(
                self._planner.searching_accepted(chain, number, runs, every=every)
            )
            if more is not None:
                runs += await self._learn_by(more, until)
        return runs

    def _asked(self, chain: ChunkChain, namespace: str = "") -> list[LowerTier]:
        """The tiers that may hold more than is known: of the chain's own namespace, or of another
        that serves the request."""
        if chain.scope.memory_only:
            return []
        named, has_forgotten = namespace or chain.namespace, self._planner.has_forgotten
        return [tier for tier in self._lower if has_forgotten or tier.must_ask(named)]

    def _dead(self, chain: ChunkChain) -> int:
        """Bit t: the request gets nothing from tier t now."""
        return _bits(self._lower) if chain.scope.memory_only else down(self._lower)

    async def _learn_by(self, search: Search, until: float) -> Sequence[Run]:
        asked = {tier.index: tier for tier in self._asked(search.chain)}
        while asked:
            round_ = await in_turns(
                self._planner.questions(search, _bits(asked.values()), self._clock())
            )
            if not round_:
                break
            for tier in await self._ask([(asked[index], keys) for index, keys in round_], until):
                del asked[tier.index]
        return search.runs

    async def _ask(
        self, asked: Sequence[tuple[LowerTier, Sequence[ObjectKey]]], until: float
    ) -> list[LowerTier]:
        """Ask tiers side by side, and note what they hold; those that did not answer."""
        questions = [
            (tier, question)
            for tier, keys in asked
            for question in self._questions[tier.index].ask(keys)
        ]
        try:
            patience = until - self._clock()
            waits = (self._questions[tier.index].wait(q, patience) for tier, q in questions)
            answered = await asyncio.gather(*waits)
        finally:
            for tier, question in questions:
                self._questions[tier.index].leave(question)
        heard = {tier.index for (tier, _), ok in zip(questions, answered, strict=True) if ok}
        return [tier for tier, _ in asked if tier.index not in heard]

    def _seen(self, match: Match) -> Steps[Match]:
        """What of it somebody has seen; another request may presume more of it."""
        if match.is_resident:
            return match
        for count, (_, records) in enumerate(match.needs):
            if not all(record.is_ready for record in records):
                return (yield from self._planner.shortened(match, count))
            if count and not count % SLICE:
                yield
        return match

    def _rate(self, at_any_price: bool = False) -> float | None:
        return None if at_any_price else self._prefill.tokens_per_second

    def _worth_loading(self, match: Match, rate: float | None) -> Steps[Match]:
        """``match`` cut where a tier is not asked for now, or where recomputing is faster."""
        dead = self._dead(match.chain)
        if (not dead and rate is None) or match.is_resident:
            return match
        best, most, tried = match.first(0), 0.0, 0
        while match.spans:
            needs = yield from self._needs(match, dead)
            stops = [span.stop for span in match.spans[: len(needs)]]
            takes = self._takes if rate else _no_time
            saved = yield from plan.savings(stops, needs, takes, rate or 1.0)
            # A shorter hit may need other windows and states and save less than the longer one did.
            if len(needs) == len(match.spans) and saved[-1] > most:
                best, most = match, saved[-1]
            # It never saves more: it needs all that the longer one needs of the same spans.
            if max(saved, default=0.0) <= most:
                break
            tried += 1
            count = plan.worthwhile(saved)
            if tried > _TRIES:  # each costs a walk along the prompt
                resident = next((i for i, need in enumerate(needs) if need), len(needs))
                count = min(count, max(resident, len(match.spans) // 2))
            match = yield from self._planner.shortened(match, count)
        return best

    def _needs(self, match: Match, dead: int) -> Steps[list[dict[int, int]]]:
        """Bytes each span needs from each lower tier, up to the first that no tier can give."""
        needs: list[dict[int, int]] = []
        for at, (span, records) in enumerate(match.needs):
            if at and not at % SLICE:
                yield
            need: dict[int, int] = {}
            for record in records:
                if record.host is HostState.READY:
                    continue
                live = record.readable & ~dead
                if not live or self._loads.stuck(record):
                    return needs
                tier = (live & -live).bit_length() - 1
                nbytes = self._planner.payload(record.part, span.tokens).nbytes
                need[tier] = need.get(tier, 0) + nbytes
            needs.append(need)
        return needs

    def _takes(self, tier: int, nbytes: int) -> float:
        return self._lower[tier - 1].estimate.seconds(nbytes, self._clock())

    def budget(self, wanted: Wanted, deadline: float | None) -> Steps[float | None]:
        """When a load has cost as much as computing it anew, so that it never costs twice that.

        Without the first span that is not in host memory all behind it is of no use.
        """
        ends = [] if deadline is None else [self._clock() + deadline]
        rate = self._prefill.tokens_per_second
        if rate is not None:
            tokens = 0
            for at, (span, found) in enumerate(wanted):
                if at and not at % SLICE:
                    yield
                if any(record.host is not HostState.READY for record in found):
                    tokens = wanted[-1][0].stop - span.start
                    break
            ends.append(self._clock() + tokens / rate)
        return min(ends, default=None)


def _no_time(_tier: int, _nbytes: int) -> float:
    """What loading takes where nobody knows what computing takes."""
    return 0.0


def _bits(tiers: Iterable[LowerTier]) -> int:
    return sum(1 << tier.index for tier in tiers)
