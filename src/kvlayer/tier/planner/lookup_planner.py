"""The Planner's half for lookups: what is found, presumed and leased. In any thread. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from sys import intern

from kvlayer.identity.keys import ChunkChain, ObjectKey
from kvlayer.tier.planner.asking import Search
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match, Run
from kvlayer.tier.planner.promises import Promise
from kvlayer.tier.planner.tables import Tables

__all__ = ["LookupPlanner"]


class LookupPlanner(Tables):
    """Finds and leases prompts, and notes what tiers say of them."""

    def serve(self, namespace: str) -> None:
        """Requests use a namespace: what tiers say of its objects is noted from now on."""
        with self.lock:
            self._holdings.served[intern(namespace)] = None

    def match(self, chain: ChunkChain) -> Match:
        """The longest usable prefix by what the directory knows, tail included."""
        with self.lock:
            return self._matcher.match(chain, chain.num_tokens)

    def search(self, chain: ChunkChain, *, every: bool) -> Search:
        """What to ask the tiers about a prompt; ``every``: about every chunk of it."""
        self.serve(chain.namespace)
        return Search(self._matcher, self._groups, chain.accepting(), every=every)

    def search_accepted(
        self, chain: ChunkChain, number: int, runs: Sequence[Run], *, every: bool
    ) -> Search | None:
        """What to ask about the accepted quality ``number``; None where no more of it is wanted.

        ``runs``: what may be presumed by what was heard before. Exact chunks are not asked about.
        """
        with self.lock, self._presuming(chain, runs):
            if self._matcher.match(chain, chain.num_tokens).is_whole:
                return None
            start = self._matcher.exact_chunks(chain)
        namespace = chain.accepts[number].namespace
        self.serve(namespace)
        named = chain.named_in(namespace)
        return Search(self._matcher, self._groups, named, every=every, start=start)

    def questions(
        self, search: Search, tiers: int, now: float
    ) -> list[tuple[int, list[ObjectKey]]]:
        """The next round of a search: what to ask which of ``tiers`` (bits); empty: it is over.

        What a tier has just said to be absent is not asked about again.
        """
        while True:
            with self.lock:
                keys = search.next(tiers)
                if not keys:
                    return []
                asked = (
                    (tier, self._holdings.open_questions(tier, keys, now))
                    for tier in range(1, tiers.bit_length())
                    if tiers >> tier & 1
                )
                if questions := [(tier, left) for tier, left in asked if left]:
                    return questions

    def lease_match(
        self,
        chain: ChunkChain,
        runs: Sequence[Run],
        choose: Callable[[Match], Match | None],
        *,
        owner: str,
        seconds: float,
        is_holding: bool = False,
    ) -> tuple[Match, Lease] | None:
        """Match a prompt by what is known and presumed (``runs``), and lease what is chosen of it.

        In any thread. Nothing can go between being found and being leased. None if ``choose``
        chooses none.
        """
        with self.lock:
            with self._presuming(chain, runs):
                match = choose(self._matcher.match(chain, chain.num_tokens, runs))
                if match is None:
                    return None
                return match, self.lease(match, owner=owner, seconds=seconds, is_holding=is_holding)

    @contextmanager
    def _presuming(self, chain: ChunkChain, runs: Sequence[Run]) -> Generator[None]:
        """What ``runs`` presume is known inside, and afterwards as far as it was pinned."""
        presumed = [found for run in runs for found in self._matcher.presume(chain, run)]
        try:
            yield
        finally:
            for found in presumed:
                if not found.pins:
                    self.directory.forget(found)

    def promised(self, match: Match, now: float) -> tuple[Promise, bytes] | None:
        """Who is storing what comes right after a match, and the end hash of that; None: nobody."""
        chain = match.chain
        index, rest = divmod(match.tokens, chain.chunk_step)
        if rest or match.is_whole:
            return None
        next_ = chain.span(index) if index < len(chain) else chain.tails(index)[0]
        with self.lock:
            promise = self.promises.find(chain.namespace, next_.hash, now)
        return None if promise is None else (promise, next_.hash)

    def by_tier(self, match: Match) -> dict[str, int]:
        """Tokens of a match by the name of the farthest tier each span needs."""
        with self.lock:
            return dict(zip(self.tiers, match.by_tier(len(self.tiers)), strict=True))

    def note(self, keys: Iterable[ObjectKey], tier: int, copies: Iterable[int] = ()) -> None:
        """A lower tier said it holds these objects; what this model cannot have is passed over.

        ``copies``: for each, how it lies there (:mod:`kvlayer.tier.planner.copies`), or none.
        """
        with self.lock:
            self._holdings.note(keys, tier, copies)

    def absent(self, keys: Iterable[ObjectKey], tier: int, now: float) -> None:
        """A lower tier said that it holds none of these: believed for a second."""
        with self.lock:
            self._holdings.absent(keys, tier, now)

    def listing(self, tier: int, namespace: str, *, started: bool) -> None:
        """A tier is being listed: what is withdrawn meanwhile must not come back with the list."""
        with self.lock:
            self._holdings.listing(tier, namespace, started=started)

    def lease(self, match: Match, *, owner: str, seconds: float, is_holding: bool = False) -> Lease:
        """Pin a match. Also drops leases whose deadline has passed. See ``Lease.is_holding``."""
        with self.lock:
            now = self._clock()
            self.leases.expire(now)
            first, rest = match.held()
            return self.leases.grant(
                rest, first=first, owner=owner, deadline=now + seconds, is_holding=is_holding
            )

    def granted(self, lease: Lease) -> bool:
        """Whether a lease is, or was, one of this planner's."""
        return lease.table is self.leases

    def claim(self, match: Match, lease: Lease) -> Match:
        """``match`` while its lease holds all of it; after that whatever is still usable of it.

        In an epoch that is over nothing is, and the lease is given back.
        Pinned, whoever releases the lease meanwhile: the caller unpins its path.
        """
        with self.lock:
            self.leases.expire(self._clock())
            if match.chain.is_stale:
                self.leases.release(lease.number)
            elif self.leases.holds(lease.number) and lease.left is None:
                self.host.pin(match.path())
                return match
            with self._presuming(match.chain, match.runs):
                match = self._matcher.match(match.chain, match.tokens, match.runs)
                self.host.pin(match.path())
            return match

    def keep(self, lease: Lease, match: Match) -> None:
        """A lease holds its match, which was brought up, until it ends: ``Lease.is_holding``."""
        with self.lock:
            self.leases.keep(lease, match.path())

    def bounded(self, match: Match, stop: int) -> Match:
        """``match`` for a reader that takes at most ``stop`` tokens.

        Every-chunk groups can end inside a span. A trailing group needs another window for another
        end, and a state is there only where a span ends: with those the match is made anew.
        """
        if match.tokens <= stop or self._matcher.is_plain:
            return match
        with self.lock:
            return self._matcher.match(match.chain, stop, match.runs)

    def shortened(self, match: Match, count: int) -> Match:
        """The longest usable prefix within the first ``count`` spans of ``match``."""
        if self._matcher.is_plain or not count or not match.spans:
            return match.first(count)
        with self.lock:
            return self._matcher.match(match.chain, match.spans[:count][-1].stop, match.runs)

    def release(self, number: int) -> bool:
        """Give a lease back; False when it had expired."""
        with self.lock:
            return self.leases.release(number)
