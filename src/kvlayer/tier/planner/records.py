"""What the directory knows of a span and of its objects. Pure memory: nobody decides here.

Tier 0 is the host; an object there is absent, being filled or ready, at one slab offset. On a lower
tier it is known to be there or not.
"""

from __future__ import annotations

from enum import Enum

from kvlayer.identity.keys import ObjectKey, Part, Span
from kvlayer.retention import ORDINARY
from kvlayer.tier.planner.copies import Copy, of_tier
from kvlayer.tier.planner.strand import Strand

__all__ = ["ChunkRecord", "HostState", "ObjectRecord", "Several"]


class HostState(Enum):
    """State of an object in host memory."""

    ABSENT = 0
    FILLING = 1
    READY = 2


class ChunkRecord:
    """One span of tokens: an :class:`ObjectRecord`, or :class:`Several` of them."""

    __slots__ = ("__weakref__", "hash", "is_resting", "namespace", "other", "parent", "start",
                 "tokens", "zone")  # fmt: skip

    def __init__(self, namespace: str, end_hash: bytes, tokens: int, zone: str) -> None:
        self.namespace = namespace
        self.hash = end_hash
        self.tokens = tokens
        self.zone = zone
        self.start = -1
        """Where it stands in its prompts; known once any of its bytes were in host memory."""
        self.parent = b""
        """The end hash of what comes right before it, known as long."""
        self.other: ChunkRecord | None = None
        """The next record with the same end: another number of tokens, or a zone that somebody's
        listing made up. A hash tells the zone (see ``docs/object-format.md``), a listing may lie.
        """
        self.is_resting = False

    @property
    def objects(self) -> tuple[ObjectRecord, ...]:
        """What of it is known."""
        raise NotImplementedError

    @property
    def span(self) -> Span | None:
        """Where it stands in its prompts, if that is known."""
        if self.start < 0:
            return None
        return Span(self.start, self.start + self.tokens, self.hash, self.parent)

    @span.setter
    def span(self, span: Span) -> None:
        self.start, self.parent = span.start, span.parent


class ObjectRecord(ChunkRecord):
    """One object: where it lies and who holds it. ``pins`` > 0 keeps it in host memory.

    Nearly every span has one object, and there may be millions: then this is the span's record,
    too, so that the garbage collector has one thing to look at and a lookup one to read.
    """

    __slots__ = ("_key", "copies", "held", "host", "is_whole", "nbytes", "offset", "own",
                 "part", "presumed", "retention", "row", "several", "strand", "tiers",
                 "writing")  # fmt: skip

    def __init__(
        self,
        namespace: str,
        end_hash: bytes,
        tokens: int,
        zone: str,
        part: Part,
        *,
        is_whole: bool = False,
    ) -> None:
        super().__init__(namespace, end_hash, tokens, zone)
        self.part = part
        self.is_whole = is_whole
        """Whether it alone is all that this rank needs of its group."""
        self.several: Several | None = None
        self._key: ObjectKey | None = None
        self.host = HostState.ABSENT
        self.offset = -1
        self.nbytes = 0
        self.retention = ORDINARY
        """The highest wish of the requests that stored it."""
        self.row = -1
        """In the order of eviction, once it is ready in host memory."""
        self.own = 0
        """Pins, beside those that its strand has."""
        self.strand: Strand | None = None
        """What it is leased with, if anything: see :mod:`kvlayer.tier.planner.strand`."""
        self.held = 0
        """How many of the pins are a move's, which is no use of the object."""
        self.tiers = 0
        """Bit t: ready on tier t (t >= 1)."""
        self.copies = 0
        """How it lies there, as far as is known: see :mod:`kvlayer.tier.planner.copies`."""
        self.presumed = 0
        """Bit t: tier t was not asked about it, but may hold it. Only reads go by this."""
        self.writing = 0
        """Bit t: being written to tier t."""

    @property
    def pins(self) -> int:
        """How many hold it."""
        return self.own if self.strand is None else self.own + self.strand.leases

    @pins.setter
    def pins(self, pins: int) -> None:
        more = pins - self.pins
        self.own += more
        if self.strand is not None:
            self.strand.own += more

    @property
    def chunk(self) -> ChunkRecord:
        """The record of its span: itself where it is the only one."""
        return self if self.several is None else self.several

    @property
    def objects(self) -> tuple[ObjectRecord, ...]:
        return (self,)

    @property
    def key(self) -> ObjectKey:
        """Its name; remembered while it moves, see :meth:`drop_key`."""
        if self._key is None:
            self._key = ObjectKey.of(self.namespace, self.zone, self.hash, self.tokens, self.part)
        return self._key

    def drop_key(self) -> None:
        """It has moved: its name takes more memory than all else, and is computed again."""
        self._key = None

    def encoding(self, tier: int) -> int:
        """In which of a lower tier's encodings it lies there, from 1 on; 0: not known."""
        return Copy.read(of_tier(self.copies, tier)).encoding

    @property
    def is_ready(self) -> bool:
        """Whether the object can be served from somewhere."""
        return self.host is HostState.READY or self.tiers != 0

    @property
    def tier(self) -> int:
        """The nearest tier it can be served from; -1 when there is none."""
        if self.host is HostState.READY:
            return 0
        return (self.readable & -self.readable).bit_length() - 1

    @property
    def readable(self) -> int:
        """Bit t: worth reading from tier t, which holds it or is presumed to."""
        return self.tiers | self.presumed


class Several(ChunkRecord):
    """A span with several objects: parts of it, or what several KV groups have.

    ``covers`` caches, per group, what serves this rank.
    """

    __slots__ = ("covers", "parts")

    def __init__(self, first: ObjectRecord) -> None:
        super().__init__(first.namespace, first.hash, first.tokens, first.zone)
        self.start, self.parent = first.start, first.parent
        self.parts: tuple[ObjectRecord, ...] = ()
        self.covers: list[tuple[ObjectRecord, ...] | None] | None = None
        self.join(first)

    @property
    def objects(self) -> tuple[ObjectRecord, ...]:
        return self.parts

    def join(self, found: ObjectRecord) -> None:
        """One more object."""
        found.several = self
        self.parts = (*self.parts, found)
        self.covers = None

    def leave(self, found: ObjectRecord) -> None:
        """An object that is known no more."""
        self.parts = tuple(each for each in self.parts if each is not found)
        self.covers = None
