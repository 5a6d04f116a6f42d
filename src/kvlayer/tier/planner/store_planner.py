"""Plans what stores and loads put into host memory, and gives it up again. Pure.

The caller brings the time, and holds the planner's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from kvlayer.identity.keys import ChunkChain, Part, Span
from kvlayer.layout import HitRule, KVGroup
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.tier.messages import Piece
from kvlayer.tier.planner.holdings import Holdings
from kvlayer.tier.planner.host import HostTier
from kvlayer.tier.planner.matcher import Matcher
from kvlayer.tier.planner.moment import Moment
from kvlayer.tier.planner.promises import Promise, Promises
from kvlayer.tier.planner.records import ChunkRecord, HostState, ObjectRecord
from kvlayer.tier.planner.store_plan import Keeps, Reservation, StorePlan

__all__ = ["StorePlanner", "spans_to_store"]

_SLICE = 256  # spans for each hold of the planner's lock
_BELIEVED_SECONDS = 60.0  # a promise whose holder has not been heard of


class StorePlanner:
    """Reserves slots of one host tier. ``cuts``: per group, the parts that a chunk is cut into."""

    def __init__(
        self,
        host: HostTier,
        matcher: Matcher,
        promises: Promises,
        holdings: Holdings,
        *,
        groups: Sequence[KVGroup],
        cuts: Sequence[Sequence[Part]],
        payload: Callable[[Part, int], Payload],
        tier: str,
    ) -> None:
        """``tier``: the host's name."""
        self._host = host
        self._directory = host.directory
        self._matcher = matcher
        self._promises = promises
        self._holdings = holdings
        self._groups = groups
        self._cuts = cuts
        self._payload = payload
        self._tier = tier
        self.is_retired = False
        """No slot is handed out any more: memory given back may still be written to."""

    def begin(self, todo: StorePlan, held: list[ObjectRecord], now: Moment) -> None:
        """Begin a plan that holds ``held``. :meth:`gathered` must be called."""
        until = now.clock + _BELIEVED_SECONDS
        todo.promise = self._promises.make(todo.chain.namespace, "", holder="store", until=until)
        todo.held = held
        self._host.hold(held)

    def more(self, todo: StorePlan, at_once: int, now: Moment) -> None:
        """Plan the next ``at_once`` spans; see ``Planner.plan_store`` for where that stops."""
        assert todo.promise is not None
        todo.promise.until = now.clock + _BELIEVED_SECONDS  # its holder is heard of
        for _ in range(min(at_once, len(todo.unplanned))):
            if not self._plan_span(todo.unplanned[0], todo, now):
                if todo.keeps is not None:
                    todo.is_blocked = True
                    break
                todo.dropped += todo.unplanned
                todo.unplanned.clear()
                break
            todo.unplanned.popleft()
        if not todo.unplanned or todo.is_blocked:
            self._let_go_prefix(todo)
            if todo.first is not None:
                self._supersede(todo.chain, todo.first)

    def gathered(self, todo: StorePlan, lost: Sequence[Reservation], *, goes_on: bool) -> None:
        """What was planned so far is gathered: serve what was kept, give back what was ``lost``.

        ``goes_on``: more is going to be planned, so the prefix stays held.
        """
        if not goes_on:
            self._let_go_prefix(todo)
        self.stored(lost, ok=False)
        self.stored(todo.gathers, ok=True)
        if todo.promise is not None:
            stored = [slot.span.hash for slot in todo.gathers]
            self._promises.end(todo.promise, stored, kept=True)
            self._promises.end(todo.promise, todo.promise.hashes, kept=False)

    def stored(self, slots: Sequence[Reservation], *, ok: bool) -> None:
        """See ``Planner.stored``."""
        if ok:
            self._host.commit([slot.record for slot in slots])
            return
        for slot in slots:
            self._host.drop(slot.record)
            self._host.let_go((slot.record,))

    def settling(
        self, chain: ChunkChain, slots: Sequence[Reservation]
    ) -> Generator[None, None, list[ObjectRecord]]:
        """See ``Planner.settling``."""
        for at in range(0, len(slots), _SLICE):
            self._host.let_go([slot.record for slot in slots[at : at + _SLICE]])
            yield
        found: dict[ChunkRecord, None] = {}
        for count, record in enumerate(self._matcher.leading(chain), 1):
            found[record] = None
            if not count % _SLICE:
                yield
        for slot in slots[-1:]:
            span = slot.span
            last = self._matcher.record(chain, span)
            if last is not None:
                found[last] = None
        path = [o for record in found for o in record.objects]
        self._host.refresh(path, chain.scope.retention)
        first, _ = self._matcher.first(chain, chain.num_tokens)
        for at in range(0, len(first), _SLICE):
            yield
            self._host.string(first[at : at + _SLICE])
        return path

    def _let_go_prefix(self, todo: StorePlan) -> None:
        self._host.let_go(todo.held)
        todo.held = []

    def resident(self, chain: ChunkChain) -> list[ObjectRecord]:
        """What host memory holds of a prompt's full chunks, root first."""
        chains = [chain] if _is_exact(chain) else [_exact(chain), chain]
        chunks = (chunk for each in chains for chunk in self._matcher.leading(each))
        records = [found for chunk in chunks for found in chunk.objects]
        return [found for found in records if found.host is HostState.READY]

    def _plan_span(self, span: Span, todo: StorePlan, now: Moment) -> bool:
        chain = todo.chain
        if not _is_exact(chain) and (there := self._exactly(chain, span, todo.dead)):
            todo.skipped.append((span, there))
            return True
        known: list[ObjectRecord] = []
        other: Promise | None = None
        before = len(todo.gathers)
        for g, cut in enumerate(self._cuts):
            if self._groups[g].hit_rule is HitRule.TRAILING and not todo.holds(g, span):
                continue
            for part in cut:
                record = self._directory.ensure(chain.namespace, span, chain.zone(span), part)
                if record.host is not HostState.ABSENT or record.tiers & ~todo.dead:
                    known.append(record)
                    if record.host is HostState.FILLING and not record.tiers & ~todo.dead:
                        other = self._promises.find(chain.namespace, span.hash, now.clock)
                    continue
                slot: Reservation | None = None
                try:
                    slot = self.reserve(span, record, todo.evicted, todo.keeps, now)
                finally:
                    if slot is None:
                        self._directory.forget(record)
                if slot is None:
                    self.stored(todo.gathers[before:], ok=False)
                    del todo.gathers[before:]
                    return False
                record.retention = record.retention.joined(chain.scope.retention)
                todo.gathers.append(slot)
        if other is not None and other is not todo.promise:
            todo.joined.append((span, other))
        if len(todo.gathers) > before:
            todo.first = todo.first or span
            todo.spans.append(span)
            assert todo.promise is not None
            todo.promise.zone = chain.zone(span)
            self._promises.add(todo.promise, span.hash)
        elif known and other is None:
            todo.skipped.append((span, tuple(known)))
        return True

    def _exactly(self, chain: ChunkChain, span: Span, dead: int) -> tuple[ObjectRecord, ...]:
        """What serves a span as exact KV: nobody needs an approximation of it."""
        record = self._matcher.record(_exact(chain), span)
        if record is None:
            return ()
        covers = self._directory.covers_of(record)
        found = tuple(each for cover in covers for each in cover or ())
        is_there = all(f.host is HostState.READY or f.tiers & ~dead for f in found)
        return found if is_there and None not in covers else ()

    def _supersede(self, chain: ChunkChain, span: Span) -> None:
        """Tails that the first newly stored span contains are the cheapest thing to lose."""
        for shorter in chain.tails(span.start // chain.chunk_step):
            record = self._matcher.record(chain, shorter)
            if record is not None and shorter.stop < span.stop:
                for found in record.objects:
                    self._host.demote(found)

    def reserve(
        self,
        span: Span,
        record: ObjectRecord,
        evicted: list[ObjectRecord],
        keeps: Keeps | None,
        now: Moment,
        *,
        spares: Keeps | None = None,
    ) -> Reservation | None:
        """A slot for an object; None: no room. Appends to ``evicted`` what had to make it."""
        if self.is_retired:
            return None
        nbytes = self._payload(record.part, span.tokens).nbytes
        record.chunk.span = span
        before = len(evicted)
        made = self._host.reserve(record, nbytes, evicted, now.wall, keeps=keeps, spares=spares)
        for gone in evicted[before:]:
            self._note_eviction(gone, now)
        if not made:
            return None
        piece = Piece(record.key, span.start, span.tokens, record.offset, nbytes)
        return Reservation(span, record, piece)

    def _note_eviction(self, gone: ObjectRecord, now: Moment) -> None:
        if gone.tiers:
            return  # still served from below
        detail = f"evicted from {self._tier} by {self._host.order.name}"
        self._holdings.lost(gone.key, Cause.EVICTED, 0, detail, now.wall)


def _is_exact(chain: ChunkChain) -> bool:
    """Whether a chain stores what the cache's epoch computes, and no approximation of it."""
    return chain.epoch is None or chain.namespace == chain.epoch.namespace


def _exact(chain: ChunkChain) -> ChunkChain:
    assert chain.epoch is not None
    return chain.named_in(chain.epoch.namespace)


def spans_to_store(chain: ChunkChain, first_token: int, *, tail: bool) -> list[Span]:
    """The full chunks of a prompt from ``first_token`` on, and its longest tail where wanted."""
    step = chain.chunk_step
    spans = [*map(chain.span, range(-(-first_token // step), len(chain)))]
    if tail and len(chain) * step >= first_token:
        spans += chain.tails(len(chain))[:1]
    return spans
