"""The suite of an object's frame: what is written is read back, and all else has a named cause.

What is driven is what the tiers themselves call: :mod:`kvlayer.tier.transfer.coding`, or with a
``codec`` :class:`~kvlayer.tier.transfer.encodings.Segments`. A subclass may put other functions of
the same signatures in place of ``encode`` and ``verify``, as ``write_object`` and ``read_object``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from xxhash import xxh3_64_intdigest

from kvlayer.abc.codec import Codec
from kvlayer.codec.frame import HEADER_NBYTES, FrameError, read_rows
from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.payload import Payload
from kvlayer.results import Cause
from kvlayer.testing.loan import Loan, noise
from kvlayer.testing.promise import Promise, broken, expect, promise, same_bytes
from kvlayer.testing.suite import Suite
from kvlayer.tier.transfer.coding import encode, verify, write_scratch
from kvlayer.tier.transfer.encodings import Segments

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
        self._coding = None if suite.codec is None else Segments(suite.codec)
        coding = self._coding
        nbytes = coding.frame_nbytes(payload) if coding else write_scratch(payload, copies=copies)
        scratch = bytearray(noise(1, nbytes))  # used before
        lent = (coding.frame if coding else suite.write_object)(
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

    @property
    def parts(self) -> list[slice]:
        """Where each segment's encoded bytes lie in the body; without a codec those of the payload.

        Ask before anything is damaged.
        """
        if self._coding is None:
            return [slice(s.offset, s.offset + s.nbytes) for s in self.payload.segments()]
        header = read_rows(
            memoryview(self.header),
            self.nbytes,
            name=ObjectName.made(self.key, self._coding.encoding),
            payload=self.payload,
            first_token=_FIRST,
        )
        return [slice(row.offset, row.offset + row.nbytes) for row in header.rows]

    def read(self) -> bytes:
        """The payload that is read back."""
        if self._coding is None:
            return bytes(self.body[: self.payload.body_nbytes])
        loan = Loan(self.payload.body_nbytes)
        self._unpack(self.key, self.payload, loan.regions()[0], self.nbytes, first_token=_FIRST)
        loan.guards_stand()
        return loan.content()

    def read_lent(self) -> tuple[Loan, Loan]:
        """Read it from memory that is lent for that alone, and say which."""
        if self._coding is not None:
            frame = Loan(self.nbytes, bytes(self.header + self.body))
            spare = Loan(self.payload.nbytes)
            self._coding.unpack(
                self.key,
                self.payload,
                frame.regions()[0],
                spare.regions()[0],
                first_token=_FIRST,
                filled=self.nbytes,
            )
            return frame, spare
        header, body = (
            Loan(HEADER_NBYTES, bytes(self.header)),
            Loan(self.payload.nbytes, bytes(self.body)),
        )
        self._suite.read_object(
            self.key,
            self.payload,
            header.regions()[0],
            body.regions(),
            self.nbytes,
            first_token=_FIRST,
        )
        return header, body

    def _unpack(
        self,
        key: ObjectKey,
        payload: Payload,
        spare: memoryview,
        filled: int,
        *,
        first_token: int,
    ) -> None:
        assert self._coding is not None
        frame = memoryview(self.header + self.body)
        self._coding.unpack(key, payload, frame, spare, first_token=first_token, filled=filled)

    def cause(self, filled: int | None = None, **other: Any) -> Cause | None:
        """Why it is refused; None when it is accepted."""
        wanted: dict[str, Any] = {
            "key": self.key,
            "payload": self.payload,
            "first_token": _FIRST,
            **other,
        }
        count = self.nbytes if filled is None else filled
        if self._coding is not None:
            spare = memoryview(bytearray(wanted["payload"].nbytes))
            try:
                first = wanted["first_token"]
                self._unpack(wanted["key"], wanted["payload"], spare, count, first_token=first)
            except FrameError as exc:
                return exc.cause
            return None
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
    """Runs on :mod:`kvlayer.tier.transfer.coding` as it is, or on objects that ``codec`` codes."""

    codec: ClassVar[Codec | None] = None
    """What its objects are coded with, instead of ``write_object`` and ``read_object``."""

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
        written, found = noise(2, frame.payload.nbytes), frame.read()
        for segment in frame.payload.segments():
            part = slice(segment.offset, segment.offset + segment.nbytes)
            same_bytes(found[part], written[part], f"segment {segment.layer}")

    @promise(
        "Reads the caller's memory and never writes it: where the payload ends inside a page, that "
        "page is made in ``scratch``. Header and padding are filled whole."
    )
    async def test_nothing_of_a_pages_former_content_is_written(self, frame: WrittenFrame) -> None:
        same_bytes(bytes(frame.memory), noise(2, frame.payload.nbytes), "the payload's memory")
        padding = frame.body[frame.parts[-1].stop :]
        same_bytes(bytes(padding), bytes(len(padding)), "what an object is padded with")
        header, before = bytes(frame.header), noise(1, HEADER_NBYTES)
        if any(header[at : at + 16] == before[at : at + 16] for at in range(HEADER_NBYTES - 15)):
            broken("the rest of the header to be zero", "what lay in the page before")

    @promise(
        "There are bytes at all: empty. All encoded bytes and their padding are there: truncated."
    )
    async def test_a_frame_cut_anywhere_is_refused(self, frame: WrittenFrame) -> None:
        expect(frame.cause(0), Cause.EMPTY, "the cause of an object of no bytes")
        starts = {HEADER_NBYTES + part.start for part in frame.parts}
        cuts = {1, 24, HEADER_NBYTES - 1, HEADER_NBYTES, frame.nbytes - 1, *starts}
        for cut in sorted(cuts - {frame.nbytes}):
            expect(frame.cause(cut), Cause.TRUNCATED, f"the cause of {cut} of {frame.nbytes} bytes")

    @promise("A segment verifies alone. Each segment's checksum: corrupt.")
    async def test_a_flipped_bit_of_the_payload_is_corrupt(self, frame: WrittenFrame) -> None:
        for part in frame.parts:
            for at in (part.start, (part.start + part.stop) // 2, part.stop - 1):
                for bit in (0x01, 0x80):
                    frame.body[at] ^= bit
                    expect(frame.cause(), Cause.CORRUPT, f"the cause of a flipped bit at {at}")
                    frame.body[at] ^= bit

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
        for loan in frame.read_lent():
            loan.guards_stand()
            loan.take_back()
