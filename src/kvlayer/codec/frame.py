"""The frame: a 4 KiB header that names and checks an object, then its payload.

::

    0      8        10       12        16          24
    magic  version  0        length    xxh3_64     msgpack map, zero padding to 4096
    then the payload: segments, each starting on a 4 KiB boundary

All integers are little-endian. The map holds the full object key, the first token's position, the
token count, the codec, the RoPE state of K, the time of creation, the writer's build, and a row
per segment: first layer, layers, offset in the payload, raw bytes, encoded bytes, xxh3_64 of the
encoded bytes. A segment verifies alone. Pure: reads and writes memory, never files.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from kvlayer._pack import as_list, as_map, pack, unpack
from kvlayer.keys import ObjectKey
from kvlayer.payload import ALIGNMENT, Payload, align
from kvlayer.results import Cause

__all__ = [
    "HEADER_NBYTES",
    "VERSION",
    "FrameError",
    "check_frame",
    "contradicts_header",
    "write_header",
]

HEADER_NBYTES = ALIGNMENT
MAGIC = b"KVLFRAME"
VERSION = 1

_PREFIX = struct.Struct("<8sHHIQ")
_RAW = "raw"
_ROPE = "absolute"  # K is stored rotated for the positions it was computed at


class FrameError(Exception):
    """These bytes are not the object that was asked for. ``cause`` says in which way."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


def write_header(
    header: memoryview,
    payload_bytes: memoryview,
    *,
    key: ObjectKey,
    payload: Payload,
    first_token: int,
    created: float,
    build: str,
) -> None:
    """Fill ``header`` (4 KiB) for the payload that lies in ``payload_bytes``.

    Reads all of the payload to checksum it and zeroes its padding, so that nothing of a slot's
    former content leaves the process.
    """
    rows: list[tuple[int, ...]] = []
    for segment in payload.segments():
        end = segment.offset + segment.nbytes
        padding = -segment.nbytes % ALIGNMENT
        payload_bytes[end : end + padding] = bytes(padding)
        checksum = xxh3_64_intdigest(payload_bytes[segment.offset : end])
        rows.append((*segment, segment.nbytes, checksum))
    body = pack(
        {
            "key": str(key),
            "first": first_token,
            "tokens": payload.tokens,
            "codec": _RAW,
            "rope": _ROPE,
            "created": created,
            "build": build,
            "segments": rows,
        }
    )
    if _PREFIX.size + len(body) > HEADER_NBYTES:
        raise ValueError(f"a header of {len(body)} bytes for {key} does not fit {HEADER_NBYTES}")
    _PREFIX.pack_into(header, 0, MAGIC, VERSION, 0, len(body), xxh3_64_intdigest(body))
    end = _PREFIX.size + len(body)
    header[_PREFIX.size : end] = body
    header[end:] = bytes(HEADER_NBYTES - end)


def check_frame(
    header: memoryview,
    payload_bytes: memoryview,
    filled: int,
    *,
    key: ObjectKey,
    payload: Payload,
    first_token: int,
) -> None:
    """Raise ``FrameError`` unless the first ``filled`` bytes of header and payload are the object.

    ``header`` is 4 KiB, ``payload_bytes`` at least ``payload.nbytes``. Afterwards the payload is
    exactly what was written under this key.
    """
    rows = _read_header(header, filled, key, payload, first_token)
    needed = HEADER_NBYTES + payload.nbytes
    if filled < needed:
        raise FrameError(Cause.TRUNCATED, f"{filled} of {needed} bytes are there")
    for segment, (*_, checksum) in zip(payload.segments(), rows, strict=True):
        found = xxh3_64_intdigest(payload_bytes[segment.offset : segment.offset + segment.nbytes])
        if found != checksum:
            last = segment.layer + segment.num_layers - 1
            raise FrameError(
                Cause.CORRUPT,
                f"checksum of layers {segment.layer}..{last} is {found:016x}, "
                f"written as {checksum:016x}",
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
        rows = _table(_fields(head).get("segments"))
    except FrameError:
        return False
    if not rows:
        return False
    _, _, offset, _, encoded, _ = rows[-1]
    return nbytes != HEADER_NBYTES + align(offset + encoded)


def _read_header(
    header: memoryview, filled: int, key: ObjectKey, payload: Payload, first_token: int
) -> Sequence[Sequence[int]]:
    if filled == 0:
        raise FrameError(Cause.EMPTY, "the object has no bytes")
    if filled < HEADER_NBYTES:
        raise FrameError(Cause.TRUNCATED, f"{filled} bytes are less than a header")
    fields = _fields(header)
    if fields.get("key") != str(key):
        raise FrameError(Cause.MISPLACED, f"the header names {fields.get('key')!r}")
    if (fields.get("first"), fields.get("tokens")) != (first_token, payload.tokens):
        raise FrameError(
            Cause.MISPLACED,
            f"holds {fields.get('tokens')} tokens from {fields.get('first')}, "
            f"expected {payload.tokens} from {first_token}",
        )
    if fields.get("codec") != _RAW or fields.get("rope") != _ROPE:
        raise FrameError(
            Cause.FOREIGN_VERSION,
            f"codec {fields.get('codec')!r}, RoPE {fields.get('rope')!r}; this build reads "
            f"{_RAW!r}, {_ROPE!r}",
        )
    rows = _table(fields.get("segments"))
    expected = [[*segment, segment.nbytes] for segment in payload.segments()]
    if rows is None or [row[:5] for row in rows] != expected:
        raise FrameError(Cause.FOREIGN_VERSION, "segments are not cut as this build cuts them")
    return rows


def _fields(header: memoryview) -> dict[str, object]:
    """What a header's map holds. Raises ``FrameError``."""
    magic, version, _, length, checksum = _PREFIX.unpack_from(header)
    if magic != MAGIC:
        raise FrameError(Cause.CORRUPT, f"starts with {bytes(magic)!r}, not with {MAGIC!r}")
    if version != VERSION:
        raise FrameError(
            Cause.FOREIGN_VERSION, f"frame version {version}, this build reads {VERSION}"
        )
    body = header[_PREFIX.size : _PREFIX.size + length]
    if length > HEADER_NBYTES - _PREFIX.size or xxh3_64_intdigest(body) != checksum:
        raise FrameError(Cause.CORRUPT, "the header's checksum does not match")
    return _unpack(body)


def _table(value: object) -> list[list[int]] | None:
    """``value`` if it is a list of rows of six integers, else None."""
    table: list[list[int]] = []
    for entry in as_list(value) or [None]:
        row = [cell for cell in as_list(entry) or [] if isinstance(cell, int)]
        if len(row) != len(as_list(entry) or []) or len(row) != 6:
            return None
        table.append(row)
    return table


def _unpack(body: memoryview) -> dict[str, object]:
    try:
        fields = as_map(unpack(bytes(body)))
    except ValueError as exc:
        raise FrameError(Cause.CORRUPT, f"the header cannot be read: {exc}") from None
    if fields is None:
        raise FrameError(Cause.CORRUPT, "the header is not a map")
    return fields
