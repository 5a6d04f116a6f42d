"""What is where: the state of every object on every tier. Pure memory; no clock, no I/O, no locks.

Records are found by the hash at their end; the same end may close a whole chunk and a shorter span,
which are two records. Tier 0 is the host; an object there is absent, being filled or ready, at one
slab offset. On a lower tier it is known to be there or not.

A span is *active* while any of its objects is in host memory, on its way there, or unknown to every
lower tier; all other spans *rest* in a :class:`~kvlayer.tier.below.BelowTable`, where a million of
them cost the garbage collector nothing. Who asks for a span that rests is given a record of it,
the same one for as long as anybody holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from enum import Enum
from weakref import WeakValueDictionary

from kvlayer.keys import ObjectKey, Part, Span
from kvlayer.retention import ORDINARY
from kvlayer.tier import plan
from kvlayer.tier.below import BelowTable, Known, SpanName

__all__ = ["ChunkRecord", "Directory", "Host", "ObjectRecord"]


class Host(Enum):
    """State of an object in host memory."""

    ABSENT = 0
    FILLING = 1
    READY = 2


class ObjectRecord:
    """One object: where it lies and who holds it. ``pins`` > 0 keeps it in host memory."""

    __slots__ = ("chunk", "held", "host", "is_whole", "key", "nbytes", "offset", "part", "pins",
                 "retention", "row", "tiers", "writing")  # fmt: skip

    def __init__(
        self, key: ObjectKey, part: Part, chunk: ChunkRecord, *, is_whole: bool = False
    ) -> None:
        self.key = key
        self.part = part
        self.chunk = chunk
        self.is_whole = is_whole
        """Whether it alone is all that this rank needs of its group."""
        self.host = Host.ABSENT
        self.offset = -1
        self.nbytes = 0
        self.retention = ORDINARY
        """The highest wish of the requests that stored it."""
        self.row = -1
        """In the order of eviction, once it is ready in host memory."""
        self.pins = 0
        self.held = 0
        """How many of the pins are a move's, which is no use of the object."""
        self.tiers = 0
        """Bit t: ready on tier t (t >= 1)."""
        self.writing = 0
        """Bit t: being written to tier t."""

    @property
    def is_ready(self) -> bool:
        """Whether the object can be served from somewhere."""
        return self.host is Host.READY or self.tiers != 0

    @property
    def tier(self) -> int:
        """The nearest tier it can be served from; -1 when there is none."""
        if self.host is Host.READY:
            return 0
        return (self.tiers & -self.tiers).bit_length() - 1


class ChunkRecord:
    """One span of tokens and its objects. ``covers`` caches, per group, what serves this rank.

    ``span``: where it stands in its prompts; known once any of its bytes were in host memory.
    """

    __slots__ = ("__weakref__", "covers", "hash", "is_resting", "objects", "other", "span",
                 "tokens", "zone")  # fmt: skip

    def __init__(
        self, end_hash: bytes, tokens: int, zone: str, other: ChunkRecord | None = None
    ) -> None:
        self.hash = end_hash
        self.tokens = tokens
        self.zone = zone
        self.other = other
        """The next record with the same end: another number of tokens, or a zone that somebody's
        listing made up. A hash tells the zone (see ``docs/object-format.md``), a listing may lie.
        """
        self.is_resting = False
        self.span: Span | None = None
        self.objects: dict[Part, ObjectRecord] = {}
        self.covers: list[tuple[ObjectRecord, ...] | None] | None = None


_MOST_BELOW = 4_000_000  # a gigabyte of them
_TRIES = 64  # spans that somebody holds which are passed over to find one to forget


class Directory:
    """All records of one namespace, seen by a rank that needs ``needs`` (one part per group).

    Of what only lower tiers hold at most ``most_below`` objects are known: those used longest ago
    are forgotten first, and counted.
    """

    def __init__(
        self, namespace: str, needs: Sequence[Part], *, most_below: int = _MOST_BELOW
    ) -> None:
        self.namespace = namespace
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

    def __len__(self) -> int:
        """Spans with at least one object."""
        return self._count + self._below.spans

    def held(self, tier: int) -> int:
        """Objects that a lower tier holds, as far as is known. Constant time: a scrape asks."""
        return self._held[tier]

    def chunk(self, end_hash: bytes, tokens: int, zone: str) -> ChunkRecord | None:
        """The record of the span of ``tokens`` tokens that ends so."""
        record = self._active(end_hash, tokens, zone)
        if record is None and end_hash in self._below:
            record = self._wake((end_hash, tokens, zone))
        return record

    def _active(self, end_hash: bytes, tokens: int, zone: str) -> ChunkRecord | None:
        record = self._chunks.get(end_hash)
        while record is not None and (record.tokens != tokens or record.zone != zone):
            record = record.other
        return record

    def ending(self, end_hash: bytes) -> Iterator[ChunkRecord]:
        """Every span known to end so."""
        record = self._chunks.get(end_hash)
        while record is not None:
            yield record
            record = record.other
        for name in self._below.ending(end_hash):
            resting = self._wake(name)
            assert resting is not None
            yield resting

    def covers(
        self, end_hash: bytes, tokens: int, zone: str
    ) -> list[tuple[ObjectRecord, ...] | None]:
        """Per group, ready objects that together hold what this rank needs of the span."""
        record = self.chunk(end_hash, tokens, zone)
        return [None] * len(self.needs) if record is None else self.covers_of(record)

    def covers_of(self, record: ChunkRecord) -> list[tuple[ObjectRecord, ...] | None]:
        """:meth:`covers` of a record that is at hand."""
        if record.covers is None:
            record.covers = [self._cover(record, need) for need in self.needs]
        return record.covers

    @staticmethod
    def _cover(record: ChunkRecord, need: Part) -> tuple[ObjectRecord, ...] | None:
        # Almost always there is one object and it is all that is needed: lookups live on this path.
        is_alone = len(record.objects) == 1
        for found in record.objects.values():
            if found.is_whole and found.part.group == need.group:
                if found.host is Host.READY or (is_alone and found.tiers):
                    return (found,)
                break
        ready = sorted((o for o in record.objects.values() if o.is_ready), key=lambda o: o.tier)
        by_part = {o.part: o for o in ready}
        chosen = plan.cover(need, by_part)
        return None if chosen is None else tuple(by_part[part] for part in chosen)

    def find(self, key: ObjectKey) -> ObjectRecord | None:
        """The record of an object; ``key`` is of this namespace."""
        zone, end_hash, tokens, part = key.fields()
        record = self.chunk(end_hash, tokens, zone)
        return None if record is None else record.objects.get(part)

    def ensure(self, span: Span, zone: str, part: Part) -> ObjectRecord:
        """The object's record, made if it is new."""
        return self._ensure(span.hash, span.tokens, zone, part, None)

    def note(self, key: ObjectKey, tier: int) -> None:
        """Record that a lower tier has an object, as its listing says."""
        zone, end_hash, tokens, part = key.fields()
        name = (end_hash, tokens, zone)
        if self._active(*name) is not None or name in self._awake:
            self.add_tier(self._ensure(end_hash, tokens, zone, part, key), tier)
            return
        tiers = self._below.tiers(name, part)  # nobody has a record: none has to be made
        if not tiers:
            self._below.add(name, Known(part, 1 << tier))
            self._forget_oldest()
        elif not tiers >> tier & 1:
            self._below.hold(name, part, tier)
        self._held[tier] += not tiers >> tier & 1

    def _ensure(
        self, end_hash: bytes, tokens: int, zone: str, part: Part, key: ObjectKey | None
    ) -> ObjectRecord:
        record = self.chunk(end_hash, tokens, zone)
        if record is None:
            other = self._chunks.get(end_hash)
            record = self._chunks[end_hash] = ChunkRecord(end_hash, tokens, zone, other)
            self._count += 1
        found = record.objects.get(part)
        if found is None:
            self._rise(record)
            key = key or ObjectKey.of(self.namespace, zone, end_hash, tokens, part)
            found = ObjectRecord(key, part, record, is_whole=part in self.needs)
            record.objects[part] = found
        return found

    # -- state changes ---------------------------------------------------------------------------

    def fill(self, found: ObjectRecord, offset: int, nbytes: int) -> None:
        """absent -> filling: bytes are on their way to ``offset``."""
        assert found.host is Host.ABSENT, found.key
        self._rise(found.chunk)
        found.host, found.offset, found.nbytes = Host.FILLING, offset, nbytes

    def ready(self, found: ObjectRecord) -> None:
        """filling -> ready: the bytes are there and verified."""
        assert found.host is Host.FILLING, found.key
        found.host = Host.READY
        is_all = found.is_whole and len(self.needs) == 1
        found.chunk.covers = [(found,)] if is_all else None  # or the first lookup would find out

    def drop_host(self, found: ObjectRecord) -> int:
        """filling or ready -> absent. Returns the slab offset that became free."""
        assert found.host is not Host.ABSENT, found.key
        offset, found.host, found.offset = found.offset, Host.ABSENT, -1
        self._changed(found)
        return offset

    def add_tier(self, found: ObjectRecord, tier: int) -> None:
        """A lower tier holds the object."""
        self._rise(found.chunk)
        if not found.tiers >> tier & 1:
            self._held[tier] += 1
        found.tiers |= 1 << tier
        found.chunk.covers = None
        self._rest(found.chunk)

    def drop_tier(self, found: ObjectRecord, tier: int) -> None:
        """A lower tier no longer holds the object."""
        self._rise(found.chunk)
        if found.tiers >> tier & 1:
            self._held[tier] -= 1
        found.tiers &= ~(1 << tier)
        self._changed(found)

    def _changed(self, found: ObjectRecord) -> None:
        found.chunk.covers = None
        self.forget(found)

    def forget(self, found: ObjectRecord) -> None:
        """Drop a record nothing refers to any more."""
        record = found.chunk
        if not (found.is_ready or found.host is Host.FILLING or found.pins or found.writing):
            if record.objects.get(found.part) is found:
                self._rise(record)
                del record.objects[found.part]
                record.covers = None
            if not record.objects:
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
        end_hash, tokens, zone = name
        record = ChunkRecord(end_hash, tokens, zone)
        record.is_resting = True
        for part, tiers, first_token, retention in known:
            key = ObjectKey.of(self.namespace, zone, end_hash, tokens, part)
            found = ObjectRecord(key, part, record, is_whole=part in self.needs)
            found.tiers, found.retention = tiers, retention
            record.objects[part] = found
            if first_token is not None:
                record.span = Span(first_token, first_token + tokens, end_hash)
        self._awake[name] = record
        return record

    def _rise(self, record: ChunkRecord) -> None:
        """Something of a span changes: it is active until it may rest again."""
        if record.is_resting:
            record.is_resting = False
            name = (record.hash, record.tokens, record.zone)
            self._below.remove(name)
            self._awake.pop(name, None)
            record.other = self._chunks.get(record.hash)
            self._chunks[record.hash] = record
            self._count += 1

    def _rest(self, record: ChunkRecord) -> None:
        """Let a span rest if nothing but lower tiers has any of it."""
        for found in record.objects.values():
            if found.host is not Host.ABSENT or not found.tiers or found.writing:
                return
        name = (record.hash, record.tokens, record.zone)
        if record.is_resting or self._active(*name) is not record:
            return  # what was forgotten and is known anew is another record's
        self._unlink(record)
        record.is_resting = True
        first_token = None if record.span is None else record.span.start
        for part, found in record.objects.items():
            self._below.add(name, Known(part, found.tiers, first_token, found.retention))
        self._awake[name] = record
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Hold what rests to its bound. What somebody holds stays."""
        for _ in range(_TRIES):
            if self._below.objects <= self._most_below or (name := self._below.oldest()) is None:
                return
            known, record = self._below.read(name), self._awake.get(name)
            if record is not None:
                if any(found.pins for found in record.objects.values()):
                    continue  # reading it made it the most recent
                for found in record.objects.values():
                    found.tiers = 0
                record.objects.clear()
                record.covers, record.is_resting = None, False
                del self._awake[name]
            self._below.remove(name)
            self.forgotten += len(known)
            for _, tiers, _, _ in known:
                for tier in range(tiers.bit_length()):
                    self._held[tier] -= tiers >> tier & 1

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

    def chunks(self) -> list[ChunkRecord]:
        """Every span known now. Makes a record of each that rests."""
        ends = dict.fromkeys([*self._chunks, *self._below.ends()])
        return [record for end_hash in ends for record in self.ending(end_hash)]

    def active(self) -> Iterator[ObjectRecord]:
        """The objects of active spans, all that are in host memory among them.

        In the order in which their ends became active. Do not change states while iterating.
        """
        for record in self._chunks.values():
            chunk: ChunkRecord | None = record
            while chunk is not None:
                yield from chunk.objects.values()
                chunk = chunk.other

    def objects(self) -> Iterator[ObjectRecord]:
        """Every object's record. Do not change states while iterating."""
        for record in self.chunks():
            yield from record.objects.values()
