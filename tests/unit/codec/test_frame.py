"""The frame: what was written is read back exactly, and every other byte has a named cause."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from kvlayer._pack import pack, unpack
from kvlayer.codec.frame import (
    HEADER_NBYTES,
    MAGIC,
    VERSION,
    FrameError,
    Row,
    contradicts_header,
    pack_header,
    pack_rows,
    parent_of,
    read_header,
    read_rows,
    stands_for,
)
from kvlayer.identity.keys import Encoding, ObjectKey, ObjectName, Part
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.payload import ALIGNMENT, Payload
from kvlayer.results import Cause
from kvlayer.tier.transfer.coding import encode, verify, write_scratch

NAMESPACE, CHUNK_HASH = "ab" * 32, bytes(range(32))


def make_key(payload: Payload, part: Part | None = None) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, "0", CHUNK_HASH, payload.tokens, part or payload.part)


def mha(layers: int, heads: int = 2, head_size: int = 8) -> KVGroup:
    return KVGroup(AttentionKind.MHA, tuple(range(layers)), "float16", heads, head_size)


def shape(layers: int = 3, tokens: int = 16, heads: int = 2, head_size: int = 8) -> Payload:
    return Payload.of(mha(layers, heads, head_size), Part(0, (0, layers), (0, heads)), tokens)


class Written:
    """One object as it lies in a file, and the arguments it is read back with."""

    def __init__(self, payload: Payload, *, first_token: int = 32, seed: int = 0) -> None:
        self.payload = payload
        self.key = make_key(payload)
        self.first_token = first_token
        scratch = write_scratch(payload, copies=False)
        slot = random.Random(seed).randbytes(payload.nbytes)  # stale bytes behind the payload
        lent = encode(
            self.key,
            payload,
            (memoryview(slot),),
            memoryview(bytearray(random.Random(seed + 1).randbytes(scratch))),  # used before
            copies=False,
            first_token=first_token,
            created=1.5,
            build="test",
        )
        stored = b"".join(lent)
        self.header = bytearray(stored[:HEADER_NBYTES])
        self.body = bytearray(stored[HEADER_NBYTES:])

    @property
    def nbytes(self) -> int:
        return len(self.header) + len(self.body)

    def check(self, filled: int | None = None, **other: Any) -> None:
        wanted: dict[str, Any] = {
            "key": self.key,
            "payload": self.payload,
            "first_token": self.first_token,
            **other,
        }
        count = self.nbytes if filled is None else filled
        key, payload, first_token = wanted["key"], wanted["payload"], wanted["first_token"]
        header, regions = memoryview(self.header), (memoryview(self.body),)
        verify(key, payload, header, regions, count, first_token=first_token)

    def cause(self, filled: int | None = None, **other: Any) -> Cause:
        with pytest.raises(FrameError) as caught:
            self.check(filled, **other)
        assert caught.value.detail
        assert caught.value.cause.is_damage or caught.value.cause is Cause.FOREIGN_VERSION
        return caught.value.cause

    def fields(self) -> dict[str, Any]:
        length = int.from_bytes(self.header[12:16], "little")
        found = unpack(bytes(self.header[24 : 24 + length]))
        assert isinstance(found, dict)
        return found

    def rewrite(self, body: bytes, version: int = VERSION) -> None:
        """Another header with a valid checksum."""
        prefix = struct.pack("<8sHHI", MAGIC, version, 0, len(body))
        checksum = struct.pack("<Q", xxh3_64_intdigest(prefix + body))
        self.header[:] = prefix + checksum + body + bytes(HEADER_NBYTES - 24 - len(body))


KINDS = st.sampled_from(list(AttentionKind))


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    kind = draw(KINDS)
    layers = draw(st.integers(1, 70))
    lo = draw(st.integers(0, layers - 1))
    hi = draw(st.integers(lo + 1, layers))
    heads = draw(st.integers(1, 4))
    h0 = draw(st.integers(0, heads - 1))
    h1 = draw(st.integers(h0 + 1, heads))
    group = KVGroup(
        kind,
        tuple(range(layers)),
        draw(st.sampled_from(["float32", "bfloat16", "fp8_e4m3"])),
        heads,
        draw(st.sampled_from([1, 8, 64])),
        state_nbytes=draw(st.integers(1, 70_000)) if kind is AttentionKind.STATE else 0,
    )
    part = Part(0, (lo, hi), (h0, h1) if kind is AttentionKind.MHA else None)
    return Payload.of(group, part, draw(st.integers(1, 40)))


@given(payload=payloads(), first=st.integers(0, 1 << 31), seed=st.integers(0, 1000))
def test_what_was_written_is_read_back(payload: Payload, first: int, seed: int) -> None:
    written = Written(payload, first_token=first, seed=seed)
    original = random.Random(seed).randbytes(payload.nbytes)
    written.check()
    for segment in payload.segments():
        end = segment.offset + segment.nbytes
        assert written.body[segment.offset : end] == original[segment.offset : end]


@given(payload=payloads())
def test_a_payload_is_only_read_and_no_stale_byte_of_a_page_leaves_the_process(
    payload: Payload,
) -> None:
    written = Written(payload)
    body = random.Random(0).randbytes(payload.nbytes)[: payload.body_nbytes]
    assert written.body == body + bytes(payload.nbytes - len(body))
    length = int.from_bytes(written.header[12:16], "little")
    assert not any(written.header[24 + length :])


@pytest.mark.parametrize("layers", [61, 80, 126, 200])
@pytest.mark.parametrize("tokens", [1, 256, 2048])
@pytest.mark.parametrize("heads", [1, 8])
def test_a_header_fits_its_page(layers: int, tokens: int, heads: int) -> None:
    """Nothing is allocated: the largest numbers a header can name are written from shapes alone."""
    payload = shape(layers, tokens, heads, 128)
    rows = [Row(*s, s.nbytes, (1 << 64) - 1, 300) for s in payload.segments()]
    key = ObjectKey.of(NAMESPACE, "f" * 32, CHUNK_HASH, tokens, payload.part)
    header = memoryview(bytearray(HEADER_NBYTES))
    pack_rows(
        header,
        rows,
        name=ObjectName.made(key, Encoding(VERSION, "c" * 32, "s" * 32)),
        first_token=1 << 40,
        created=1e18 / 3,
        build="kvlayer-core 12.34.56.dev7890+g0123456789abcdef",
        # Room for a seal: a tag of 16 bytes for each segment, a nonce and a wrapped key.
        required={"seal": [bytes(16)] * len(rows), "nonce": bytes(12), "key": bytes(72)},
    )
    assert len(rows) <= 64


def test_the_header_says_what_the_contract_says() -> None:
    written = Written(shape())
    fields = written.fields()
    rows = fields.pop("segments")
    assert fields == {
        "name": f"{written.key}/2.raw",
        "first": 32,
        "tokens": 16,
        "rope": "absolute",
        "created": 1.5,
        "build": "test",
        "must": [],
    }
    (segment,) = written.payload.segments()
    stored = written.body[: segment.nbytes]
    assert rows == [[*segment, segment.nbytes, xxh3_64_intdigest(stored), 0]]


def test_a_header_that_cannot_fit_is_refused() -> None:
    payload = shape()
    part = Part(0, (0, 3), (0, 2), "native:" + "x" * HEADER_NBYTES)
    with pytest.raises(ValueError, match="does not fit"):
        encode(
            make_key(payload, part),
            payload,
            (memoryview(bytearray(payload.nbytes)),),
            memoryview(bytearray(write_scratch(payload, copies=False))),
            copies=False,
            first_token=0,
            created=0.0,
            build="",
        )


# -- damage -----------------------------------------------------------------------------------


def test_no_bytes_are_an_empty_object() -> None:
    assert Written(shape()).cause(0) is Cause.EMPTY


@pytest.mark.parametrize("layers", [1, 3, 70])
def test_an_object_cut_anywhere_is_truncated(layers: int) -> None:
    written = Written(shape(layers, 16, 2, 512))
    ends = [HEADER_NBYTES + s.offset + s.nbytes for s in written.payload.segments()]
    starts = [HEADER_NBYTES + s.offset for s in written.payload.segments()]
    cuts = {1, 23, 24, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, written.nbytes - 1, *starts, *ends}
    for cut in sorted(cuts - {written.nbytes}):
        assert written.cause(cut) is Cause.TRUNCATED, cut
    written.check(written.nbytes)


@given(payload=payloads(), choice=st.randoms(use_true_random=False))
def test_a_flipped_bit_in_any_segment_is_corrupt(payload: Payload, choice: random.Random) -> None:
    written = Written(payload)
    segment = choice.choice(payload.segments())
    at = segment.offset + choice.randrange(segment.nbytes)
    written.body[at] ^= 1 << choice.randrange(8)
    assert written.cause() is Cause.CORRUPT
    written.body[at] ^= 0xFF


@pytest.mark.parametrize("edge", ["first", "last"])
def test_a_flipped_byte_at_either_end_of_every_segment_is_corrupt(edge: str) -> None:
    written = Written(shape(70, 16, 2, 512))
    segments = written.payload.segments()
    assert len(segments) > 10
    for segment in segments:
        at = segment.offset + (0 if edge == "first" else segment.nbytes - 1)
        written.body[at] ^= 0xFF
        assert written.cause() is Cause.CORRUPT
        written.body[at] ^= 0xFF
    written.check()


def test_a_flipped_byte_anywhere_in_the_header_is_damage_or_means_nothing() -> None:
    written = Written(shape())
    length = int.from_bytes(written.header[12:16], "little")
    for at in range(24 + length):
        for bit in (0x01, 0x80):
            written.header[at] ^= bit
            assert written.cause() is Cause.CORRUPT, at  # a version that was flipped is none
            written.header[at] ^= bit


def test_a_frame_of_another_version_is_foreign() -> None:
    """And no damage: a mixed fleet must not take each other's objects away."""
    for version in (1, VERSION + 1, 65535):
        for body in (pack({"later": 1}), b"no map at all"):
            written = Written(shape())
            written.rewrite(body, version)
            assert written.cause() is Cause.FOREIGN_VERSION
            assert not contradicts_header(written.header, 8192)
    assert not Cause.FOREIGN_VERSION.is_damage


def test_a_length_beyond_the_page_is_corrupt() -> None:
    written = Written(shape())
    for length in (HEADER_NBYTES - 23, 1 << 31, (1 << 32) - 1):
        written.header[12:16] = length.to_bytes(4, "little")
        assert written.cause() is Cause.CORRUPT


def test_another_object_in_its_place_is_misplaced() -> None:
    written = Written(shape())
    elsewhere = ObjectKey.of(NAMESPACE, "0", bytes(32), 16, written.payload.part)
    assert written.cause(key=elsewhere) is Cause.MISPLACED
    zoned = ObjectKey.of(NAMESPACE, "cd" * 16, CHUNK_HASH, 16, written.payload.part)
    assert written.cause(key=zoned) is Cause.MISPLACED
    foreign = ObjectKey.of("cd" * 32, "0", CHUNK_HASH, 16, written.payload.part)
    assert written.cause(key=foreign) is Cause.MISPLACED


def test_another_position_or_length_is_misplaced() -> None:
    written = Written(shape())
    assert written.cause(first_token=31) is Cause.MISPLACED
    # The same bytes read as a longer or shorter chunk: same part, same key, other token count.
    assert written.cause(payload=shape(tokens=15)) is Cause.MISPLACED
    longer = ObjectKey.of(NAMESPACE, "0", CHUNK_HASH, 17, written.payload.part)
    assert written.cause(key=longer) is Cause.MISPLACED


FOREIGN: list[Callable[[dict[str, Any]], object]] = [
    lambda f: f.update(must=["seal"], seal=b"x"),
    lambda f: f.update(must=["first"]),
    lambda f: f.update(must=[1]),
    lambda f: f.update(must=None),
    lambda f: f.pop("must"),
    lambda f: f.update(first=None),
    lambda f: f.update(rope="none"),
    lambda f: f.update(segments=f["segments"] * 70),
    lambda f: f["segments"][0].__setitem__(3, f["segments"][0][3] + 1),
    lambda f: f["segments"][0].__setitem__(6, 1),
    lambda f: f.update(segments=[]),
    lambda f: f.update(segments=None),
    lambda f: f.update(segments=[[0, 3]]),
    lambda f: f.update(segments=f["segments"] * 2),
    lambda f: f["segments"][0].__setitem__(2, 4096),
    lambda f: f["segments"][0].__setitem__(4, 1),
    lambda f: f["segments"][0].append(0),
    lambda f: f["segments"][0].__setitem__(5, "checksum"),
    lambda f: f["segments"][0].__setitem__(5, None),
    lambda f: f["segments"][0].__setitem__(5, True),
]


@pytest.mark.parametrize("change", FOREIGN)
def test_what_this_build_cannot_read_is_foreign(change: Callable[[dict[str, Any]], object]) -> None:
    written = Written(shape())
    fields = written.fields()
    change(fields)
    written.rewrite(pack(fields))
    assert written.cause() is Cause.FOREIGN_VERSION


def test_a_header_with_more_fields_is_read() -> None:
    written = Written(shape())
    written.rewrite(pack({**written.fields(), "later": [1, 2, 3]}))
    written.check()


MSGPACK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = st.sampled_from(["name", "first", "tokens", "must", "rope", "created", "segments"])


@given(changes=st.dictionaries(NAMES, MSGPACK), kept=st.booleans())
def test_wrong_types_behind_a_valid_checksum_are_a_frame_error(
    changes: dict[str, Any], kept: bool
) -> None:
    written = Written(shape())
    original = written.fields() if kept else {}
    written.rewrite(pack({**original, **changes}))
    read = {k: v for k, v in written.fields().items() if k != "created"}  # which may be anything
    if kept and read == {k: v for k, v in original.items() if k != "created"}:
        written.check()
    else:
        written.cause()


@given(rows=st.lists(st.lists(MSGPACK, max_size=8), max_size=3), choice=st.integers(0, 6))
def test_wrong_types_in_the_segment_table_are_a_frame_error(
    rows: list[list[Any]], choice: int
) -> None:
    written = Written(shape())
    fields = written.fields()
    (mine,) = fields["segments"]
    for row in rows:
        for table in ([row], [[*mine[:choice], *row]], [mine, row]):
            if table == [mine]:
                continue
            written.rewrite(pack({**fields, "segments": table}))
            assert written.cause() in (Cause.FOREIGN_VERSION, Cause.CORRUPT)


@given(body=st.binary(max_size=200))
def test_garbage_behind_a_valid_checksum_is_a_frame_error(body: bytes) -> None:
    written = Written(shape())
    written.rewrite(body)
    assert written.cause() in (Cause.CORRUPT, Cause.MISPLACED)


@given(body=MSGPACK)
def test_any_value_behind_a_valid_checksum_is_a_frame_error(body: Any) -> None:
    written = Written(shape())
    written.rewrite(pack(body))
    assert written.cause() in (Cause.CORRUPT, Cause.MISPLACED)


@pytest.mark.parametrize(
    "body",
    [
        b"\x81\xc0\xc0",  # a key that is no text
        b"\x81\x90\xc0",  # a key that cannot be hashed
        b"\x81\xa1\xff\xc0",  # not UTF-8
        b"\xc7\x0c\xff" + bytes(12),  # a timestamp
        b"\xc7\x00\xff",  # an empty extension
        b"\xc7\x00\x05",
        b"\xd6\xff\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",  # a list of four billion
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 2000,  # nested beyond any depth
        b"\x81\xa1k" * 600,
        b"",
    ],
)
def test_hostile_msgpack_is_a_frame_error(body: bytes) -> None:
    written = Written(shape())
    written.rewrite(body)
    assert written.cause() in (Cause.CORRUPT, Cause.MISPLACED)


@given(seed=st.integers(0, 1 << 32), magic=st.booleans())
def test_a_page_of_noise_is_a_frame_error(seed: int, magic: bool) -> None:
    written = Written(shape())
    written.header[:] = random.Random(seed).randbytes(HEADER_NBYTES)
    if magic:
        written.header[:8] = MAGIC
    # Noise is damage; behind the magic it may claim to be of another version.
    assert written.cause() in ({Cause.CORRUPT, Cause.FOREIGN_VERSION} if magic else {Cause.CORRUPT})


def test_causes_are_told_in_words() -> None:
    written = Written(shape())
    written.body[0] ^= 1
    with pytest.raises(FrameError, match=r"checksum of layers 0\.\.2 is [0-9a-f]{16}"):
        written.check()
    assert not math.isnan(written.fields()["created"])


@given(layers=st.integers(1, 6), tokens=st.integers(1, 40), extra=st.integers(-3 * ALIGNMENT, 9000))
def test_a_header_tells_whether_its_object_is_cut_short(
    layers: int, tokens: int, extra: int
) -> None:
    written = Written(shape(layers, tokens))
    whole = bytes(written.header + written.body)
    nbytes = max(len(whole) + extra, 0)
    assert contradicts_header(whole[:nbytes][:HEADER_NBYTES], nbytes) == (nbytes != len(whole))


@given(
    junk=st.binary(max_size=64),
    nbytes=st.integers(1, 10_000),
    at=st.integers(0, 200),
)
def test_of_what_has_no_header_nobody_can_tell(junk: bytes, nbytes: int, at: int) -> None:
    head = (b"x" + junk + bytes(HEADER_NBYTES))[: min(nbytes, HEADER_NBYTES)]
    assert not contradicts_header(head, nbytes)
    damaged = bytearray(Written(shape()).header)
    damaged[at] ^= 1
    assert not contradicts_header(bytes(damaged), HEADER_NBYTES + 1)


# -- encodings other than raw ---------------------------------------------------------------------


def test_an_object_of_another_encoding_is_misplaced_under_the_name_of_this_one() -> None:
    written = Written(shape())
    name = ObjectName.made(written.key, Encoding(VERSION, "zstd-1"))
    rows = read_rows(
        memoryview(written.header),
        written.nbytes,
        name=ObjectName.raw(written.key),
        payload=written.payload,
        first_token=32,
    ).rows
    header = memoryview(written.header)
    pack_rows(header, rows, name=name, first_token=32, created=0.0, build="")
    assert written.cause() is Cause.MISPLACED


@given(payload=payloads(), data=st.data())
def test_encoded_segments_lie_back_to_back_and_are_padded_once(payload: Payload, data: Any) -> None:
    name = ObjectName.made(make_key(payload), Encoding(VERSION, "doubling"))
    rows, end = [], 0
    for segment in payload.segments():
        nbytes = data.draw(st.integers(1, 2 * segment.nbytes))
        meta = data.draw(st.integers(0, nbytes))
        raw = segment.nbytes
        rows.append(Row(segment.layer, segment.num_layers, end, raw, nbytes, 7, meta))
        end += nbytes
    header = memoryview(bytearray(HEADER_NBYTES))
    needs = {"table": [1, 2, 3]}
    pack_rows(header, rows, name=name, first_token=None, created=0.0, build="", required=needs)
    filled = HEADER_NBYTES + -(-end // ALIGNMENT) * ALIGNMENT

    def read(
        filled: int, understood: tuple[str, ...] = ("table",), first: int | None = None
    ) -> Any:
        return read_rows(
            header,
            filled,
            name=name,
            payload=payload,
            first_token=first,
            understood=understood,
        )

    found = read(filled)
    assert found.rows == tuple(rows)
    assert found.fields["table"] == [1, 2, 3]
    assert found.body_nbytes == end
    assert not contradicts_header(header, filled)
    assert contradicts_header(header, filled + ALIGNMENT)
    for wrong, cause in (
        (lambda: read(filled - 1), Cause.TRUNCATED),
        (lambda: read(filled, ()), Cause.FOREIGN_VERSION),
        (lambda: read(filled, first=0), Cause.FOREIGN_VERSION),
    ):
        with pytest.raises(FrameError) as caught:
            wrong()
        assert caught.value.cause is cause


@given(payload=payloads(), parent=st.binary(min_size=32, max_size=32), tags=st.booleans())
def test_a_header_says_what_comes_right_before_its_object(
    payload: Payload, parent: bytes, tags: bool
) -> None:
    """Beside as many tags as a seal may add."""
    name = ObjectName.raw(make_key(payload))
    rows = [Row(*segment, segment.nbytes, 2**64 - 1) for segment in payload.segments()]
    header = memoryview(bytearray(HEADER_NBYTES))
    more = {"required": {"tags": [bytes(16)] * len(rows)}} if tags else {}
    pack_rows(header, rows, name=name, first_token=16, created=0.0, build="", parent=parent, **more)
    assert parent_of(header) == parent == parent_of(bytes(header))
    pack_rows(header, rows, name=name, first_token=0, created=0.0, build="")
    assert parent_of(header) == b""


@given(st.binary(max_size=64), st.integers(0, 200))
def test_what_is_no_header_says_of_nothing_what_comes_before_it(junk: bytes, at: int) -> None:
    assert parent_of(junk) == b"" == parent_of(junk + bytes(HEADER_NBYTES))
    payload = shape()
    header = memoryview(bytearray(HEADER_NBYTES))
    name = ObjectName.raw(make_key(payload))
    rows = [Row(*segment, segment.nbytes, 7) for segment in payload.segments()]
    for wrong in (b"short", "x" * 32):
        more: dict[str, Any] = {"parent": wrong}
        pack_rows(header, rows, name=name, first_token=16, created=0.0, build="", **more)
        assert parent_of(header) == b""
    pack_rows(header, rows, name=name, first_token=16, created=0.0, build="", parent=bytes(32))
    header[at] ^= 1
    assert parent_of(header) == b""


def test_an_object_whose_position_nobody_knows_is_for_readers_that_do_not_know_it_either() -> None:
    written = Written(shape(), first_token=None)  # type: ignore[arg-type]
    written.check()
    assert written.fields()["first"] is None
    assert written.cause(first_token=0) is Cause.FOREIGN_VERSION
    placed = Written(shape(), first_token=0)
    assert placed.cause(first_token=None) is Cause.FOREIGN_VERSION


def test_checksums_alone_make_the_header_that_writing_makes() -> None:
    written = Written(shape(70, 16, 2, 512))
    header = memoryview(bytearray(HEADER_NBYTES))
    about: dict[str, Any] = {"key": written.key, "payload": written.payload, "first_token": 32}
    checksums = read_header(memoryview(written.header), written.nbytes, **about)
    assert len(checksums) > 10
    pack_header(header, checksums, created=1.5, build="test", **about)
    assert header == written.header


def test_overlapping_or_distant_segments_are_no_object_of_ours() -> None:
    written = Written(shape(70, 16, 2, 512))
    fields = written.fields()
    for at, by in ((1, -1), (1, 1), (0, 4096)):
        changed = [[*row] for row in fields["segments"]]
        changed[at][2] += by
        written.rewrite(pack({**fields, "segments": changed}))
        assert written.cause() is Cause.FOREIGN_VERSION


def test_a_header_stands_for_its_object_alone() -> None:
    written, other = Written(shape()), Written(shape(tokens=24))
    head = bytes(written.header)
    assert stands_for(head, head)
    assert stands_for(head + bytes(100), memoryview(head))
    assert not stands_for(bytes(HEADER_NBYTES), head)
    assert not stands_for(b"x" * HEADER_NBYTES, head)
    assert not stands_for(head[:100], head)
    assert not stands_for(b"", head)
    assert stands_for(b"x", b"what somebody else frames otherwise")
    damaged = bytearray(head)
    damaged[40] ^= 1
    assert not stands_for(damaged, head)
    assert not stands_for(bytes(other.header), head)
