"""Names of objects: keys and parts, and the text that they are not."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.errors import LayoutError
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, Part

# ---- Parts and keys ----

numbers = st.integers(0, 999_999_999)
ranges = st.tuples(st.integers(0, 999_999), st.integers(1, 999_999)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)
forms = st.just("canonical") | st.from_regex(r"native:[a-z0-9_:-]+", fullmatch=True)
parts = st.builds(Part, numbers, ranges, st.none() | ranges, forms)
digests = st.binary(min_size=32, max_size=32)
lengths = st.integers(1, 999_999_999)
zones = st.just(PUBLIC_ZONE) | st.binary(min_size=16, max_size=16).map(bytes.hex)
keys = st.builds(ObjectKey.of, digests.map(bytes.hex), zones, digests, lengths, parts)


@settings(deadline=None)  # a busy machine is no failure
@given(parts)
def test_a_part_reads_back_from_its_text(part: Part) -> None:
    assert Part.parse(str(part)) == part


@settings(deadline=None)  # a busy machine is no failure
@given(digests, zones, digests, lengths, parts)
def test_a_key_reads_back_from_its_text(
    namespace: bytes, zone: str, end: bytes, tokens: int, part: Part
) -> None:
    key = ObjectKey.parse(str(ObjectKey.of(namespace.hex(), zone, end, tokens, part)))
    assert (key.namespace, key.zone, key.end_hash) == (namespace.hex(), zone, end)
    assert (key.tokens, key.part) == (tokens, part)
    assert key.fields() == (key.namespace, zone, end, tokens, part)
    assert pickle.loads(pickle.dumps(key)) == key  # noqa: S301  our own bytes


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(max_size=40) | st.text("g0123456789.l-hcanoil:tve_", max_size=40))
def test_text_that_is_no_part_is_refused(text: str) -> None:
    try:
        part = Part.parse(text)
    except ValueError:
        return
    assert str(part) == text


EDITS = "0123456789abcdefgABCDEFG/.:_-l h\n\0é٣"  # and a digit that is not ASCII


@settings(deadline=None)  # a busy machine is no failure
@given(keys, st.data())
def test_a_damaged_key_is_refused_or_is_another_key_that_reads_back(
    key: ObjectKey, data: Any
) -> None:
    at = data.draw(st.integers(0, len(key)))
    end = data.draw(st.integers(at, min(at + 2, len(key))))
    text = key[:at] + data.draw(st.text(EDITS, max_size=2)) + key[end:]
    try:
        found = ObjectKey.parse(text)
    except ValueError:
        return
    rebuilt = ObjectKey.of(found.namespace, found.zone, found.end_hash, found.tokens, found.part)
    assert rebuilt == text
    assert re.fullmatch(r"[a-z0-9_.:/-]+", text)


PART = "g0.l0-2.h0-3.canonical"
KEY = f"{'a' * 64}/0/{'b' * 64}-16/{PART}"


@pytest.mark.parametrize(
    "text",
    [
        "", "g0", PART + "\n", PART.replace("g0", "g00"), PART.replace("l0-2", "l0-02"),
        PART.replace("l0-2", "l2-2"), PART.replace("l0-2", "l3-2"), PART.replace("h0-3", "h3-3"),
        PART.replace("h0-3", "h-1-3"), PART.replace("canonical", "native:"),
        PART.replace("canonical", "native:AMX"), PART.replace("canonical", "native:a.b"),
        PART.replace("canonical", "native:a/b"), PART.replace("canonical", "packed"),
        PART.replace("g0", "g٣"), PART.replace("g0", "g" + "9" * 5000), " " + PART,
    ],
)  # fmt: skip
def test_a_part_that_str_cannot_produce_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a part"):
        Part.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", KEY + "\n", "/" + KEY, KEY + "/", KEY.upper(), KEY.replace("/0/", "//"),
        KEY.replace("/0/", "/00/"), KEY.replace("/0/", "/1/"), KEY.replace("/0/", f"/{'c' * 31}/"),
        KEY.replace("/0/", f"/{'c' * 33}/"), KEY.replace("/0/", "/../"), KEY[1:],
        KEY.replace(f"/{'b' * 64}-", f"/{'b' * 63}-"), KEY.replace("-16/", "-016/"),
        KEY.replace("-16/", "/"), KEY.replace("-16/", "-/"), KEY.replace("-16/", "-0/"),
        KEY.replace("-16/", "-1234567890/"), KEY.replace("-16/", "-1٣/"),
        KEY.replace("-16/", "--16/"), KEY.replace(PART, "g0.l2-1.canonical"),
    ],
)  # fmt: skip
def test_a_key_from_outside_that_is_none_is_refused(text: str) -> None:
    assert ObjectKey.parse(KEY)
    with pytest.raises(ValueError, match="not a"):
        ObjectKey.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Part(-1, (0, 1), None),
        lambda: Part(0, (1, 1), None),
        lambda: Part(0, (0, 1), (2, 1)),
        lambda: Part(0, (0, 1), None, "native:AMX"),
        lambda: Part(0, (0, 1), None, ""),
        lambda: Part(10**9, (0, 1), None),
    ],
)
def test_a_part_no_key_can_carry_cannot_be_made(make: Any) -> None:
    with pytest.raises(LayoutError) as caught:
        make()
    assert caught.value.hint


def test_no_two_parts_share_a_text() -> None:
    variants = [
        Part(0, (0, 1), None), Part(0, (0, 1), (0, 1)), Part(0, (0, 1), (0, 11)),
        Part(0, (0, 11), (0, 1)), Part(0, (0, 1), None, "native:h0-1"), Part(1, (0, 1), None),
    ]  # fmt: skip
    assert len(set(map(str, variants))) == len(variants)
