"""How an object that is not coded lies on a lower tier: regions of memory, and what is around them.

A header page and padding from the arena, the payload from the caller's
memory, wherever that lies, and nothing written outside of what was lent. What is said here of a
:class:`~kvlayer.tier.transfer.batch.Job` is done on the thread that moves or checks its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xxhash import xxh3_64, xxh3_64_intdigest

from kvlayer.codec.frame import HEADER_NBYTES, check_segment, pack_header, read_header
from kvlayer.identity.keys import ObjectKey
from kvlayer.payload import ALIGNMENT, Payload

__all__ = [
    "checksum",
    "copy_out",
    "cut",
    "encode",
    "frame_nbytes",
    "read_scratch",
    "verify",
    "write_scratch",
]


def frame_nbytes(payload: Payload) -> int:
    """Bytes of an object on a lower tier."""
    return HEADER_NBYTES + payload.nbytes


def write_scratch(payload: Payload, *, copies: bool) -> int:
    """Bytes of scratch that :meth:`encode` needs; ``copies``: the payload goes through it, too."""
    if copies:
        return frame_nbytes(payload)
    return HEADER_NBYTES + payload.nbytes - payload.body_nbytes // ALIGNMENT * ALIGNMENT


def read_scratch(payload: Payload, *, copies: bool) -> int:
    """Bytes of scratch that a read needs beside, or instead of, the caller's memory.

    The padding may go there, too: the caller's memory may end where the payload does.
    """
    if copies:
        return frame_nbytes(payload)
    return HEADER_NBYTES + (ALIGNMENT if payload.nbytes > payload.body_nbytes else 0)


def encode(
    key: ObjectKey,
    payload: Payload,
    regions: Sequence[memoryview],
    scratch: memoryview,
    *,
    copies: bool,
    first_token: int,
    created: float,
    build: str,
    parent: bytes = b"",
) -> tuple[memoryview, ...]:
    """The object as a tier stores it: regions of the caller's memory between pages of scratch.

    Reads the caller's memory and never writes it: where the payload ends inside a page, that page
    is made in ``scratch``. Header and padding are filled whole. With ``copies`` all of it is made
    there, and the caller's memory is not lent on.
    """
    header, pages = scratch[:HEADER_NBYTES], scratch[HEADER_NBYTES:]
    body = payload.body_nbytes
    whole = 0 if copies else body // ALIGNMENT * ALIGNMENT
    checksums = [checksum(cut(regions, s.offset, s.offset + s.nbytes)) for s in payload.segments()]
    lent = [header, *cut(regions, 0, whole)]
    if whole < payload.nbytes:
        tail = pages[: payload.nbytes - whole]
        _fill(tail, cut(regions, whole, body))
        lent.append(tail)
    pack_header(
        header,
        checksums,
        key=key,
        payload=payload,
        first_token=first_token,
        created=created,
        build=build,
        parent=parent,
    )
    return tuple(lent)


def verify(
    key: ObjectKey,
    payload: Payload,
    header: memoryview,
    regions: Sequence[memoryview],
    filled: int,
    *,
    first_token: int,
) -> None:
    """Raise ``FrameError`` unless ``filled`` bytes of header and payload are the object.

    Afterwards the payload is exactly what was written under this key.
    """
    written = read_header(header, filled, key=key, payload=payload, first_token=first_token)
    for segment, found in zip(payload.segments(), written, strict=True):
        parts = cut(regions, segment.offset, segment.offset + segment.nbytes)
        check_segment(segment, checksum(parts), found)


def copy_out(payload: Payload, body: memoryview, regions: Sequence[memoryview]) -> None:
    """Copy a verified payload from scratch into the caller's memory, padding left out."""
    at = 0
    for part in cut(regions, 0, payload.body_nbytes):
        part[:] = body[at : at + part.nbytes]
        at += part.nbytes


def cut(regions: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """Bytes ``start`` to ``stop`` of the regions' concatenation, as parts of them."""
    return list(_cut(regions, start, stop))


def _cut(regions: Sequence[memoryview], start: int, stop: int) -> Iterator[memoryview]:
    at = 0
    for region in regions:
        first, last = max(start - at, 0), min(stop - at, region.nbytes)
        if first < last:
            yield region[first:last]
        at += region.nbytes
        if at >= stop:
            return


def checksum(parts: Sequence[memoryview]) -> int:
    """Of the parts together, as a header's rows have it."""
    if len(parts) == 1:
        return xxh3_64_intdigest(parts[0])
    running = xxh3_64()
    for part in parts:
        running.update(part)
    return running.intdigest()


def _fill(page: memoryview, parts: Sequence[memoryview]) -> None:
    """The parts, then zeros: nothing that lay in the scratch before leaves the process."""
    at = 0
    for part in parts:
        page[at : at + part.nbytes] = part
        at += part.nbytes
    page[at:] = bytes(page.nbytes - at)
