"""The Planner: owns directory, leases and slab offsets, and decides what to move. No I/O.

One lock guards all of it. The loop's thread changes state; any thread may look up and lease.
Moves are described by :class:`~kvlayer.tier.messages.Piece` and carried out by Device, which may be
in other processes, and Objects; outcomes come back through ``gathered``, ``fetched`` and
``spilled``.

Somewhat over 400 lines: everything that holds the lock is in one place, to be read as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from sys import maxsize
from threading import RLock
from typing import TypeAlias

from kvlayer.abc.policy import PolicyMaker
from kvlayer.errors import CapacityError
from kvlayer.keys import ChunkChain, ObjectKey, Part, Span
from kvlayer.layout import HitRule, KVLayout
from kvlayer.payload import Payload
from kvlayer.results import Cause, Failure
from kvlayer.tier import plan
from kvlayer.tier.absences import Absences
from kvlayer.tier.asking import Search
from kvlayer.tier.directory import Directory, Host, ObjectRecord
from kvlayer.tier.host import HostTier
from kvlayer.tier.journal import Journal, Loss
from kvlayer.tier.lease import Lease, LeaseTable
from kvlayer.tier.leaving import Leaving, Outlets, plan_leaving
from kvlayer.tier.matcher import Match, Matcher, Run
from kvlayer.tier.messages import Outcome, Piece
from kvlayer.tier.promises import Promise, Promises
from kvlayer.tier.recent import Recent
from kvlayer.tier.store_plan import Reservation, StorePlan

__all__ = ["Planner", "Reservation", "StorePlan"]

_MAX_ASIDE = 4096  # objects set aside that are remembered
_MAX_WITHDRAWN = 65_536  # objects that went while their tier is listed
_MAX_SHAPES = 4096
_BELIEVED_SECONDS = 60.0  # a promise whose holder has not been heard of

Keeps: TypeAlias = Callable[[ObjectRecord], bool]
"""Whether an object must not make room, because a tier is still to get it."""


class Planner:
    """Decides for one rank of one namespace, or for several ``ranks`` that ``layout`` unites.

    ``tiers`` are names, that of the host first.
    """

    def __init__(
        self,
        namespace: str,
        layout: KVLayout,
        *,
        tiers: Sequence[str],
        capacity: int,
        policy: PolicyMaker,
        tokens_per_chunk: int,
        tokens_per_tail: int,
        head_shards: int = 0,
        ranks: Sequence[KVLayout] = (),
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.lock = RLock()
        self.layout = layout
        self.tiers = tuple(tiers)
        self.tokens_per_chunk = tokens_per_chunk
        self.tokens_per_tail = tokens_per_tail
        self._clock = clock
        self._wall_clock = wall_clock
        self._groups = [g.group for g in layout.groups]
        needs = [plan.rank_part(i, g) for i, g in enumerate(layout.groups)]
        self._cuts = plan.cuts(layout, ranks or (layout,), head_shards)
        self._withdrawn: dict[int, Recent[ObjectKey, None]] = {}
        """By tier that is being listed, what has gone from it meanwhile. What is forgotten may be
        noted although it has gone: a read then finds it missing."""
        self._aside: Recent[tuple[int, ObjectKey], None] = Recent(_MAX_ASIDE)
        """What a tier may hold but could not deliver."""
        self._payloads: dict[tuple[Part, int], Payload] = {}
        self.directory = Directory(namespace, needs)
        lengths = range(tokens_per_tail, tokens_per_chunk + 1, tokens_per_tail)
        self._matcher = Matcher(self.directory, self._groups, self._cuts, lengths)
        self.host = HostTier(capacity, policy, self.directory)
        self.leases = LeaseTable(self.host)
        self.journal = Journal()
        self.promises = Promises(namespace)
        self._absences = Absences()
        self._is_retired = False
        chunk = sum(
            self.payload(part, tokens_per_chunk).nbytes for cut in self._cuts for part in cut
        )
        if self.host.extents.capacity < chunk:
            raise CapacityError(
                f"host memory of {capacity} bytes is smaller than one chunk of {chunk} bytes",
                hint="raise the capacity of the cpu:// tier or lower tokens_per_chunk",
            )

    def payload(self, part: Part, tokens: int) -> Payload:
        """The shape of an object."""
        shape = self._payloads.get((part, tokens))
        if shape is None:
            shape = Payload.of(self._groups[part.group], part, tokens)
            if len(self._payloads) >= _MAX_SHAPES:  # others name any number of parts
                self._payloads.clear()
            self._payloads[part, tokens] = shape
        return shape

    @property
    def has_forgotten(self) -> bool:
        """Whether tiers may hold more than the directory could remember of them."""
        return self.directory.forgotten > 0

    # -- lookup ----------------------------------------------------------------------------------

    def match(self, chain: ChunkChain) -> Match:
        """The longest usable prefix by what the directory knows, tail included."""
        with self.lock:
            return self._matcher.match(chain, chain.num_tokens)

    def search(self, chain: ChunkChain, *, every: bool) -> Search:
        """What to ask the tiers about a prompt; ``every``: about every chunk of it."""
        return Search(self._matcher, self._groups, chain, every=every)

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
                    (tier, self._absences.open(tier, keys, now))
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
            presumed = self._presume(chain, runs)
            try:
                match = choose(self._match(chain, chain.num_tokens, runs))
                if match is None:
                    return None
                return match, self.lease(match, owner=owner, seconds=seconds, is_holding=is_holding)
            finally:
                self._forget_unpinned(presumed)

    def _match(self, chain: ChunkChain, stop: int, runs: Sequence[Run]) -> Match:
        match = self._matcher.match(chain, stop)
        match.runs = runs
        return match

    def _presume(self, chain: ChunkChain, runs: Sequence[Run]) -> list[ObjectRecord]:
        presumed: list[ObjectRecord] = []
        for run in runs:
            presumed += self._matcher.presume(chain, run)
        return presumed

    def _forget_unpinned(self, presumed: Sequence[ObjectRecord]) -> None:
        for found in presumed:
            if not found.pins:
                self.directory.forget(found)

    def by_tier(self, match: Match) -> dict[str, int]:
        """Tokens of a match by the name of the farthest tier each span needs."""
        with self.lock:
            return dict(zip(self.tiers, match.by_tier(len(self.tiers)), strict=True))

    def note(self, keys: Iterable[ObjectKey], tier: int) -> None:
        """A lower tier said it holds these objects; what this model cannot have is passed over."""
        with self.lock:
            withdrawn = self._withdrawn.get(tier, ())
            for key in keys:
                if key in withdrawn or (tier, key) in self._aside:
                    continue
                if self._matcher.can_exist(key):
                    self._absences.withdraw(tier, key)
                    self.directory.note(key, tier)

    def absent(self, keys: Iterable[ObjectKey], tier: int, now: float) -> None:
        """A lower tier said that it holds none of these: believed for a second."""
        with self.lock:
            self._absences.believe(tier, keys, now)
            for key in keys:
                self.directory.deny(key, tier)

    def listing(self, tier: int, *, started: bool) -> None:
        """A tier is being listed: what is withdrawn meanwhile must not come back with the list."""
        with self.lock:
            if started:
                self._withdrawn[tier] = Recent(_MAX_WITHDRAWN)
            else:
                self._withdrawn.pop(tier, None)

    def lease(self, match: Match, *, owner: str, seconds: float, is_holding: bool = False) -> Lease:
        """Pin a match. Also drops leases whose deadline has passed. See ``Lease.is_holding``."""
        with self.lock:
            now = self._clock()
            self.leases.expire(now)
            return self.leases.grant(
                match.path(), owner=owner, deadline=now + seconds, is_holding=is_holding
            )

    def granted(self, lease: Lease) -> bool:
        """Whether a lease is, or was, one of this planner's."""
        return lease.table is self.leases

    def claim(self, match: Match, lease: Lease) -> Match:
        """``match`` while its lease holds; after that whatever is still usable of it.

        Pinned, whoever releases the lease meanwhile: the caller unpins its path.
        """
        with self.lock:
            self.leases.expire(self._clock())
            if self.leases.holds(lease.number):
                self.host.pin(match.path())
                return match
            presumed = self._presume(match.chain, match.runs)
            match = self._match(match.chain, match.tokens, match.runs)
            self.host.pin(match.path())
            self._forget_unpinned(presumed)
            return match

    def bounded(self, match: Match, stop: int) -> Match:
        """``match`` for a reader that takes at most ``stop`` tokens.

        Every-chunk groups can end inside a span. A trailing group needs another window for another
        end, and a state is there only where a span ends: with those the match is made anew.
        """
        if match.tokens <= stop or self._matcher.is_plain:
            return match
        with self.lock:
            return self._match(match.chain, stop, match.runs)

    def shortened(self, match: Match, count: int) -> Match:
        """The longest usable prefix within the first ``count`` spans of ``match``."""
        if self._matcher.is_plain or not count or not match.spans:
            return match.first(count)
        with self.lock:
            return self._match(match.chain, match.spans[:count][-1].stop, match.runs)

    def release(self, number: int) -> bool:
        """Give a lease back; False when it had expired."""
        with self.lock:
            return self.leases.release(number)

    # -- store -----------------------------------------------------------------------------------

    def plan_store(
        self,
        chain: ChunkChain,
        first_token: int,
        *,
        tail: bool,
        holds: Callable[[int, Span], bool],
        at_once: int = maxsize,
        dead: int = 0,
        keeps: Keeps | None = None,
    ) -> StorePlan:
        """Reserve a slot for every object that is missing, in prompt order.

        ``holds(g, span)`` says whether the engine still has the span for trailing group g. When
        host memory runs out the rest of the prompt is dropped: later chunks are useless alone.
        ``dead``: bit t where tier t is not asked for now; what only such tiers have is missing.

        Where room would cost an object that ``keeps`` names, or that a move holds, planning stops
        there (``is_blocked``) and nothing is dropped: :meth:`plan_rest` goes on.

        Plans the first ``at_once`` spans; :meth:`plan_more` goes on while some are
        ``unplanned``. However that ends, :meth:`gathered` must be called.
        """
        todo = StorePlan(dead)
        step = chain.chunk_step
        todo.unplanned.extend(map(chain.span, range(-(-first_token // step), len(chain))))
        if tail and len(chain) * step >= first_token:
            todo.unplanned.extend(chain.tails(len(chain))[:1])
        with self.lock:
            # Room must not come from the prefix that leads to what is stored.
            held = self._resident(chain)
            self._begin_plan(chain, todo, holds, at_once=at_once, keeps=keeps, held=held)
        return todo

    def plan_rest(
        self,
        chain: ChunkChain,
        spans: Iterable[Span],
        *,
        holds: Callable[[int, Span], bool],
        at_once: int = maxsize,
        dead: int = 0,
        keeps: Keeps | None = None,
    ) -> StorePlan:
        """Plan ``spans``, which an earlier plan of this store has left.

        Of the prefix only what no serving tier has is held: a prompt may be longer than host
        memory. As for :meth:`plan_store`, :meth:`gathered` must be called.
        """
        todo = StorePlan(dead)
        todo.unplanned.extend(spans)
        with self.lock:
            held = [found for found in self._resident(chain) if not found.tiers & ~dead]
            self._begin_plan(chain, todo, holds, at_once=at_once, keeps=keeps, held=held)
        return todo

    def _begin_plan(
        self,
        chain: ChunkChain,
        todo: StorePlan,
        holds: Callable[[int, Span], bool],
        *,
        at_once: int,
        keeps: Keeps | None,
        held: list[ObjectRecord],
    ) -> None:
        now = self._clock()
        self.leases.expire(now)
        todo.promise = self.promises.make("", holder="store", until=now + _BELIEVED_SECONDS)
        todo.held = held
        self.host.hold(held)
        planned = False
        try:
            self.plan_more(chain, todo, holds, at_once, keeps)
            planned = True
        finally:  # a policy of somebody else's may raise
            if not planned:
                self.gathered(todo, None)

    def plan_more(
        self,
        chain: ChunkChain,
        todo: StorePlan,
        holds: Callable[[int, Span], bool],
        at_once: int,
        keeps: Keeps | None = None,
    ) -> None:
        """Plan the next ``at_once`` spans of a store. Others may have stored some meanwhile."""
        with self.lock:
            for _ in range(min(at_once, len(todo.unplanned))):
                if not self._plan_span(chain, todo.unplanned[0], holds, todo, keeps):
                    if keeps is not None:
                        todo.is_blocked = True
                        break
                    todo.dropped += todo.unplanned
                    todo.unplanned.clear()
                    break
                todo.unplanned.popleft()
            if not todo.unplanned or todo.is_blocked:
                self._let_go_prefix(todo)
                if todo.spans:
                    self._supersede(chain, todo.spans[0])

    def _let_go_prefix(self, todo: StorePlan) -> None:
        self.host.let_go(todo.held)
        todo.held = []

    def _resident(self, chain: ChunkChain) -> list[ObjectRecord]:
        """What host memory holds of a prompt's full chunks, root first."""
        chunks = self._matcher.leading(chain)
        records = [found for chunk in chunks for found in chunk.objects]
        return [found for found in records if found.host is Host.READY]

    def _plan_span(
        self,
        chain: ChunkChain,
        span: Span,
        holds: Callable[[int, Span], bool],
        todo: StorePlan,
        keeps: Keeps | None,
    ) -> bool:
        known: list[ObjectRecord] = []
        other: Promise | None = None
        before = len(todo.gathers)
        for g, cut in enumerate(self._cuts):
            if self._groups[g].hit_rule is HitRule.TRAILING and not holds(g, span):
                continue
            for part in cut:
                record = self.directory.ensure(span, chain.zone(span), part)
                if record.host is not Host.ABSENT or record.tiers & ~todo.dead:
                    known.append(record)
                    if record.host is Host.FILLING and not record.tiers & ~todo.dead:
                        other = self.promises.find(span.hash, self._clock())
                    continue
                slot: Reservation | None = None
                try:
                    slot = self._reserve(span, record, todo.evicted, keeps)
                finally:
                    if slot is None:
                        self.directory.forget(record)
                if slot is None:
                    self.stored(todo.gathers[before:], ok=False)
                    del todo.gathers[before:]
                    return False
                record.retention = record.retention.joined(chain.scope.retention)
                todo.gathers.append(slot)
        if other is not None and other is not todo.promise:
            todo.joined.append((span, other))
        if len(todo.gathers) > before:
            todo.spans.append(span)
            assert todo.promise is not None
            todo.promise.zone = chain.zone(span)
            self.promises.add(todo.promise, span.hash)
        elif known and other is None:
            todo.skipped.append((span, tuple(known)))
        return True

    def _supersede(self, chain: ChunkChain, span: Span) -> None:
        """Tails that the first newly stored span contains are the cheapest thing to lose."""
        for shorter in chain.tails(span.start // chain.chunk_step):
            record = self.directory.chunk(shorter.hash, shorter.tokens, chain.zone(shorter))
            if record is not None and shorter.stop < span.stop:
                for found in record.objects:
                    self.host.demote(found)

    def _reserve(
        self,
        span: Span,
        record: ObjectRecord,
        evicted: list[ObjectRecord],
        keeps: Keeps | None = None,
    ) -> Reservation | None:
        if self._is_retired:
            return None
        nbytes = self.payload(record.part, span.tokens).nbytes
        record.chunk.span = span
        before = len(evicted)
        made = self.host.reserve(record, nbytes, evicted, self._wall_clock(), keeps)
        for gone in evicted[before:]:
            self._note_eviction(gone)
        if not made:
            return None
        piece = Piece(record.key, span.start, span.tokens, record.offset, nbytes)
        return Reservation(span, record, piece)

    def retire(self) -> None:
        """Hand out no slot any more: memory that is given back now may still be written to."""
        with self.lock:
            self._is_retired = True

    def _note_eviction(self, gone: ObjectRecord) -> None:
        if gone.tiers:
            return  # still served from below
        detail = f"evicted from {self.tiers[0]} by {self.host.order.name}"
        self.lost(gone.key, Cause.EVICTED, 0, detail)

    def lost(self, key: ObjectKey, cause: Cause, tier: int, detail: str) -> None:
        """Remember why an object is gone."""
        loss = Loss(cause, self.tiers[tier], self._wall_clock(), detail)
        self.journal.lost(key.end_hash, key.tokens, loss)

    def stored(self, slots: Sequence[Reservation], *, ok: bool) -> None:
        """The gather of these slots ended: serve them or give the memory back.

        When ``ok`` they stay held, until :meth:`settle`.
        """
        with self.lock:
            if ok:
                self.host.commit([slot.record for slot in slots])
            else:
                for slot in slots:
                    self._abandon(slot)

    def gathered(self, todo: StorePlan, missed: Sequence[Outcome] | None) -> list[Failure]:
        """The gather of a plan ended; ``missed`` is what was not moved, None: it raised.

        A span that was missed ends what is stored: the plan keeps what comes before it, and the
        memory of the rest is given back.
        """
        before, failed = todo.gathers, todo.cut(missed, self.tiers[0])
        with self.lock:
            self._let_go_prefix(todo)
            self.stored(before[len(todo.gathers) :], ok=False)
            self.stored(todo.gathers, ok=True)
            if todo.promise is not None:
                stored = [slot.span.hash for slot in todo.gathers]
                self.promises.end(todo.promise, stored, kept=True)
                self.promises.end(todo.promise, todo.promise.hashes, kept=False)
        return failed

    def _abandon(self, slot: Reservation) -> None:
        self.host.drop(slot.record)
        self.host.let_go((slot.record,))

    def remember(self, chain: ChunkChain, spans: list[Span], known: Iterable[Span] = ()) -> None:
        """Keep for ``explain`` what was stored, or was there already (``known``)."""
        chain.fingerprints()  # not while others wait for the lock
        with self.lock:
            self.journal.stored(chain, spans, known)

    def settle(self, chain: ChunkChain, slots: Sequence[Reservation]) -> list[ObjectRecord]:
        """Let go of what a store gathered; the whole prompt is recent now. Returns its objects."""
        with self.lock:
            self.host.let_go([slot.record for slot in slots])
            last = (
                self.directory.chunk(s.span.hash, s.span.tokens, chain.zone(s.span))
                for s in slots[-1:]
            )
            found = dict.fromkeys([*self._matcher.leading(chain), *last])
            path = [o for record in found if record for o in record.objects]
            self.host.refresh(path, chain.scope.retention)
            return path

    def pin(self, records: Sequence[ObjectRecord]) -> None:
        """Hold objects for a running move."""
        with self.lock:
            self.host.pin(records)

    def has_room(self, wanted: Iterable[tuple[Span, Sequence[ObjectRecord]]]) -> bool:
        """Whether host memory has room for all of these, with what is pinned."""
        with self.lock:
            left = self.host.extents.capacity - self.host.pinned_nbytes
            for span, records in wanted:
                for record in records:
                    if record.host is Host.ABSENT:
                        left -= self.payload(record.part, span.tokens).nbytes
            return left >= 0

    def scattered(self, records: Sequence[ObjectRecord], lease: Lease | None) -> None:
        """A load has scattered these: it lets go of them, and so does a lease that only reads."""
        with self.lock:
            self.host.unpin(records)
            if lease is not None:
                self.leases.give_back(lease.number, records)

    def in_order(self, path: Sequence[ObjectRecord]) -> None:
        """A path was let go of piece by piece: its root is the most recent of it again."""
        with self.lock:
            self.host.refresh(path)

    def unpin(self, records: Sequence[ObjectRecord]) -> None:
        """Let go of objects after a move; counts as one use, root first."""
        with self.lock:
            self.host.unpin(records)

    # -- lower tiers -----------------------------------------------------------------------------

    def plan_fetch(
        self, span: Span, record: ObjectRecord, evicted: list[ObjectRecord]
    ) -> Reservation | None:
        """Reserve a slot to bring an object up; None when there is no room for it."""
        with self.lock:
            self.leases.expire(self._clock())
            return self._reserve(span, record, evicted)

    def fetched(self, slot: Reservation, tier: int, *, ok: bool) -> None:
        """The fetch into this slot ended: serve it or give the memory back. Lets go of its pin.

        ``tier`` has held it if ``ok``, which may have been presumed.
        """
        with self.lock:
            if ok:
                self.host.commit((slot.record,))
                if slot.record.presumed:
                    self.directory.add_tier(slot.record, tier)
                self.host.let_go((slot.record,))
            else:
                self._abandon(slot)

    def plan_spill(self, span: Span, record: ObjectRecord, tier: int) -> Piece | None:
        """Hold a host object that tier should get; None when it has or gets it already."""
        with self.lock:
            bit = 1 << tier
            if record.host is not Host.READY or (record.tiers | record.writing) & bit:
                return None
            record.writing |= bit
            self.host.hold((record,))
            return Piece(
                record.key,
                span.start,
                span.tokens,
                record.offset,
                record.nbytes,
                record.retention,
                span.parent,
            )

    def spilled(self, record: ObjectRecord, tier: int, *, ok: bool) -> None:
        """A spill ended; lets go of its pin."""
        with self.lock:
            record.writing &= ~(1 << tier)
            if ok:
                self.directory.add_tier(record, tier)
                self._absences.withdraw(tier, record.key)
                self._aside.pop((tier, record.key))
            self.host.let_go((record,))

    def missing(
        self, record: ObjectRecord, tier: int, cause: Cause, detail: str, *, aside: bool = False
    ) -> None:
        """A tier turned out not to have a usable copy.

        ``aside``: it may still say that it has one; it is believed again once it was written to.
        """
        with self.lock:
            if aside:
                self._aside[tier, record.key] = None
            self._withdraw(record.key, tier)
            was_seen = bool(record.tiers)
            self.directory.drop_tier(record, tier)
            if was_seen and not record.is_ready:
                self.lost(record.key, cause, tier, detail)

    def _withdraw(self, key: ObjectKey, tier: int) -> None:
        if tier in self._withdrawn:
            self._withdrawn[tier][key] = None

    def vanished(
        self, keys: Iterable[ObjectKey], tier: int, detail: str, cause: Cause = Cause.EVICTED
    ) -> None:
        """A lower tier no longer holds these objects."""
        with self.lock:
            for key in keys:
                self._withdraw(key, tier)
                record = self.directory.find(key)
                if record is not None and record.tiers >> tier & 1:
                    self.directory.drop_tier(record, tier)
                if record is None or not record.is_ready:
                    self.lost(key, cause, tier, detail)

    def plan_leaving(self, keep_nbytes: int, outlets: Outlets, at_once: int) -> Leaving:
        """The next step of making room; see :func:`kvlayer.tier.leaving.plan_leaving`."""
        with self.lock:
            return plan_leaving(self.host, keep_nbytes, outlets, at_once, self._wall_clock())

    # -- control ---------------------------------------------------------------------------------

    def evict(self, records: Iterable[ObjectRecord], cause: Cause, detail: str) -> list[ObjectKey]:
        """Drop ready, unpinned objects from host memory; returns the keys of those dropped."""
        gone: list[ObjectKey] = []
        with self.lock:
            for record in list(records):
                if record.host is Host.READY and not record.pins:
                    self.host.drop(record)
                    gone.append(record.key)
                    if not record.tiers:
                        self.lost(record.key, cause, 0, detail)
        return gone
