"""What is where: the state of every object on every tier. Pure memory; no clock, no I/O, no locks.

Records are found by the hash at their end. The same end may close a whole chunk and a shorter span,
and the same tokens may have KV in several namespaces: those are as many records (``records``). Who
asks names the namespace, and is never given a record of another.

A span is *active* while any of its objects is in host memory, on its way there, or unknown to every
lower tier; all other spans *rest* in a :class:`~kvlayer.tier.planner.below.BelowTable`, where a
million of them cost the garbage collector nothing. Who asks for a span that rests is given a record
of it, the same one for as long as anybody holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from sys import intern
from weakref import WeakValueDictionary

from kvlayer.identity.keys import ObjectKey, Part, Span
from kvlayer.tier.planner import plan
from kvlayer.tier.planner.below import BelowTable, Known, SpanName
from kvlayer.tier.planner.copies import Copy, of_tier, with_copy
from kvlayer.tier.planner.records import ChunkRecord, HostState, ObjectRecord, Several
from kvlayer.tier.planner.strand import Held, Strand

__all__ = ["Directory"]

_MOST_BELOW = 4_000_000  # a gigabyte of them
_TRIES = 64  # spans that somebody holds which are passed over to find one to forget


class Directory:
    """All records, seen by a rank that needs ``needs`` (one part per group).

    Of what only lower tiers hold at most ``most_below`` objects are known: those used longest ago
    are forgotten first, and counted.
    """

    def __init__(self, needs: Sequence[Part], *, most_below: int = _MOST_BELOW) -> None:
        self.needs = tuple(needs)
        self._chunks: dict[bytes, ChunkRecord] = {}
        """By end hash; :attr:`ChunkRecord.other` leads to more with the same end."""
        self._count = 0
        """Spans that are active."""
        self._below = BelowTable()
        self._awake: WeakValueDictionary[SpanName, ChunkRecord] = WeakValueDictionary()
        """Records of spans that rest, while anybody holds them."""
        self._most_below = most_below
        self.forgotten = 0
        """Objects that lower tiers hold, and that had to be forgotten."""
        self._held: Counter[int] = Counter()
        self._held_nbytes: Counter[int] = Counter()

    def __len__(self) -> int:
        """Spans with at least one object."""
        return self._count + self._below.spans

    def held(self, tier: int) -> int:
        """Objects that a lower tier holds, as far as is known. Constant time: a scrape asks."""
        return self._held[tier]

    def held_nbytes(self, tier: int) -> int:
        """Bytes that those take there, encoded, as far as that is known. Constant time."""
        return self._held_nbytes[tier]

    def chunk(self, namespace: str, end_hash: bytes, tokens: int, zone: str) -> ChunkRecord | None:
        """The record of the span of ``tokens`` tokens that ends so."""
        record = self._active(namespace, end_hash, tokens, zone)
        if record is None and end_hash in self._below:
            record = self._wake((namespace, end_hash, tokens, zone))
        return record

    def _active(
        self, namespace: str, end_hash: bytes, tokens: int, zone: str
    ) -> ChunkRecord | None:
        record = self._chunks.get(end_hash)
        while record is not None and (
            record.tokens != tokens or record.zone != zone or record.namespace != namespace
        ):
            record = record.other
        return record

    def ending(self, namespace: str, end_hash: bytes) -> Iterator[ChunkRecord]:
        """Every span of a namespace known to end so."""
        return (found for found in self.every_ending(end_hash) if found.namespace == namespace)

    def active_ending(self, namespace: str, end_hash: bytes) -> Iterator[ChunkRecord]:
        """:meth:`ending`, of active spans only: no record is made."""
        record = self._chunks.get(end_hash)
        while record is not None:
            if record.namespace == namespace:
                yield record
            record = record.other

    def every_ending(self, end_hash: bytes) -> Iterator[ChunkRecord]:
        """Every span known to end so, in any namespace."""
        record = self._chunks.get(end_hash)
        while record is not None:
            yield record
            record = record.other
        for name in self._below.ending(end_hash):
            resting = self._wake(name)
            assert resting is not None
            yield resting

    def covers(
        self, namespace: str, end_hash: bytes, tokens: int, zone: str
    ) -> list[tuple[ObjectRecord, ...] | None]:
        """Per group, ready objects that together hold what this rank needs of the span."""
        record = self.chunk(namespace, end_hash, tokens, zone)
        return [None] * len(self.needs) if record is None else self.covers_of(record)

    def covers_of(self, record: ChunkRecord) -> list[tuple[ObjectRecord, ...] | None]:
        """:meth:`covers` of a record that is at hand."""
        if not isinstance(record, Several):
            return [self._cover(record, need) for need in self.needs]
        if record.covers is None:
            record.covers = [self._cover(record, need) for need in self.needs]
        return record.covers

    @staticmethod
    def _cover(record: ChunkRecord, need: Part) -> tuple[ObjectRecord, ...] | None:
        # Almost always there is one object and it is all that is needed: lookups live on this path.
        objects = record.objects
        for found in objects:
            if found.is_whole and found.part.group == need.group:
                if found.host is HostState.READY or (len(objects) == 1 and found.readable):
                    return (found,)
                break
        ready = sorted((o for o in objects if o.tier >= 0), key=lambda o: o.tier)
        by_part = {o.part: o for o in ready}
        chosen = plan.cover(need, by_part)
        return None if chosen is None else tuple(by_part[part] for part in chosen)

    def leading(
        self,
        namespace: str,
        hashes: Sequence[bytes],
        tokens: int,
        zone: str,
        within: range,
        *,
        most: int,
    ) -> tuple[list[Held], int, bool]:
        """What serves spans ``within``, as far as one object in host memory is enough.

        The quick way to what :meth:`covers` says. Objects that were leased together before come as
        a strand: equal hashes mean that all before is equal. Also returns up to which span, and
        whether it is because of ``most`` objects that it ended before the last; else more may be
        there in other ways.
        """
        found: list[Held] = []
        ready, known = HostState.READY, self._chunks.get
        at, stop = within.start, within.stop
        full = at + most
        while at < stop:
            record = known(hashes[at])
            while record is not None and record.namespace != namespace:
                record = record.other
            if (
                type(record) is not ObjectRecord
                or record.host is not ready
                or not record.is_whole
                or record.tokens != tokens
                or record.zone != zone
            ):
                break
            strand = record.strand
            if strand is None or strand.records[0] is not record:
                found.append(record)
                at += 1
            else:
                count = min(len(strand), stop - at)
                if strand.records[count - 1].hash != hashes[at + count - 1]:
                    count = _common(strand, hashes, at, stop)
                if found and at + count > full:
                    return found, at, True
                if count < len(strand):
                    strand, _ = strand.part(count)
                found.append(strand)
                at += count
            if at >= full:
                return found, at, at < stop
        return found, at, False

    def find(self, key: ObjectKey) -> ObjectRecord | None:
        """The record of an object."""
        namespace, zone, end_hash, tokens, part = key.fields()
        record = self.chunk(namespace, end_hash, tokens, zone)
        return None if record is None else _of_part(record, part)

    def ensure(self, namespace: str, span: Span, zone: str, part: Part) -> ObjectRecord:
        """The object's record, made if it is new."""
        return self._ensure((namespace, span.hash, span.tokens, zone), part)

    def note(self, key: ObjectKey, tier: int, copy: int = 0) -> None:
        """Record that a lower tier has an object, as its listing says; ``copy``: how."""
        namespace, zone, end_hash, tokens, part = key.fields()
        name = (namespace, end_hash, tokens, zone)
        if self._active(*name) is not None or name in self._awake:
            self.add_tier(self._ensure(name, part), tier, copy)
            return
        tiers = self._below.tiers(name, part)  # nobody has a record: none has to be made
        if not tiers:
            self._below.add(name, Known(part, 1 << tier, copies=with_copy(0, tier, copy)))
            self._count_copy(tier, 0, copy)
            self._forget_oldest()
        elif copy or not tiers >> tier & 1:
            self._count_copy(tier, self._below.hold(name, part, tier, copy), copy)
        self._held[tier] += not tiers >> tier & 1

    def _count_copy(self, tier: int, before: int, copy: int) -> None:
        """A copy was ``before`` and is another now, where anything is known of it."""
        if copy:
            self._held_nbytes[tier] += Copy.read(copy).nbytes - Copy.read(before).nbytes

    def _ensure(self, name: SpanName, part: Part) -> ObjectRecord:
        record = self.chunk(*name)
        found = None if record is None else _of_part(record, part)
        if found is not None:
            return found
        found = self._record(name, part)
        if record is None:
            found.other = self._chunks.get(found.hash)
            self._chunks[found.hash] = found
            self._count += 1
            return found
        self._rise(record)
        if isinstance(record, ObjectRecord):
            record = self._part_off(record)
        assert isinstance(record, Several)
        record.join(found)
        return found

    def _record(self, name: SpanName, part: Part) -> ObjectRecord:
        namespace, end_hash, tokens, zone = name
        return ObjectRecord(
            intern(namespace), end_hash, tokens, zone, part, is_whole=part in self.needs
        )

    def _part_off(self, alone: ObjectRecord) -> Several:
        """Give a span a record of its own, that its object was until now."""
        if alone.strand is not None:
            alone.strand.dissolve()
        record = Several(alone)
        record.other, alone.other = alone.other, None
        at = self._chunks[alone.hash]
        if at is alone:
            self._chunks[alone.hash] = record
            return record
        while at.other is not alone:
            assert at.other is not None
            at = at.other
        at.other = record
        return record

    def presume(
        self, namespace: str, span: Span, zone: str, part: Part, tiers: int
    ) -> ObjectRecord | None:
        """Presume that lower ``tiers``, which were not asked, hold an object while it is pinned.

        None where more is known of it. Whoever does not pin it calls :meth:`forget`.
        """
        found = self.ensure(namespace, span, zone, part)
        if found.is_ready or found.host is HostState.FILLING:
            return None
        found.presumed |= tiers
        found.chunk.span = span
        _stale(found)
        return found

    def deny(self, key: ObjectKey, tier: int) -> None:
        """A lower tier said that it does not hold an object: it is presumed there no more."""
        namespace, zone, end_hash, tokens, part = key.fields()
        record = self._active(namespace, end_hash, tokens, zone)
        found = None if record is None else _of_part(record, part)
        if found is not None and found.presumed >> tier & 1:
            found.presumed &= ~(1 << tier)
            _stale(found)

    # -- state changes ---------------------------------------------------------------------------

    def fill(self, found: ObjectRecord, offset: int, nbytes: int) -> None:
        """absent -> filling: bytes are on their way to ``offset``."""
        assert found.host is HostState.ABSENT, found.key
        self._rise(found.chunk)
        found.host, found.offset, found.nbytes = HostState.FILLING, offset, nbytes

    def ready(self, found: ObjectRecord) -> None:
        """filling -> ready: the bytes are there and verified."""
        assert found.host is HostState.FILLING, found.key
        found.host = HostState.READY
        found.drop_key()
        _stale(found)

    def drop_host(self, found: ObjectRecord) -> int:
        """filling or ready -> absent. Returns the slab offset that became free."""
        assert found.host is not HostState.ABSENT, found.key
        if found.strand is not None:
            found.strand.dissolve()
        offset, found.host, found.offset = found.offset, HostState.ABSENT, -1
        self._changed(found)
        return offset

    def add_tier(self, found: ObjectRecord, tier: int, copy: int = 0) -> None:
        """A lower tier holds the object; ``copy``: how, if that is known."""
        self._rise(found.chunk)
        if not found.tiers >> tier & 1:
            self._held[tier] += 1
        found.tiers |= 1 << tier
        if copy:
            self._count_copy(tier, of_tier(found.copies, tier), copy)
            found.copies = with_copy(found.copies, tier, copy)
        found.presumed = 0
        found.drop_key()
        _stale(found)
        self._rest(found.chunk)

    def drop_tier(self, found: ObjectRecord, tier: int) -> None:
        """A lower tier no longer holds the object."""
        self._rise(found.chunk)
        if found.tiers >> tier & 1:
            self._held[tier] -= 1
        self._held_nbytes[tier] -= Copy.read(of_tier(found.copies, tier)).nbytes
        found.copies = with_copy(found.copies, tier, 0)
        found.tiers &= ~(1 << tier)
        found.presumed &= ~(1 << tier)
        self._changed(found)

    def _changed(self, found: ObjectRecord) -> None:
        _stale(found)
        self.forget(found)

    def forget(self, found: ObjectRecord) -> None:
        """Drop a record nothing refers to any more."""
        record = found.chunk
        if not (found.is_ready or found.host is HostState.FILLING or found.pins or found.writing):
            if found in record.objects:
                self._rise(record)
                if isinstance(record, Several):
                    record.leave(found)
            found.presumed = 0
            if record is found or not record.objects:
                self._unlink(record)
                return
        self._rest(record)

    # -- rest ------------------------------------------------------------------------------------

    def _wake(self, name: SpanName) -> ChunkRecord | None:
        """The record of a span that rests, made if nobody has one."""
        record = self._awake.get(name)
        if record is not None:
            return record
        known = self._below.read(name)
        if not known:
            return None
        objects: list[ObjectRecord] = []
        for part, tiers, first_token, retention, copies in known:
            found = self._record(name, part)
            found.tiers, found.retention, found.copies = tiers, retention, copies
            if first_token is not None:
                found.start = first_token
            objects.append(found)
        record = objects[0]
        if len(objects) > 1:
            several = Several(objects[0])
            for found in objects[1:]:
                several.join(found)
                several.start = max(several.start, found.start)
            record = several
        record.is_resting = True
        self._awake[name] = record
        return record

    def _rise(self, record: ChunkRecord) -> None:
        """Something of a span changes: it is active until it may rest again."""
        if record.is_resting:
            record.is_resting = False
            name = _name(record)
            self._below.remove(name)
            self._awake.pop(name, None)
            record.other = self._chunks.get(record.hash)
            self._chunks[record.hash] = record
            self._count += 1

    def _rest(self, record: ChunkRecord) -> None:
        """Let a span rest if nothing but lower tiers has any of it."""
        for found in record.objects:
            if found.host is not HostState.ABSENT or not found.tiers or found.writing:
                return
        name = _name(record)
        if record.is_resting or self._active(*name) is not record:
            return  # what was forgotten and is known anew is another record's
        self._unlink(record)
        record.is_resting = True
        first_token = None if record.start < 0 else record.start
        for found in record.objects:
            known = Known(found.part, found.tiers, first_token, found.retention, found.copies)
            self._below.add(name, known)
        self._awake[name] = record
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Hold what rests to its bound. What somebody holds stays."""
        for _ in range(_TRIES):
            if self._below.objects <= self._most_below or (name := self._below.oldest()) is None:
                return
            known, record = self._below.read(name), self._awake.get(name)
            if record is not None:
                if any(found.pins for found in record.objects):
                    continue  # reading it made it the most recent
                for found in record.objects:
                    found.tiers = found.copies = 0
                    if isinstance(record, Several):
                        record.leave(found)
                record.is_resting = False
                del self._awake[name]
            self._below.remove(name)
            self.forgotten += len(known)
            for each in known:
                for tier in range(1, each.tiers.bit_length()):
                    self._held[tier] -= each.tiers >> tier & 1
                    self._held_nbytes[tier] -= Copy.read(of_tier(each.copies, tier)).nbytes

    def _unlink(self, record: ChunkRecord) -> None:
        """Take a record without objects out, if it is still in."""
        first = self._chunks.get(record.hash)
        before: ChunkRecord | None = None
        at = first
        while at is not None and at is not record:
            before, at = at, at.other
        if at is None:
            return
        self._count -= 1
        if before is not None:
            before.other = record.other
        elif record.other is not None:
            self._chunks[record.hash] = record.other
        else:
            del self._chunks[record.hash]

    def active_ends(self) -> list[bytes]:
        """The end hashes of active spans, in the order in which they became active."""
        return [*self._chunks]

    def ends(self) -> list[bytes]:
        """The end hashes of all spans; one of active spans and of others is there twice."""
        return [*self._chunks, *self._below.ends()]

    def chunks(self) -> list[ChunkRecord]:
        """Every span known now. Makes a record of each that rests."""
        ends = dict.fromkeys(self.ends())
        return [record for end_hash in ends for record in self.every_ending(end_hash)]

    def active(self) -> Iterator[ObjectRecord]:
        """The objects of active spans, all that are in host memory among them.

        In the order in which their ends became active. Do not change states while iterating.
        """
        for record in self._chunks.values():
            chunk: ChunkRecord | None = record
            while chunk is not None:
                yield from chunk.objects
                chunk = chunk.other

    def objects(self) -> Iterator[ObjectRecord]:
        """Every object's record. Do not change states while iterating."""
        for record in self.chunks():
            yield from record.objects


def _name(record: ChunkRecord) -> SpanName:
    return record.namespace, record.hash, record.tokens, record.zone


def _of_part(record: ChunkRecord, part: Part) -> ObjectRecord | None:
    for found in record.objects:
        if found.part is part or found.part == part:
            return found
    return None


def _stale(found: ObjectRecord) -> None:
    """What serves its span may be other objects now."""
    if isinstance(found.chunk, Several):
        found.chunk.covers = None


def _common(strand: Strand, hashes: Sequence[bytes], at: int, stop: int) -> int:
    """How many objects of a strand a prompt goes on with, of which it has the first."""
    few, many = 1, min(len(strand), stop - at)
    while many - few > 1:
        middle = (few + many) // 2
        if strand.records[middle - 1].hash == hashes[at + middle - 1]:
            few = middle
        else:
            many = middle
    return few
