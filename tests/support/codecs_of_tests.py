"""Codecs for tests: what they code is twice as long, shorter, or not coded."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import ClassVar
from unittest import mock

from kvlayer.abc.codec import Codec, Coded
from kvlayer.api import assembly
from kvlayer.payload import Payload, Segment
from kvlayer.tier.transfer.encodings import Coding, Segments

__all__ = ["DOUBLES", "FAILS", "SHRINKS", "coded"]


class Doubles(Codec):
    """Every byte twice."""

    name: ClassVar[str] = "twice"

    def bound(self, payload: Payload, segment: Segment, /) -> int:
        return 2 * segment.nbytes

    def encode(
        self, payload: Payload, segment: Segment, raw: Sequence[memoryview], into: memoryview, /
    ) -> Coded:
        content = b"".join(raw)
        into[::2] = content
        into[1::2] = content
        return Coded(len(into))

    def decode(
        self,
        payload: Payload,
        segment: Segment,
        coded: memoryview,
        meta_nbytes: int,
        into: Sequence[memoryview],
        /,
    ) -> None:
        if coded[::2].tobytes() != coded[1::2].tobytes() or len(coded) != 2 * segment.nbytes:
            raise ValueError("not every byte is there twice")
        _fill(into, coded[::2].tobytes())


class Shrinks(Codec):
    """Deflated, behind four bytes that say how long it was."""

    name: ClassVar[str] = "shrunk-1"

    def bound(self, payload: Payload, segment: Segment, /) -> int:
        return 4 + segment.nbytes + segment.nbytes // 100 + 64

    def encode(
        self, payload: Payload, segment: Segment, raw: Sequence[memoryview], into: memoryview, /
    ) -> Coded:
        shrunk = zlib.compress(b"".join(raw), 1)
        content = segment.nbytes.to_bytes(4, "little") + shrunk
        into[: len(content)] = content
        return Coded(len(content), 4)

    def decode(
        self,
        payload: Payload,
        segment: Segment,
        coded: memoryview,
        meta_nbytes: int,
        into: Sequence[memoryview],
        /,
    ) -> None:
        count = int.from_bytes(coded[:meta_nbytes], "little")
        try:
            content = zlib.decompress(coded[meta_nbytes:])
        except zlib.error as exc:
            raise ValueError(str(exc)) from None
        if meta_nbytes != 4 or not count == len(content) == segment.nbytes:
            raise ValueError(f"{len(content)} bytes of {count}")
        _fill(into, content)


class Fails(Doubles):
    """Codes nothing that begins with a zero, and can read nothing."""

    name: ClassVar[str] = "fails"

    def encode(
        self, payload: Payload, segment: Segment, raw: Sequence[memoryview], into: memoryview, /
    ) -> Coded:
        if not raw[0][0]:
            raise RuntimeError("it begins with a zero")
        return super().encode(payload, segment, raw, into)

    def decode(self, *_: object) -> None:
        raise ValueError("unheard of")


def _fill(into: Sequence[memoryview], content: bytes) -> None:
    at = 0
    for part in into:
        part[:] = content[at : at + part.nbytes]
        at += part.nbytes


DOUBLES, SHRINKS, FAILS = Segments(Doubles()), Segments(Shrinks()), Segments(Fails())


@contextmanager
def coded(*codings: Coding) -> Generator[None]:
    """Caches that open inside write the first to their lower tiers, and read all of them."""
    with mock.patch.object(assembly, "_codings", lambda tiers: [codings for _ in tiers]):
        yield
