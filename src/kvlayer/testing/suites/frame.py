"""The suite of an object's frame: what is written is read back, and all else has a named cause.

What is driven is what the tiers themselves call: :mod:`kvlayer.tier.transfer.coding`. A subclass
may put other functions of the same signatures in place of its ``encode`` and ``verify``, as
``write_object`` and ``read_object``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from xxhash import xxh3_64_intdigest

from kvlayer.codec.frame import HEADER_NBYTES, FrameError
from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.testing.loan import Loan, noise
from kvlayer.testing.promise import Promise, broken, expect, promise, same_bytes
from kvlayer.testing.suite import Suite
from kvlayer.tier.transfer.coding import encode, verify, write_scratch

__all__ = ["FrameSuite", "WrittenFrame"]

_HASH = bytes(range(32))
_FIRST = 32


def _payloads() -> list[Payload]:
    """One segment and several, padded and exact, of every kind of attention."""
    mha = KVGroup(AttentionKind.MHA, tuple(range(3)), "float16", 2, 8)
    wide = KVGroup(AttentionKind.MHA, tuple(range(6)), "bfloat16", 4, 128)
    mla = KVGroup(AttentionKind.MLA, (0, 1), "bfloat16", head_size=72)
    state = KVGroup(AttentionKind.STATE, (0, 1), "float32", state_nbytes=3000)
    return [
        Payload.of(mha, Part(0, (0, 3), (0, 2)), 16),
        Payload.of(mha, Part(0, (1, 2), (1, 2)), 1),
        Payload.of(wide, Part(0, (0, 6), (0, 4)), 64),
        Payload.of(mla, Part(0, (0, 2), None), 7),
        Payload.of(state, Part(0, (0, 2), None), 16),
    ]


class WrittenFrame:
    """One object as a backend would hold it: header, payload, and what it is read back with.

    ``memory`` is what it was made from: a slot of the slab, which may be longer than the payload.
    """

    def __init__(self, suite: FrameSuite, payload: Payload, *, copies: bool) -> None:
        self._suite = suite
        self.payload = payload
        self.key = ObjectKey.of("ab" * 32, "0", _HASH, payload.tokens, payload.part)
        self.memory = bytearray(noise(2, payload.nbytes))
        scratch = bytearray(noise(1, write_scratch(payload, copies=copies)))  # used before
        lent = suite.write_object(
            self.key,
            payload,
            (memoryview(self.memory),),
            memoryview(scratch),
            copies=copies,
            first_token=_FIRST,
            created=1.5,
            build="kvlayer.testing",
        )
        stored = b"".join(lent)
        self.header = bytearray(stored[:HEADER_NBYTES])
        self.body = bytearray(stored[HEADER_NBYTES:])

    @property
    def nbytes(self) -> int:
        return len(self.header) + len(self.body)

    def cause(self, filled: int | None = None, **other: Any) -> Cause | None:
        """Why it is refused; None when it is accepted."""
        wanted = {"key": self.key, "payload": self.payload, "first_token": _FIRST, **other}
        count = self.nbytes if filled is None else filled
        try:
            self._suite.read_object(
                wanted["key"],
                wanted["payload"],
                memoryview(self.header),
                (memoryview(self.body),),
                count,
                first_token=wanted["first_token"],
            )
        except FrameError as exc:
            return exc.cause
        return None


class FrameSuite(Suite):
    """Runs on :mod:`kvlayer.tier.transfer.coding` as it is."""

    write_object: ClassVar[Callable[..., tuple[memoryview, ...]]] = staticmethod(encode)
    read_object: ClassVar[Callable[..., None]] = staticmethod(verify)

    async def keep(self, promise: Promise, /) -> None:
        for payload in _payloads():
            for copies in (False, True):
                await promise.check(self, WrittenFrame(self, payload, copies=copies))

    @promise("Afterwards the payload is exactly what was written under this key.")
    async def test_what_was_written_is_accepted_and_unchanged(self, frame: WrittenFrame) -> None:
        before = bytes(frame.body)
        expect(frame.cause(), None, "the cause by which an intact object is refused")
        same_bytes(bytes(frame.body), before, "a payload that was only looked at")
        written = noise(2, frame.payload.nbytes)
        for segment in frame.payload.segments():
            part = slice(segment.offset, segment.offset + segment.nbytes)
            same_bytes(frame.body[part], written[part], f"segment {segment.layer}")

    @promise(
        "Reads the caller's memory and never writes it: where the payload ends inside a page, that "
        "page is made in ``scratch``. Header and padding are filled whole."
    )
    async def test_nothing_of_a_pages_former_content_is_written(self, frame: WrittenFrame) -> None:
        same_bytes(bytes(frame.memory), noise(2, frame.payload.nbytes), "the payload's memory")
        padding = frame.body[frame.payload.body_nbytes :]
        same_bytes(bytes(padding), bytes(len(padding)), "what an object is padded with")
        header, before = bytes(frame.header), noise(1, HEADER_NBYTES)
        if any(header[at : at + 16] == before[at : at + 16] for at in range(HEADER_NBYTES - 15)):
            broken("the rest of the header to be zero", "what lay in the page before")

    @promise(
        "There are bytes at all: empty. All encoded bytes and their padding are there: truncated."
    )
    async def test_a_frame_cut_anywhere_is_refused(self, frame: WrittenFrame) -> None:
        expect(frame.cause(0), Cause.EMPTY, "the cause of an object of no bytes")
        starts = {HEADER_NBYTES + segment.offset for segment in frame.payload.segments()}
        cuts = {1, 24, HEADER_NBYTES - 1, HEADER_NBYTES, frame.nbytes - 1, *starts}
        for cut in sorted(cuts - {frame.nbytes}):
            expect(frame.cause(cut), Cause.TRUNCATED, f"the cause of {cut} of {frame.nbytes} bytes")

    @promise("A segment verifies alone. Each segment's checksum: corrupt.")
    async def test_a_flipped_bit_of_the_payload_is_corrupt(self, frame: WrittenFrame) -> None:
        for segment in frame.payload.segments():
            for at in (0, segment.nbytes // 2, segment.nbytes - 1):
                for bit in (0x01, 0x80):
                    frame.body[segment.offset + at] ^= bit
                    expect(frame.cause(), Cause.CORRUPT, f"the cause of a flipped bit at {at}")
                    frame.body[segment.offset + at] ^= bit

    @promise("Magic, frame version, length, xxh3_64 of those and of the map.")
    async def test_a_flipped_bit_of_the_header_is_refused(self, frame: WrittenFrame) -> None:
        used = 24 + int.from_bytes(frame.header[12:16], "little")
        for at in {*range(12), *range(12, used, 7), used - 1}:
            frame.header[at] ^= 0x01
            cause = frame.cause()
            if cause is None or not cause.is_damage:
                broken(f"a cause of damage for a flipped bit in byte {at} of the header", cause)
            frame.header[at] ^= 0x01

    @promise("The frame version: foreign-version.")
    async def test_another_version_is_foreign(self, frame: WrittenFrame) -> None:
        frame.header[8] += 1
        length = int.from_bytes(frame.header[12:16], "little")
        checked = bytes(frame.header[:16] + frame.header[24 : 24 + length])
        frame.header[16:24] = xxh3_64_intdigest(checked).to_bytes(8, "little")
        expect(frame.cause(), Cause.FOREIGN_VERSION, "the cause of a frame of the next version")

    @promise(
        "The header repeats the full name. First and tokens are what was asked for: misplaced."
    )
    async def test_another_objects_frame_is_misplaced(self, frame: WrittenFrame) -> None:
        part, tokens = frame.payload.part, frame.payload.tokens
        for other in (
            ObjectKey.of("cd" * 32, "0", _HASH, tokens, part),
            ObjectKey.of("ab" * 32, "cd" * 16, _HASH, tokens, part),
            ObjectKey.of("ab" * 32, "0", bytes(32), tokens, part),
            ObjectKey.of("ab" * 32, "0", _HASH, tokens + 1, part),
        ):
            expect(frame.cause(key=other), Cause.MISPLACED, f"the cause under the key {other}")
        for first in (0, _FIRST + 1):
            cause = frame.cause(first_token=first)
            expect(cause, Cause.MISPLACED, f"the cause at the position {first}")

    @promise("Reading a header allocates a bounded amount whatever its bytes say.")
    async def test_noise_is_refused_and_never_an_error(self, frame: WrittenFrame) -> None:
        intact = bytes(frame.header)
        for seed in range(40):
            kept = (0, 8, 12, 16, 24)[seed % 5]  # a plausible beginning
            frame.header[:] = intact[:kept] + noise(100 + seed, HEADER_NBYTES - kept)
            cause = frame.cause()
            if cause is None or not cause.is_damage:
                broken("a cause of damage for a header of noise", cause)

    @promise("Header and object are whole pages, so direct I/O moves them without a copy.")
    async def test_it_keeps_no_view_of_what_it_was_given(self, frame: WrittenFrame) -> None:
        header, body = (
            Loan(HEADER_NBYTES, bytes(frame.header)),
            Loan(frame.payload.nbytes, bytes(frame.body)),
        )
        self.read_object(
            frame.key,
            frame.payload,
            header.regions()[0],
            body.regions(),
            frame.nbytes,
            first_token=_FIRST,
        )
        header.guards_stand()
        body.guards_stand()
        header.take_back()
        body.take_back()
