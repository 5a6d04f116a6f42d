"""The Planner's half for lookups: what is found, presumed and leased. In any thread. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from sys import intern
from typing import TypeAlias

from kvlayer._steps import FEW, SLICE, Steps, finish, in_slices
from kvlayer.identity.keys import ChunkChain, ObjectKey
from kvlayer.tier.planner.asking import Search
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match, Run
from kvlayer.tier.planner.promises import Promise
from kvlayer.tier.planner.records import ObjectRecord
from kvlayer.tier.planner.strand import Held, Strand, flat
from kvlayer.tier.planner.tables import Tables
from kvlayer.tier.planner.walk import Walk

__all__ = ["LookupPlanner"]

Choose: TypeAlias = Callable[[Match], Steps[Match | None]]
"""What of a match is wanted, found in steps; None: nothing now."""


class LookupPlanner(Tables):
    """Finds and leases prompts, and notes what tiers say of them."""

    def serve(self, namespace: str) -> None:
        """Requests use a namespace: what tiers say of its objects is noted from now on."""
        with self.lock:
            self._holdings.served[intern(namespace)] = None

    def match(self, chain: ChunkChain) -> Match:
        """The longest usable prefix by what the directory knows, tail included."""
        return finish(self.matching(chain))

    def matching(self, chain: ChunkChain) -> Steps[Match]:
        """:meth:`match` in steps. Nothing keeps what it found from going."""
        return self._walking(chain, chain.num_tokens, (), _keep_nothing)

    def _walking(
        self,
        chain: ChunkChain,
        stop: int,
        runs: Sequence[Run],
        keep: Callable[[Sequence[Held], Sequence[ObjectRecord]], object],
    ) -> Steps[Match]:
        """Match a prompt, a slice for each hold of the lock. ``keep`` is given what it finds."""

        def go(walk: Walk) -> Steps[None]:
            while True:
                with self.lock:
                    ahead = [run.within(walk.at, walk.at + SLICE) for run in runs]
                    with self._presuming(chain, ahead):
                        keep(*walk.more())
                if walk.is_over:
                    return
                yield

        return self._matcher.matching(chain, stop, runs, go)

    def holding(
        self, chain: ChunkChain, stop: int, runs: Sequence[Run], held: list[ObjectRecord]
    ) -> Steps[Match]:
        """Match a prompt and hold it: give ``held`` to :meth:`letting_go`, whatever happens.

        ``held`` is more than the match where a group needs less of it than it has.
        """

        def keep(first: Sequence[Held], rest: Sequence[ObjectRecord]) -> None:
            found = [*flat(first), *rest]
            self.host.hold(found)
            held.extend(found)

        return self._walking(chain, stop, runs, keep)

    def letting_go(self, held: list[ObjectRecord]) -> Steps[None]:
        """Let go of what was held, the end of it first. ``held`` is what is left."""
        return self._giving_back(held, self.host.let_go)

    def _giving_back(
        self, left: list[ObjectRecord], give: Callable[[Sequence[ObjectRecord]], object]
    ) -> Steps[None]:
        is_long = len(left) > SLICE
        while left:
            with self.lock:
                some = left[-SLICE:]
                del left[-SLICE:]
                give(some)
            if is_long:  # also after the last: what is freed then takes a turn
                yield

    def search(self, match: Match, *, every: bool) -> Search:
        """What to ask the tiers about a prompt beyond ``match``, which is what is known of it.

        Of what is exact; see :meth:`searching_accepted`. ``every``: about every chunk of it.
        """
        self.serve(match.chain.namespace)
        return Search(self._matcher, self._groups, match, every=every)

    def searching_accepted(
        self, chain: ChunkChain, number: int, runs: Sequence[Run], *, every: bool
    ) -> Steps[Search | None]:
        """What to ask about the accepted quality ``number``; None where no more of it is wanted.

        ``runs``: what may be presumed by what was heard before. Exact chunks are not asked about.
        """
        stop = chain.num_tokens
        match = yield from self._walking(chain, stop, runs, _keep_nothing)
        if match.is_whole:
            return None
        exact = yield from self._walking(chain.accepting(), stop, runs, _keep_nothing)
        namespace, start = chain.accepts[number].namespace, exact.reached // chain.chunk_step
        self.serve(namespace)
        named = Match(chain.named_in(namespace), [], [])
        return Search(self._matcher, self._groups, named, every=every, start=start)

    def questions(
        self, search: Search, tiers: int, now: float
    ) -> Steps[list[tuple[int, list[ObjectKey]]]]:
        """The next round of a search: what to ask which of ``tiers`` (bits); empty: it is over.

        What a tier has just said to be absent is not asked about again.
        """
        while True:
            keys = yield from self._locked(search.next(tiers))
            if not keys:
                return []
            asked = [(tier, list[ObjectKey]()) for tier in _tiers(tiers)]
            for at in range(0, len(keys), SLICE):
                if at:
                    yield
                with self.lock:
                    for tier, left in asked:
                        left[len(left) :] = self._holdings.open_questions(
                            tier, keys[at : at + SLICE], now
                        )
            if questions := [(tier, left) for tier, left in asked if left]:
                return questions

    def lease_match(
        self,
        chain: ChunkChain,
        runs: Sequence[Run],
        choose: Choose,
        *,
        owner: str,
        seconds: float,
        is_holding: bool = False,
    ) -> tuple[Match, Lease] | None:
        """:meth:`leasing`, all of it now."""
        return finish(
            self.leasing(chain, runs, choose, owner=owner, seconds=seconds, is_holding=is_holding)
        )

    def leasing(
        self,
        chain: ChunkChain,
        runs: Sequence[Run],
        choose: Choose,
        *,
        owner: str,
        seconds: float,
        is_holding: bool = False,
    ) -> Steps[tuple[Match, Lease] | None]:
        """Match a prompt by what is known and presumed (``runs``), and lease what is chosen of it.

        In any thread. What is found is held until it is leased. None if ``choose`` chooses none.
        """
        yield from self.expiring()
        if len(chain) <= FEW:  # found, chosen and leased under one hold of the lock
            with self.lock, self._presuming(chain, runs):
                match = finish(choose(self._matcher.match(chain, chain.num_tokens, runs)))
                if match is None:
                    return None
                return match, self._grant(*match.held(), owner, seconds, is_holding=is_holding)
        held: list[ObjectRecord] = []
        lease: Lease | None = None
        is_over = False
        try:
            found = yield from self.holding(chain, chain.num_tokens, runs, held)
            chosen = yield from choose(found)
            if chosen is not None:
                lease = yield from self.granting(
                    chosen, owner=owner, seconds=seconds, is_holding=is_holding
                )
            yield from self.letting_go(held)
            is_over = True
            return None if chosen is None or lease is None else (chosen, lease)
        finally:
            if not is_over:  # it raised, or was closed
                finish(self.letting_go(held))
                if lease is not None:
                    self.release(lease.number)

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

    def by_tier(self, match: Match) -> Steps[dict[str, int]]:
        """Tokens of a match by the name of the farthest tier each span needs."""
        tokens = yield from self._locked(match.by_tier(len(self.tiers)))
        return dict(zip(self.tiers, tokens, strict=True))

    def note(self, keys: Iterable[ObjectKey], tier: int, copies: Iterable[int] = ()) -> None:
        """A lower tier said it holds these objects; what this model cannot have is passed over.

        ``copies``: for each, how it lies there (:mod:`kvlayer.tier.planner.copies`), or none.
        """
        known = iter(copies)
        for some in in_slices(keys):
            with self.lock:
                self._holdings.note(some, tier, [*islice(known, len(some))])

    def absent(self, keys: Iterable[ObjectKey], tier: int, now: float) -> None:
        """A lower tier said that it holds none of these: believed for a second."""
        for some in in_slices(keys):
            with self.lock:
                self._holdings.absent(some, tier, now)

    def listing(self, tier: int, namespace: str, *, started: bool) -> None:
        """A tier is being listed: what is withdrawn meanwhile must not come back with the list."""
        with self.lock:
            self._holdings.listing(tier, namespace, started=started)

    def lease(self, match: Match, *, owner: str, seconds: float, is_holding: bool = False) -> Lease:
        """:meth:`granting`, all of it now."""
        return finish(self.granting(match, owner=owner, seconds=seconds, is_holding=is_holding))

    def granting(
        self, match: Match, *, owner: str, seconds: float, is_holding: bool = False
    ) -> Steps[Lease]:
        """Pin a match. Also drops leases whose deadline has passed. See ``Lease.is_holding``.

        Where it has more than a slice, whoever asks holds it meanwhile.
        """
        lease: Lease | None = None
        is_granted = False
        yield from self.expiring()
        try:
            for first, rest in _in_slices(match):
                if lease is not None:
                    yield
                with self.lock:
                    if lease is None:
                        lease = self._grant(first, rest, owner, seconds, is_holding=is_holding)
                    else:
                        self.leases.grow(lease, first, rest)
            assert lease is not None
            is_granted = True
            return lease
        finally:
            if not is_granted and lease is not None:
                self.release(lease.number)

    def _grant(
        self,
        first: Sequence[Held],
        rest: Sequence[ObjectRecord],
        owner: str,
        seconds: float,
        *,
        is_holding: bool,
    ) -> Lease:
        deadline = self._clock() + seconds
        return self.leases.grant(
            rest, first=first, owner=owner, deadline=deadline, is_holding=is_holding
        )

    def expiring(self) -> Steps[None]:
        """Drop leases whose deadline has passed."""
        now = self._clock()
        while self.leases.is_due(now):
            with self.lock:
                self.leases.expire(now)
            if self.leases.is_due(now):
                yield

    def granted(self, lease: Lease) -> bool:
        """Whether a lease is, or was, one of this planner's."""
        return lease.table is self.leases

    def claim(self, match: Match, lease: Lease) -> Match:
        """:meth:`claiming`, all of it now."""
        claimed, _ = finish(self.claiming(match, lease, match.tokens))
        return claimed

    def claiming(self, match: Match, lease: Lease | None, stop: int) -> Steps[tuple[Match, Match]]:
        """``match`` while its lease holds all of it; after that whatever is still usable of it.

        In an epoch that is over nothing is, and the lease is given back.
        Then the same for a reader that takes at most ``stop`` tokens: that is pinned, whoever
        releases the lease meanwhile, and the caller unpins its path. Every-chunk groups can end
        inside a span. A window is another one for another end, and a state is there
        only where a span ends: with those the match is made anew. Without a ``lease`` the caller
        holds the match.
        """
        pinned: list[ObjectRecord] = []
        held: list[ObjectRecord] = []
        is_pinned = False
        try:
            yield from self.expiring()
            path = match.path()
            if match.chain.is_stale and lease is not None:
                yield from self.releasing(lease.number)
            with self.lock:
                if is_whole := self._holds(match, lease):
                    self._pin(path[:SLICE], pinned)
            while is_whole and len(pinned) < len(path):
                yield
                with self.lock:
                    if is_whole := self._holds(match, lease):
                        self._pin(path[len(pinned) : len(pinned) + SLICE], pinned)
            claimed = match
            if not is_whole:
                claimed = yield from self.holding(match.chain, match.tokens, match.runs, held)
            reader = claimed
            if claimed.tokens > stop and not self._matcher.is_plain:
                reader = yield from self.holding(match.chain, stop, match.runs, held)
            if reader is not match:
                yield from self.unpinning(pinned)
                path = reader.path()
                for at in range(0, len(path), SLICE):
                    if at:
                        yield
                    with self.lock:
                        self._pin(path[at : at + SLICE], pinned)
            yield from self.letting_go(held)
            is_pinned = True
            return claimed, reader
        finally:
            if not is_pinned:  # it raised, or was closed
                finish(self.letting_go(held))
                finish(self.unpinning(pinned))

    def _holds(self, match: Match, lease: Lease | None) -> bool:
        """Whether a lease holds all of a match that may be served."""
        if lease is None:
            return not match.chain.is_stale
        return self.leases.holds(lease.number) and lease.left is None

    def _pin(self, path: Sequence[ObjectRecord], pinned: list[ObjectRecord]) -> None:
        self.host.pin(path)
        pinned.extend(path)

    def pin(self, path: Sequence[ObjectRecord]) -> None:
        """Hold objects for a running move: few, or in slices."""
        with self.lock:
            self.host.pin(path)

    def unpin(self, path: Sequence[ObjectRecord]) -> None:
        """:meth:`unpinning`, all of it now."""
        finish(self.unpinning([*path]))

    def unpinning(self, path: list[ObjectRecord]) -> Steps[None]:
        """Let go of objects after a move, root first; one use. ``path`` is what is left of it."""
        return self._giving_back(path, self.host.unpin)

    def keeping(self, lease: Lease, match: Match) -> Steps[None]:
        """A lease holds its match, which was brought up, until it ends: ``Lease.is_holding``."""
        path = match.path()
        for at in range(0, max(len(path), 1), SLICE):
            if at:
                yield
            with self.lock:
                self.leases.keep(lease, path[at : at + SLICE])

    def shortened(self, match: Match, count: int) -> Steps[Match]:
        """The longest usable prefix within the first ``count`` spans of ``match``."""
        if self._matcher.is_plain or not count or not match.spans:
            return match.first(count)
        stop = match.spans[:count][-1].stop
        return (yield from self._walking(match.chain, stop, match.runs, _keep_nothing))

    def release(self, number: int) -> bool:
        """Give a lease back, all of it now; False when it had expired."""
        return finish(self.releasing(number))

    def ended(self, number: int) -> bool:
        """The first step of :meth:`releasing`; :meth:`expiring` has the others."""
        with self.lock:
            return self.leases.release(number)

    def releasing(self, number: int) -> Steps[bool]:
        """:meth:`release` in steps, of which the first ends it.

        What is not drawn is done by the next lookup, store or load.
        """
        is_released = self.ended(number)
        if self.leases.is_ending:
            yield
            yield from self.expiring()
            yield  # what is freed then takes a turn
        return is_released


def _keep_nothing(_: Sequence[Held], __: Sequence[ObjectRecord]) -> None:
    pass


def _tiers(bits: int) -> list[int]:
    return [tier for tier in range(1, bits.bit_length()) if bits >> tier & 1]


def _in_slices(match: Match) -> Iterator[tuple[Sequence[Held], Sequence[ObjectRecord]]]:
    """What :meth:`Match.held` says, in slices."""
    first, rest = match.held()
    if len(match.spans) <= FEW:
        yield first, rest
        return
    some, most = list[Held](), 2 * SLICE
    count = 0
    for each in first:
        size = len(each) if isinstance(each, Strand) else 1
        if count + size > most:
            yield some, ()
            some, count = [], 0
        some.append(each)
        count += size
    room = max(most - count, 0)
    yield some, rest[:room]
    for at in range(room, len(rest), most):
        yield (), rest[at : at + most]
