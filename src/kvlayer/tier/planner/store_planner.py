"""Plans what stores and loads put into host memory, and gives it up again. Pure.

The caller brings the time, and holds the planner's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvlayer._steps import FEW, SLICE, Steps, used_up
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
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.store_plan import Keeps, Reservation, StorePlan

__all__ = ["StorePlanner", "spans_to_store"]

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

    def begin(self, todo: StorePlan, now: Moment, *, spared: int) -> Steps[None]:
        """Begin a plan. What host memory has of the prompt is held, but for what ``spared`` tiers
        have (bit t: tier t). :meth:`gathered` must be called.
        """
        until = now.clock + _BELIEVED_SECONDS
        todo.promise = self._promises.make(todo.chain.namespace, holder="store", until=until)
        chains = [todo.chain] if _is_exact(todo.chain) else [_exact(todo.chain), todo.chain]
        for chunks in (chunks for each in chains for chunks in self._matcher.leading(each)):
            records = [found for chunk in chunks for found in chunk.objects]
            ready = [r for r in records if r.host is HostState.READY and not r.tiers & spared]
            self._host.hold(ready)
            todo.held += ready
            if len(todo.chain) > FEW:
                yield

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
        if todo.is_planned and todo.first is not None:
            self._supersede(todo.chain, todo.first)

    def gathered(self, todo: StorePlan, lost: Sequence[Reservation]) -> None:
        """What was planned so far is gathered: serve what was kept, give back what was ``lost``."""
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

    def settling(self, chain: ChunkChain, slots: list[Reservation]) -> Steps[list[ObjectRecord]]:
        """See ``Planner.settling``."""
        last = slots[-1].record.chunk if slots else None  # it may be a tail
        for some in used_up(slots):
            self._host.let_go([slot.record for slot in some])
            yield
        is_long = len(chain) > FEW
        path: list[ObjectRecord] = []
        for chunks in self._matcher.leading(chain):
            path += [found for chunk in chunks for found in chunk.objects]
            if last in chunks:
                last = None
            if is_long:
                yield
        if last is not None:
            path += last.objects
        for stop in range(len(path), 0, -SLICE):  # its root is the most recent then
            self._host.refresh(path[max(stop - SLICE, 0) : stop], chain.scope.retention)
            if is_long:
                yield
        if self._host.dead_ends is not None:
            self._host.dead_ends.stored(path)
        at, goes_on = 0, self._matcher.is_plain
        while goes_on:
            first, at, goes_on = self._matcher.first(chain, at, len(chain), FEW)
            self._host.string(first)
            if goes_on:
                yield
        return path

    def _plan_span(self, span: Span, todo: StorePlan, now: Moment) -> bool:
        chain = todo.chain
        if not _is_exact(chain) and (there := self._exactly(span, todo)):
            todo.skipped.append((span, there))
            return True
        known: list[ObjectRecord] = []
        other: Promise | None = None
        before = len(todo.gathers)
        for g, cut in enumerate(self._cuts):
            if self._groups[g].hit_rule is not HitRule.EVERY_CHUNK and not todo.holds(g, span):
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
            self._promises.add(todo.promise, span.hash, chain.zone(span))
        elif known and other is None:
            todo.skipped.append((span, tuple(known)))
        return True

    def _exactly(self, span: Span, todo: StorePlan) -> tuple[ObjectRecord, ...]:
        """What serves a span as exact KV, where that is all that the engine has of it.

        Nobody needs an approximation of it then.
        """
        record = self._matcher.record(_exact(todo.chain), span)
        if record is None:
            return ()
        covers = [
            cover
            for g, cover in enumerate(self._directory.covers_of(record))
            if self._groups[g].hit_rule is HitRule.EVERY_CHUNK or todo.holds(g, span)
        ]
        found = tuple(each for cover in covers for each in cover or ())
        is_there = all(f.host is HostState.READY or f.tiers & ~todo.dead for f in found)
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


def spans_to_store(chain: ChunkChain, first_token: int, *, tail: bool) -> Iterator[Sequence[Span]]:
    """The full chunks of a prompt from ``first_token`` on, and its longest tail where wanted.

    In slices.
    """
    step, count = chain.chunk_step, len(chain)
    for at in range(-(-first_token // step), count, SLICE):
        yield chain.spans(min(at + SLICE, count), at)
    if tail and count * step >= first_token:
        yield chain.tails(count)[:1]
