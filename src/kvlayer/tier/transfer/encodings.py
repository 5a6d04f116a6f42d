"""The encodings of a tier: how an object lies there, as it is or coded segment by segment.

A tier writes one encoding and reads at most one other: what it holds from before it was given a
codec. :class:`Raw` lends the caller's memory as it is; :class:`Segments` codes into scratch, back
to back, and pads the object once. Called on the threads that move or check bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from operator import index
from typing import TYPE_CHECKING

from kvlayer.abc.codec import Codec
from kvlayer.codec.frame import (
    HEADER_NBYTES,
    VERSION,
    FrameError,
    Row,
    check_segment,
    pack_rows,
    read_rows,
)
from kvlayer.identity.keys import RAW, Encoding, ObjectKey, ObjectName
from kvlayer.payload import Payload, Segment, align
from kvlayer.results import Cause
from kvlayer.runtime.foreign import contained
from kvlayer.tier.transfer import coding
from kvlayer.tier.transfer.checks import CODED_AT_ONCE, RAW_AT_ONCE

if TYPE_CHECKING:
    from kvlayer.tier.transfer.batch import Job

__all__ = ["Raw", "Segments", "Coding"]


class Coding(ABC):
    """One encoding: what a job needs of scratch, lends to the backend, and makes of what comes."""

    encoding: Encoding
    at_once: int = CODED_AT_ONCE
    """So many bytes are coded, or verified, sooner than a thread is woken for it."""

    @abstractmethod
    def write_scratch(self, payload: Payload, *, copies: bool) -> int:
        """Bytes of scratch that :meth:`encode` needs."""

    @abstractmethod
    def frame(
        self,
        key: ObjectKey,
        payload: Payload,
        regions: Sequence[memoryview],
        scratch: memoryview,
        *,
        copies: bool = False,
        first_token: int,
        created: float,
        build: str,
        parent: bytes = b"",
    ) -> tuple[memoryview, ...]:
        """An object as the tier stores it, from the regions of its payload, which are only read."""

    def encode(self, job: Job, *, created: float, build: str) -> tuple[memoryview, ...]:
        """The object of a job as the tier stores it."""
        assert job.scratch is not None
        return self.frame(
            job.key,
            job.payload,
            job.regions,
            job.scratch,
            copies=job.copies,
            first_token=job.first_token,
            created=created,
            build=build,
            parent=job.parent,
        )

    @abstractmethod
    def read_scratch(self, payload: Payload, *, copies: bool) -> int:
        """Bytes of scratch that a read needs."""

    @abstractmethod
    def into(self, job: Job) -> tuple[memoryview, ...]:
        """What a read is lent."""

    @abstractmethod
    def frame_nbytes(self, payload: Payload) -> int:
        """The most that an object is on the tier, in bytes."""

    @abstractmethod
    def check(
        self, key: ObjectKey, payload: Payload, first_token: int, frame: memoryview, filled: int
    ) -> int:
        """Verify ``filled`` bytes of a frame without decoding it; its length.

        Raises ``FrameError``.
        """

    @abstractmethod
    def unpack(
        self,
        key: ObjectKey,
        payload: Payload,
        frame: memoryview,
        spare: memoryview,
        *,
        first_token: int,
        filled: int,
    ) -> memoryview:
        """Verify ``filled`` bytes of a frame; its payload, which lies in it or in ``spare`` then.

        Raises ``FrameError``.
        """

    @abstractmethod
    def deliver(self, job: Job, filled: int) -> None:
        """Verify what arrived and leave the payload in the caller's memory.

        Raises ``FrameError``, by when that memory may hold anything: what arrived is read into it
        before it is verified, and segments that can be decoded lie there beside one that cannot.
        """


class Raw(Coding):
    """The payload as it lies in host memory."""

    encoding = RAW
    at_once = RAW_AT_ONCE

    def write_scratch(self, payload: Payload, *, copies: bool) -> int:
        return coding.write_scratch(payload, copies=copies)

    def frame(
        self,
        key: ObjectKey,
        payload: Payload,
        regions: Sequence[memoryview],
        scratch: memoryview,
        *,
        copies: bool = False,
        first_token: int,
        created: float,
        build: str,
        parent: bytes = b"",
    ) -> tuple[memoryview, ...]:
        return coding.encode(
            key,
            payload,
            regions,
            scratch,
            copies=copies,
            first_token=first_token,
            created=created,
            build=build,
            parent=parent,
        )

    def read_scratch(self, payload: Payload, *, copies: bool) -> int:
        return coding.read_scratch(payload, copies=copies)

    def into(self, job: Job) -> tuple[memoryview, ...]:
        memory, nbytes = job.scratch, coding.frame_nbytes(job.payload)
        assert memory is not None
        if job.copies:
            return (memory[:nbytes],)
        lent = [memory[:HEADER_NBYTES], *(region[:] for region in job.regions)]
        padding = nbytes - sum(view.nbytes for view in lent)
        if padding:
            lent.append(memory[HEADER_NBYTES : HEADER_NBYTES + padding])
        return tuple(lent)

    def frame_nbytes(self, payload: Payload) -> int:
        return coding.frame_nbytes(payload)

    def check(
        self, key: ObjectKey, payload: Payload, first_token: int, frame: memoryview, filled: int
    ) -> int:
        nbytes = coding.frame_nbytes(payload)
        header, body = frame[:HEADER_NBYTES], (frame[HEADER_NBYTES:nbytes],)
        coding.verify(key, payload, header, body, filled, first_token=first_token)
        return nbytes

    def unpack(
        self,
        key: ObjectKey,
        payload: Payload,
        frame: memoryview,
        spare: memoryview,
        *,
        first_token: int,
        filled: int,
    ) -> memoryview:
        self.check(key, payload, first_token, frame, filled)
        return frame[HEADER_NBYTES : HEADER_NBYTES + payload.body_nbytes]

    def deliver(self, job: Job, filled: int) -> None:
        memory = job.scratch
        assert memory is not None
        body = (memory[HEADER_NBYTES : coding.frame_nbytes(job.payload)],)
        coding.verify(
            job.key,
            job.payload,
            memory[:HEADER_NBYTES],
            body if job.copies else job.lent[1:],
            filled,
            first_token=job.first_token,
        )
        if job.copies:
            with job.delivering() as may:
                if may:
                    coding.copy_out(job.payload, body[0], job.regions)


class Segments(Coding):
    """Coded segment by segment, in scratch. ``codec`` is called once for each.

    What it raises is an ``Exception`` here, ``KeyboardInterrupt`` excepted: it is called on the
    loop, too.
    """

    def __init__(self, codec: Codec) -> None:
        self.encoding = Encoding(VERSION, codec.name)
        self._codec = codec

    def write_scratch(self, payload: Payload, *, copies: bool) -> int:
        return self.frame_nbytes(payload)

    def read_scratch(self, payload: Payload, *, copies: bool) -> int:
        return self.frame_nbytes(payload)

    def frame_nbytes(self, payload: Payload) -> int:
        bounds = (self._bound(payload, segment) for segment in payload.segments())
        return HEADER_NBYTES + align(sum(bounds))

    def _bound(self, payload: Payload, segment: Segment) -> int:
        return contained(partial(self._codec.bound, payload, segment))

    def frame(
        self,
        key: ObjectKey,
        payload: Payload,
        regions: Sequence[memoryview],
        scratch: memoryview,
        *,
        copies: bool = False,
        first_token: int,
        created: float,
        build: str,
        parent: bytes = b"",
    ) -> tuple[memoryview, ...]:
        memory, rows = scratch, list[Row]()
        at = HEADER_NBYTES
        for segment in payload.segments():
            lent = coding.cut(regions, segment.offset, segment.offset + segment.nbytes)
            raw = [region.toreadonly() for region in lent]
            room = memory[at : at + self._bound(payload, segment)]
            coded = contained(partial(self._codec.encode, payload, segment, raw, room))
            nbytes, meta_nbytes = int(index(coded.nbytes)), int(index(coded.meta_nbytes))
            if not 0 < nbytes <= room.nbytes or not 0 <= meta_nbytes <= nbytes:
                raise ValueError(f"{self._codec.name}: {coded} of at most {room.nbytes} bytes")
            checksum = coding.checksum((memory[at : at + nbytes],))
            where = segment.layer, segment.num_layers, at - HEADER_NBYTES, segment.nbytes
            rows.append(Row(*where, nbytes, checksum, meta_nbytes))
            at += nbytes
        end = align(at)
        memory[at:end] = bytes(end - at)  # what lay there before is nobody's business
        pack_rows(
            memory[:HEADER_NBYTES],
            rows,
            name=ObjectName.made(key, self.encoding),
            first_token=first_token,
            created=created,
            build=build,
            parent=parent,
        )
        return (memory[:end],)

    def into(self, job: Job) -> tuple[memoryview, ...]:
        assert job.scratch is not None
        return (job.scratch[: self.frame_nbytes(job.payload)],)  # the object may end before

    def check(
        self, key: ObjectKey, payload: Payload, first_token: int, frame: memoryview, filled: int
    ) -> int:
        rows = self._rows(key, payload, first_token, frame, filled)
        return HEADER_NBYTES + align(rows[-1].offset + rows[-1].nbytes)

    def _rows(
        self, key: ObjectKey, payload: Payload, first_token: int, frame: memoryview, filled: int
    ) -> tuple[Row, ...]:
        """The segments of a frame, whose checksums are right."""
        header = read_rows(
            frame[:HEADER_NBYTES],
            min(filled, frame.nbytes),
            name=ObjectName.made(key, self.encoding),
            payload=payload,
            first_token=first_token,
        )
        for row in header.rows:
            check_segment(row, coding.checksum((_part(frame, row),)), row.checksum)
        return header.rows

    def deliver(self, job: Job, filled: int) -> None:
        payload, memory = job.payload, job.scratch
        assert memory is not None
        rows = self._rows(job.key, payload, job.first_token, memory, filled)
        with job.delivering() as may:
            if not may:
                return
            self._decode(payload, memory, rows, job.regions)

    def unpack(
        self,
        key: ObjectKey,
        payload: Payload,
        frame: memoryview,
        spare: memoryview,
        *,
        first_token: int,
        filled: int,
    ) -> memoryview:
        rows = self._rows(key, payload, first_token, frame, filled)
        body = spare[: payload.body_nbytes]
        self._decode(payload, frame, rows, (body,))
        return body

    def _decode(
        self,
        payload: Payload,
        frame: memoryview,
        rows: Sequence[Row],
        regions: Sequence[memoryview],
    ) -> None:
        for segment, row in zip(payload.segments(), rows, strict=True):
            into = coding.cut(regions, segment.offset, segment.offset + segment.nbytes)
            coded = _part(frame, row)
            contained(partial(self._filled, payload, segment, coded, row.meta_nbytes, into))

    def _filled(
        self,
        payload: Payload,
        segment: Segment,
        coded: memoryview,
        meta_nbytes: int,
        into: Sequence[memoryview],
    ) -> None:
        try:
            self._codec.decode(payload, segment, coded, meta_nbytes, into)
        except ValueError as exc:
            raise FrameError(Cause.CORRUPT, f"{self._codec.name}: {exc}") from None


def _part(frame: memoryview, row: Row) -> memoryview:
    start = HEADER_NBYTES + row.offset
    return frame[start : start + row.nbytes]
