"""Codecs for tests: what they code is twice as long, shorter, or not coded."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from kvlayer.abc.codec import Codec, Coded
from kvlayer.config.registry import CODECS
from kvlayer.payload import Payload, Segment
from kvlayer.tier.transfer.encodings import Segments

__all__ = ["DOUBLES", "FAILS", "GIVEN", "SHRINKS", "Doubles", "Shrinks", "install"]


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

GIVEN = CODECS.extended({"doubles": Doubles, "shrinks": Shrinks, "fails": Fails})
"""For caches that open in a test's own process."""


def install(site: Path) -> None:
    """Let processes that have ``site`` on their path find the codecs as they find anybody's."""
    info = site / "codecs_of_tests-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: codecs-of-tests\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvlayer.codecs]\n"
        "doubles = codecs_of_tests:Doubles\n"
        "shrinks = codecs_of_tests:Shrinks\n"
        "fails = codecs_of_tests:Fails\n"
    )
