"""The Planner: owns directory, leases and slab offsets, and decides what to move. No I/O.

One lock guards all of it, and nobody else takes it. The loop's thread changes state; any thread may
look up and lease.
Moves are described by :class:`~kvlayer.tier.messages.Piece` and carried out by Device, which may be
in other processes, and Objects; outcomes come back through ``gathered``, ``fetched`` and
``spilled``.

Pure files decide, and are given the :class:`~kvlayer.tier.planner.moment.Moment`: ``matcher`` and
``asking`` for lookups, ``store_planner`` for stores, ``holdings`` for lower tiers,
``demotion_step`` for demotion. Its parts are ``tables`` (the state), ``lookup_planner`` and
``survey`` (what it tells).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from sys import maxsize

from kvlayer._steps import SLICE, Steps, finish, in_slices
from kvlayer.identity.keys import ChunkChain, ObjectKey, Span
from kvlayer.results import Cause, Failure
from kvlayer.tier.messages import Outcome, Piece
from kvlayer.tier.planner.demotion_step import (
    DemotionStep,
    DemotionTargets,
    PendingWrite,
    end_leaving,
    plan_leaving,
)
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.lookup_planner import LookupPlanner
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.store_plan import Holds, Keeps, Reservation, StorePlan
from kvlayer.tier.planner.store_planner import spans_to_store
from kvlayer.tier.planner.survey import Survey

__all__ = ["REBOUND", "Keeps", "Planner", "Reservation", "StorePlan"]

REBOUND = "the cache was rebound meanwhile"
"""What happened to a request whose epoch is over."""


class Planner(LookupPlanner, Survey):
    """Decides for one rank of one namespace, or for several ``ranks`` that ``layout`` unites."""

    # -- store -----------------------------------------------------------------------------------

    def plan_store(
        self,
        chain: ChunkChain,
        first_token: int,
        *,
        tail: bool,
        holds: Holds,
        at_once: int = maxsize,
        dead: int = 0,
        keeps: Keeps | None = None,
    ) -> StorePlan:
        """Reserve a slot for every object that is missing, in prompt order.

        ``holds(g, span)``: whether the engine has it, of groups that need only some spans. When
        host memory runs out the rest of the prompt is dropped: later chunks are useless alone.
        ``dead``: bit t where tier t is not asked for now; what only such tiers have is missing.

        Where room would cost an object that ``keeps`` names, or that a move holds, planning stops
        there (``is_blocked``) and nothing is dropped: :meth:`plan_rest` goes on.

        Plans the first ``at_once`` spans; :meth:`plan_more` goes on while some are
        ``unplanned``. However that ends, :meth:`gathered` must be called.
        """
        todo = StorePlan(chain, holds, keeps, dead)
        finish(self.planning(todo, spans_to_store(chain, first_token, tail=tail), at_once))
        return todo

    def planning(
        self,
        todo: StorePlan,
        spans: Iterable[Sequence[Span]],
        at_once: int = maxsize,
        *,
        is_rest: bool = False,
    ) -> Steps[None]:
        """:meth:`plan_store` in steps, into ``todo``, or with ``is_rest`` :meth:`plan_rest`.

        ``spans`` come in slices. If it raises or is closed, what it held is given back.
        """
        is_begun = False
        self.serve(todo.chain.namespace)
        try:
            for some in spans:
                todo.unplanned.extend(some)
                if len(some) == SLICE:
                    yield
            yield from self.expiring()
            now = self._now()
            # Room must not come from the prefix that leads to what is stored.
            spared = ~todo.dead if is_rest else 0
            yield from self._locked(self._stores.begin(todo, now, spared=spared))
            yield from self.planning_more(todo, at_once)
            is_begun = True
        finally:
            if not is_begun:  # a policy of somebody else's may raise
                self.gathered(todo, None)

    def plan_rest(
        self,
        chain: ChunkChain,
        spans: Iterable[Span],
        *,
        holds: Holds,
        at_once: int = maxsize,
        dead: int = 0,
        keeps: Keeps | None = None,
    ) -> StorePlan:
        """Plan ``spans``, which an earlier plan of this store has left.

        Of the prefix only what no serving tier has is held: a prompt may be longer than host
        memory. As for :meth:`plan_store`, :meth:`gathered` must be called.
        """
        todo = StorePlan(chain, holds, keeps, dead)
        finish(self.planning(todo, [[*spans]], at_once, is_rest=True))
        return todo

    def plan_more(self, todo: StorePlan, at_once: int) -> None:
        """Plan the next ``at_once`` spans of a store. Others may have stored some meanwhile."""
        finish(self.planning_more(todo, at_once))

    def planning_more(self, todo: StorePlan, at_once: int) -> Steps[None]:
        """:meth:`plan_more` in steps: the last ones let go of what the plan held."""
        with self.lock:
            self._stores.more(todo, at_once, self._now())
        if todo.is_planned:
            yield from self.letting_go(todo.held)

    def retire(self) -> None:
        """Hand out no slot any more: memory that is given back now may still be written to."""
        with self.lock:
            self._stores.is_retired = True

    def stored(self, slots: Sequence[Reservation], *, ok: bool) -> None:
        """The gather of these slots ended: serve them or give the memory back.

        When ``ok`` they stay held, until :meth:`settle`.
        """
        with self.lock:
            self._stores.stored(slots, ok=ok)

    def gathered(self, todo: StorePlan, missed: Sequence[Outcome] | None) -> list[Failure]:
        """The gather of a plan ended; ``missed`` is what was not moved, None: it raised.

        A span that was missed ends what is stored: the plan keeps what comes before it, and the
        memory of the rest is given back. Of an epoch that is over nothing is kept. A plan of which
        some is ``unplanned`` may go on, after
        ``StorePlan.part_done``.
        """
        before = todo.gathers
        if todo.chain.is_stale:  # by now the memory may hold KV of something else
            failed = todo.refuse(Cause.REBOUND, self.tiers[0], REBOUND)
        else:
            failed = todo.cut(missed, self.tiers[0])
        if failed or missed is None or todo.is_planned:
            finish(self.letting_go(todo.held))
        with self.lock:
            self._stores.gathered(todo, before[len(todo.gathers) :])
        return failed

    def remember(
        self, chain: ChunkChain, spans: Sequence[Span], known: Iterable[Span] = ()
    ) -> None:
        """Keep for ``explain`` what was stored, or was there already (``known``)."""
        with self.lock:
            self.journal.stored(chain, spans, known)

    def settle(self, chain: ChunkChain, slots: Sequence[Reservation]) -> list[ObjectRecord]:
        """Let go of what a store gathered; the whole prompt is recent now. Returns its objects."""
        return finish(self.settling(chain, [*slots]))

    def settling(self, chain: ChunkChain, slots: list[Reservation]) -> Steps[list[ObjectRecord]]:
        """:meth:`settle` step by step, for whoever keeps others waiting: finish it in any case.

        Uses ``slots`` up.
        """
        return self._locked(self._stores.settling(chain, slots))

    def having_room(self, wanted: Sequence[tuple[Span, Sequence[ObjectRecord]]]) -> Steps[bool]:
        """Whether host memory has room for all of these, with what is pinned."""
        missing = 0
        for at in range(0, len(wanted), SLICE):
            if at:
                yield
            with self.lock:
                for span, records in wanted[at : at + SLICE]:
                    for record in records:
                        if record.host is HostState.ABSENT:
                            missing += self.payload(record.part, span.tokens).nbytes
        with self.lock:
            return missing <= self.host.extents.capacity - self.host.pinned_nbytes

    def scattered(self, records: Sequence[ObjectRecord], lease: Lease | None) -> Steps[None]:
        """A load has scattered these: it lets go of them, and so does a lease that only reads.

        Finish it in any case.
        """
        if lease is not None:
            yield from self._locked(self.leases.taking_apart(lease))
        for stop in range(len(records), 0, -SLICE):
            some = records[max(stop - SLICE, 0) : stop]
            with self.lock:
                self.host.unpin(some)
                if lease is not None:
                    self.leases.give_back(lease.number, some)
            if stop > SLICE:
                yield

    def in_order(self, path: Sequence[ObjectRecord]) -> Steps[None]:
        """A path was let go of piece by piece: its root is the most recent of it again."""
        for stop in range(len(path), 0, -SLICE):
            with self.lock:
                self.host.refresh(path[max(stop - SLICE, 0) : stop])
            if stop > SLICE:
                yield

    # -- lower tiers -----------------------------------------------------------------------------

    def plan_fetch(
        self,
        span: Span,
        record: ObjectRecord,
        evicted: list[ObjectRecord],
        spares: Keeps | None = None,
    ) -> Reservation | None:
        """Reserve a slot to bring an object up; None when there is no room for it.

        What ``spares`` names makes room only where little else can.
        """
        with self.lock:
            now = self._now()
            self.leases.expire(now.clock)
            return self._stores.reserve(span, record, evicted, None, now, spares=spares)

    def fetched(self, slot: Reservation, tier: int, *, ok: bool, copy: int = 0) -> None:
        """The fetch into this slot ended: serve it or give the memory back. Lets go of its pin.

        ``tier`` has held it if ``ok``, which may have been presumed; ``copy``: how it lay there.
        """
        with self.lock:
            if ok:
                self.host.commit((slot.record,))
                if slot.record.presumed or slot.record.tiers >> tier & 1:
                    self.directory.add_tier(slot.record, tier, copy)
                self.host.let_go((slot.record,))
            else:
                self._stores.stored((slot,), ok=False)

    def plan_spill(self, span: Span, record: ObjectRecord, tier: int) -> Piece | None:
        """Hold a host object that tier should get; None when it has or gets it already."""
        with self.lock:
            bit = 1 << tier
            if record.host is not HostState.READY or (record.tiers | record.writing) & bit:
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

    def spilled(self, record: ObjectRecord, tier: int, *, ok: bool, copy: int = 0) -> None:
        """A spill ended; lets go of its pin. ``copy``: how the object lies there now."""
        with self.lock:
            record.writing &= ~(1 << tier)
            if ok:
                self._holdings.written(record, tier, copy)
            self.host.let_go((record,))

    def missing(
        self, record: ObjectRecord, tier: int, cause: Cause, detail: str, *, aside: bool = False
    ) -> None:
        """A tier turned out not to have a usable copy.

        ``aside``: it may still say that it has one; it is believed again once it was written to.
        """
        with self.lock:
            wall = self._wall_clock()
            self._holdings.missing(record, tier, cause, detail, aside=aside, wall=wall)

    def vanished(
        self, keys: Iterable[ObjectKey], tier: int, detail: str, cause: Cause = Cause.EVICTED
    ) -> None:
        """A lower tier no longer holds these objects."""
        for some in in_slices(keys):
            with self.lock:
                self._holdings.vanished(some, tier, cause, detail, self._wall_clock())

    def plan_leaving(
        self, keep_nbytes: int, outlets: DemotionTargets, at_once: int
    ) -> DemotionStep:
        """The next step of making room; see ``demotion_step.plan_leaving``."""
        with self.lock:
            return plan_leaving(self.host, keep_nbytes, outlets, at_once, self._wall_clock())

    def end_leaving(self, ways: Sequence[PendingWrite]) -> list[ObjectRecord]:
        """Writes of a step ended; see :func:`kvlayer.tier.planner.demotion_step.end_leaving`."""
        with self.lock:
            return end_leaving(self.host, ways)

    # -- control ---------------------------------------------------------------------------------

    def evict(self, records: Iterable[ObjectRecord], cause: Cause, detail: str) -> list[ObjectKey]:
        """Drop ready, unpinned objects from host memory; returns the keys of those dropped."""
        gone: list[ObjectKey] = []
        with self.lock:
            for record in list(records):
                if record.host is HostState.READY and not record.pins:
                    self.host.drop(record)
                    gone.append(record.key)
                    if not record.tiers:
                        self._holdings.lost(record.key, cause, 0, detail, self._wall_clock())
        return gone
