"""The frame: a 4 KiB header that names and checks an object, then its segments.

::

    0      8        10       12        16          24
    magic  version  0        length    xxh3_64     msgpack map, zeros to 4096
    then the segments' encoded bytes, back to back; zeros to the next 4 KiB

All integers are little-endian. Every version of the frame keeps these first 24 bytes: the checksum
covers those before it and the map. A segment verifies alone. Pure: reads and writes memory, never
files, and never the payload's.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xxhash import xxh3_64

from kvlayer._pack import as_list, as_map, is_count, pack, unpack
from kvlayer.identity.keys import RAW, ObjectKey, ObjectName
from kvlayer.payload import ALIGNMENT, Payload, Segment, align
from kvlayer.results import Cause

__all__ = [
    "HEADER_NBYTES",
    "VERSION",
    "FrameError",
    "Header",
    "Row",
    "check_segment",
    "contradicts_header",
    "pack_header",
    "pack_rows",
    "parent_of",
    "read_header",
    "read_rows",
    "stands_for",
]

HEADER_NBYTES = ALIGNMENT
MAGIC = b"KVLFRAME"
VERSION = RAW.frame

_PREFIX = struct.Struct("<8sHHI")
_CHECKSUM = struct.Struct("<Q")
_MAP_AT = _PREFIX.size + _CHECKSUM.size
_ROPE = "absolute"  # K is stored rotated for the positions it was computed at
_HASH_NBYTES = 32
_MAX_TABLE = 64  # segments of an object


class FrameError(Exception):
    """These bytes are not the object that was asked for. ``cause`` says in which way."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


class Row(NamedTuple):
    """A segment as it is stored: ``nbytes`` encoded bytes, ``offset`` behind the header.

    The first ``meta_nbytes`` of the encoded bytes are the codec's own, to decode the rest with.
    ``checksum`` is xxh3_64 of all of them.
    """

    layer: int
    num_layers: int
    offset: int
    raw_nbytes: int
    nbytes: int
    checksum: int
    meta_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says. ``fields``: the whole map, those a codec or a seal added among them."""

    rows: tuple[Row, ...]
    fields: Mapping[str, object]

    @property
    def body_nbytes(self) -> int:
        """Encoded bytes behind the header, padding excluded."""
        return self.rows[-1].offset + self.rows[-1].nbytes


# -- any encoding ----------------------------------------------------------------------------------


def pack_rows(
    header: memoryview,
    rows: Sequence[Row],
    *,
    name: ObjectName,
    first_token: int | None,
    created: float,
    build: str,
    parent: bytes = b"",
    required: Mapping[str, object] | None = None,
) -> None:
    """Fill ``header`` (4 KiB) for segments that are stored as ``rows`` say, back to back.

    ``first_token`` is None where only the engine knows the position. ``parent``: the end hash (32
    bytes) of what comes right before the object, where anything does and it is known.
    ``required``: further entries of the map, such as a seal's table, without which nobody may read
    the object. Raises ``ValueError`` when it does not fit.
    """
    fields: dict[str, object] = {
        "name": str(name),
        "first": first_token,
        "tokens": name.key.tokens,
        "rope": _ROPE,
        "created": created,
        "build": build,
        "must": sorted(required or ()),
        "segments": rows,
        **({"parent": parent} if parent else {}),
        **(required or {}),
    }
    packed = pack(fields)
    end = _MAP_AT + len(packed)
    if end > HEADER_NBYTES:
        raise ValueError(f"a header of {end} bytes for {name} does not fit {HEADER_NBYTES}")
    prefix = _PREFIX.pack(MAGIC, VERSION, 0, len(packed))
    page = prefix + _CHECKSUM.pack(_checksum(prefix, packed)) + packed
    header[:] = page + bytes(HEADER_NBYTES - end)


def read_rows(
    header: memoryview,
    filled: int,
    *,
    name: ObjectName,
    payload: Payload,
    first_token: int | None,
    understood: Collection[str] = (),
) -> Header:
    """What the header of an object says, checked against what was asked for.

    ``filled`` bytes of header and body were read. ``understood``: entries of the map that the
    caller's codec or seal reads. Raises ``FrameError``. Afterwards each row is a segment of
    ``payload`` and all of the encoded bytes are there; what they hold is not looked at.
    """
    if filled == 0:
        raise FrameError(Cause.EMPTY, "the object has no bytes")
    if filled < HEADER_NBYTES:
        raise FrameError(Cause.TRUNCATED, f"{filled} bytes are less than a header")
    fields = _fields(header)
    if fields.get("name") != str(name):
        raise FrameError(Cause.MISPLACED, f"the header names {fields.get('name')!r}")
    _check_place(fields, payload, first_token)
    must = fields.get("must")
    if not _is_subset(must, understood) or fields.get("rope") != _ROPE:
        raise FrameError(
            Cause.FOREIGN_VERSION,
            f"it requires {must!r}, RoPE {fields.get('rope')!r}; this build reads "
            f"{sorted(understood)}, {_ROPE!r}",
        )
    rows = _table(fields.get("segments"))
    if not rows or [(r.layer, r.num_layers, r.raw_nbytes) for r in rows] != [
        (s.layer, s.num_layers, s.nbytes) for s in payload.segments()
    ]:
        raise FrameError(Cause.FOREIGN_VERSION, "segments are not cut as this build cuts them")
    found = Header(rows, fields)
    needed = HEADER_NBYTES + align(found.body_nbytes)
    if filled < needed:
        raise FrameError(Cause.TRUNCATED, f"{filled} of {needed} bytes are there")
    return found


def check_segment(segment: Segment | Row, found: int, written: int) -> None:
    """Raise ``FrameError`` unless the checksum that was ``found`` is the one that was written."""
    if found != written:
        last = segment.layer + segment.num_layers - 1
        raise FrameError(
            Cause.CORRUPT,
            f"checksum of layers {segment.layer}..{last} is {found:016x}, "
            f"written as {written:016x}",
        )


def contradicts_header(head: bytes | memoryview, nbytes: int) -> bool:
    """Whether an object of ``nbytes`` bytes that begins with ``head`` is not as long as it says.

    ``head`` are its first 4 KiB, or all of it. True for an object without bytes and for a header
    that is cut; False where ``head`` is no header that this build reads: then nobody can tell.
    """
    head = memoryview(head)[:HEADER_NBYTES]
    if nbytes < HEADER_NBYTES:
        return bytes(head[: len(MAGIC)]) == MAGIC[: len(head)]
    if len(head) < HEADER_NBYTES:
        return False
    try:
        fields = _fields(head)
    except FrameError:
        return False
    rows = _table(fields.get("segments"))
    return bool(rows) and nbytes != HEADER_NBYTES + align(Header(rows, fields).body_nbytes)


def stands_for(head: bytes | memoryview, written: bytes | memoryview) -> bool:
    """Whether ``head`` is a header of the object that ``written`` is the header of.

    Each is an object's first 4 KiB. False for zeros, garbage and another object's; True where
    nobody can tell: ``written`` is no header that this build reads, or ``head`` is a later one.
    """
    try:
        wanted = _fields(memoryview(written)[:HEADER_NBYTES])
    except FrameError:
        return True
    try:
        found = _fields(memoryview(head)[:HEADER_NBYTES])
    except FrameError as exc:
        return exc.cause is Cause.FOREIGN_VERSION
    return found.get("name") == wanted.get("name")


def parent_of(head: bytes | memoryview) -> bytes:
    """The end hash of what comes right before the object that ``head`` is the first 4 KiB of.

    Empty where nothing does, and where ``head`` is no header that says so.
    """
    try:
        parent = _fields(memoryview(head)[:HEADER_NBYTES]).get("parent")
    except FrameError:
        return b""
    return parent if isinstance(parent, bytes) and len(parent) == _HASH_NBYTES else b""


# -- raw: the encoded bytes are the payload --------------------------------------------------------


def pack_header(
    header: memoryview,
    checksums: Sequence[int],
    *,
    key: ObjectKey,
    payload: Payload,
    first_token: int | None,
    created: float,
    build: str,
    parent: bytes = b"",
) -> None:
    """Fill ``header`` (4 KiB) for a payload whose segments have these checksums."""
    segments = payload.segments()
    rows = [
        Row(*segment, segment.nbytes, checksum)
        for segment, checksum in zip(segments, checksums, strict=True)
    ]
    name = ObjectName.raw(key)
    pack_rows(
        header,
        rows,
        name=name,
        first_token=first_token,
        created=created,
        build=build,
        parent=parent,
    )


def read_header(
    header: memoryview,
    filled: int,
    *,
    key: ObjectKey,
    payload: Payload,
    first_token: int | None,
) -> list[int]:
    """The checksums of the segments, as they were written.

    Raises ``FrameError`` unless ``header`` is that of this object and all ``filled`` bytes of
    header and payload are there.
    """
    name = ObjectName.raw(key)
    found = read_rows(header, filled, name=name, payload=payload, first_token=first_token)
    if any(row.nbytes != row.raw_nbytes or row.meta_nbytes for row in found.rows):
        raise FrameError(Cause.FOREIGN_VERSION, "segments are not cut as this build cuts them")
    return [row.checksum for row in found.rows]


# -- the map ---------------------------------------------------------------------------------------


def _checksum(prefix: bytes, packed: bytes | memoryview) -> int:
    state = xxh3_64(prefix)
    state.update(packed)
    return state.intdigest()


def _fields(header: memoryview) -> dict[str, object]:
    """What a header's map holds. Raises ``FrameError``."""
    if len(header) < HEADER_NBYTES:
        raise FrameError(Cause.TRUNCATED, f"{len(header)} bytes are less than a header")
    prefix = bytes(header[: _PREFIX.size])
    magic, version, _, length = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise FrameError(Cause.CORRUPT, f"starts with {bytes(magic)!r}, not with {MAGIC!r}")
    packed = header[_MAP_AT : _MAP_AT + length]
    (written,) = _CHECKSUM.unpack_from(header, _PREFIX.size)
    if length > HEADER_NBYTES - _MAP_AT or _checksum(prefix, packed) != written:
        raise FrameError(Cause.CORRUPT, "the header's checksum does not match")
    if version != VERSION:
        raise FrameError(
            Cause.FOREIGN_VERSION, f"frame version {version}, this build reads {VERSION}"
        )
    try:
        fields = as_map(unpack(bytes(packed)))
    except ValueError as exc:
        raise FrameError(Cause.CORRUPT, f"the header cannot be read: {exc}") from None
    if fields is None:
        raise FrameError(Cause.CORRUPT, "the header is not a map")
    return fields


def _check_place(fields: Mapping[str, object], payload: Payload, first_token: int | None) -> None:
    """Raise ``FrameError`` unless the object stands where it was looked for.

    An object whose position nobody knows is for readers that do not know it either.
    """
    first, tokens = fields.get("first"), fields.get("tokens")
    if "first" in fields and (first is None) is not (first_token is None):
        raise FrameError(Cause.FOREIGN_VERSION, f"its position is {first}, asked for {first_token}")
    if (first, tokens) != (first_token, payload.tokens) or "first" not in fields:
        raise FrameError(
            Cause.MISPLACED,
            f"holds {tokens} tokens from {first}, expected {payload.tokens} from {first_token}",
        )


def _is_subset(must: object, understood: Collection[str]) -> bool:
    names = as_list(must)
    return names is not None and all(isinstance(n, str) and n in understood for n in names)


def _table(value: object) -> tuple[Row, ...]:
    """``value`` if it is a list of rows that lie back to back, else nothing."""
    rows: list[Row] = []
    end = 0
    for entry in (as_list(value) or [])[: _MAX_TABLE + 1]:
        cells = [cell for cell in as_list(entry) or [] if is_count(cell)]
        if len(cells) != len(as_list(entry) or []) or len(cells) != len(Row._fields):
            return ()
        row = Row(*cells)
        if row.offset != end or not row.nbytes > 0 or row.meta_nbytes > row.nbytes:
            return ()
        end += row.nbytes
        rows.append(row)
    return tuple(rows) if len(rows) <= _MAX_TABLE else ()
