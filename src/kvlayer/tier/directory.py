"""What is where: the state of every object on every tier. Pure memory; no clock, no I/O, no locks.

Records are found by the hash at their end; the same end may close a whole chunk and a shorter span,
which are two records. Tier 0 is the host; an object there is absent, being filled or ready, at one
slab offset. On a lower tier it is known to be there or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from enum import Enum

from kvlayer.keys import ObjectKey, Part, Span
from kvlayer.retention import ORDINARY
from kvlayer.tier import plan

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

    __slots__ = ("covers", "hash", "objects", "other", "span", "tokens", "zone")

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
        self.span: Span | None = None
        self.objects: dict[Part, ObjectRecord] = {}
        self.covers: list[tuple[ObjectRecord, ...] | None] | None = None


class Directory:
    """All records of one namespace, seen by a rank that needs ``needs`` (one part per group)."""

    def __init__(self, namespace: str, needs: Sequence[Part]) -> None:
        self.namespace = namespace
        self.needs = tuple(needs)
        self._chunks: dict[bytes, ChunkRecord] = {}
        """By end hash; :attr:`ChunkRecord.other` leads to more with the same end."""
        self._count = 0
        self._held: Counter[int] = Counter()

    def __len__(self) -> int:
        """Spans with at least one object."""
        return self._count

    def held(self, tier: int) -> int:
        """Objects that a lower tier holds, as far as is known. Constant time: a scrape asks."""
        return self._held[tier]

    def chunk(self, end_hash: bytes, tokens: int, zone: str) -> ChunkRecord | None:
        """The record of the span of ``tokens`` tokens that ends so."""
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

    def note(self, key: ObjectKey, tier: int) -> ObjectRecord:
        """Record that a lower tier has an object, as its listing says."""
        zone, end_hash, tokens, part = key.fields()
        found = self._ensure(end_hash, tokens, zone, part, key)
        self.add_tier(found, tier)
        return found

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
            key = key or ObjectKey.of(self.namespace, zone, end_hash, tokens, part)
            found = ObjectRecord(key, part, record, is_whole=part in self.needs)
            record.objects[part] = found
        return found

    # -- state changes ---------------------------------------------------------------------------

    def fill(self, found: ObjectRecord, offset: int, nbytes: int) -> None:
        """absent -> filling: bytes are on their way to ``offset``."""
        assert found.host is Host.ABSENT, found.key
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
        if not found.tiers >> tier & 1:
            self._held[tier] += 1
        found.tiers |= 1 << tier
        found.chunk.covers = None

    def drop_tier(self, found: ObjectRecord, tier: int) -> None:
        """A lower tier no longer holds the object."""
        if found.tiers >> tier & 1:
            self._held[tier] -= 1
        found.tiers &= ~(1 << tier)
        self._changed(found)

    def _changed(self, found: ObjectRecord) -> None:
        found.chunk.covers = None
        self.forget(found)

    def forget(self, found: ObjectRecord) -> None:
        """Drop a record nothing refers to any more."""
        if found.is_ready or found.host is Host.FILLING or found.pins or found.writing:
            return
        record = found.chunk
        if record.objects.get(found.part) is found:
            del record.objects[found.part]
        if not record.objects:
            self._unlink(record)

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
        """Every span known now, in the order their ends became known."""
        return [record for end_hash in self._chunks for record in self.ending(end_hash)]

    def objects(self) -> Iterator[ObjectRecord]:
        """Every object's record, in the same order. Do not change states while iterating."""
        for end_hash in self._chunks:
            for record in self.ending(end_hash):
                yield from record.objects.values()
