"""Identity: what shaped the bytes is told apart, what did not is not in it."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.errors import ConfigError, IdentityError, KVLayerError
from kvlayer.identity.namespace import COMPUTE_DTYPES, Namespace
from kvlayer.layout import DTYPE_NBYTES, AttentionKind, HitRule, KVGroup

WEIGHTS = "sha256:" + "ab" * 32
MHA = KVGroup(AttentionKind.MHA, (0, 1), "bfloat16", 3, 64)
MLA = KVGroup(AttentionKind.MLA, (2,), "bfloat16", 1, 576)


def space(**changed: Any) -> Namespace:
    given_fields: dict[str, Any] = {
        "weights": WEIGHTS,
        "groups": (MHA,),
        "compute_dtype": "bfloat16",
    }
    return Namespace(**given_fields | changed)


texts = st.text(max_size=6)
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 0.0, -0.0, 1.0, "1", "", True, False, None])
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | texts
)
flat = st.dictionaries(texts, scalars, max_size=3)


@st.composite
def groups(draw: st.DrawFn) -> KVGroup:
    kind = draw(st.sampled_from(AttentionKind))
    is_trailing = draw(st.booleans())
    return KVGroup(
        kind,
        tuple(draw(st.lists(st.integers(0, 200), min_size=1, max_size=4, unique=True))),
        draw(st.sampled_from(sorted(DTYPE_NBYTES))),
        num_kv_heads=draw(st.integers(1, 3)),
        head_size=draw(st.sampled_from([64, 128])),
        v_head_size=draw(st.sampled_from([None, 64])),
        hit_rule=HitRule.TRAILING if is_trailing else HitRule.EVERY_CHUNK,
        window_tokens=draw(st.integers(1, 2)) if is_trailing else None,
        rope=draw(flat),
        state_nbytes=draw(st.integers(1, 2)) if kind is AttentionKind.STATE else 0,
        quantisation=draw(st.sampled_from(["", "int8_per_token_head"])),
    )


digests = st.sampled_from([f"sha256:{digit * 64}" for digit in "ab"])


@st.composite
def namespaces(draw: st.DrawFn) -> Namespace:
    return Namespace(
        weights=draw(digests | st.just(f"process:{'a' * 32}")),
        groups=tuple(draw(st.lists(groups(), min_size=1, max_size=2))),
        compute_dtype=draw(st.sampled_from(COMPUTE_DTYPES)),
        tokens_per_chunk=(chunk := draw(st.sampled_from([8, 16]))),
        tokens_per_tail=draw(st.sampled_from([0, 1, 2, chunk])),
        adapters=tuple(draw(st.lists(digests, max_size=2))),
        overrides=draw(flat),
        kv_scales=draw(st.sampled_from(["", "v1"])),
        quality=draw(st.sampled_from(["exact", "int8", "mixed:bits=5"])),
        hash_scheme=draw(st.sampled_from(["links", "sglang:pairs"])),
        numerics=draw(st.sampled_from(["portable", "engine:vllm-0.32.0+cpu"])),
    )


# ---- Equality ----


@settings(deadline=None)  # a busy machine is no failure
@given(namespaces(), namespaces())
def test_namespaces_are_equal_exactly_when_their_digests_are(a: Namespace, b: Namespace) -> None:
    assert (a == b) is (a.digest == b.digest) is (not a.differences(b))
    assert (a == b) is (a.canonical() == b.canonical())
    assert a != b or hash(a) == hash(b)


@settings(deadline=None)  # a busy machine is no failure
@given(namespaces())
def test_a_namespace_reads_back_from_its_canonical_bytes(namespace: Namespace) -> None:
    found = Namespace.from_canonical(namespace.canonical())
    assert found == namespace
    assert found.digest == namespace.digest
    assert found.differences(namespace) == []


@settings(deadline=None)  # a busy machine is no failure
@given(namespaces())
def test_a_copy_is_the_same_namespace(namespace: Namespace) -> None:
    rebuilt = Namespace(
        **{spec.name: getattr(namespace, spec.name) for spec in fields(namespace) if spec.init}
    )
    unpickled = pickle.loads(pickle.dumps(namespace))  # noqa: S301  our own bytes
    for copied in (rebuilt, replace(namespace), copy.deepcopy(namespace), unpickled):
        assert copied == namespace
        assert copied.digest == namespace.digest


def test_the_order_of_a_mapping_is_not_identity() -> None:
    one, two = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert space(overrides=one) == space(overrides=two)
    rope = [replace(MHA, rope=mapping) for mapping in (one, two)]
    assert space(groups=(rope[0],)) == space(groups=(rope[1],))


@pytest.mark.parametrize(
    "values", [(1, True), (1, 1.0), (0, False), (0.0, -0.0), (None, ""), (1, "1")]
)
def test_values_python_calls_equal_or_alike_are_told_apart(values: tuple[Any, Any]) -> None:
    one, two = (space(overrides={"x": value}) for value in values)
    assert one != two
    assert one.digest != two.digest
    one, two = (space(groups=(replace(MHA, rope={"x": value}),)) for value in values)
    assert one != two


def test_a_v_head_size_left_out_is_the_head_size() -> None:
    assert space(groups=(replace(MHA, v_head_size=64),)) == space()
    assert space(groups=(replace(MHA, v_head_size=32),)) != space()


def test_the_order_of_groups_and_adapters_is_identity() -> None:
    adapters = tuple(f"sha256:{digit * 64}" for digit in "ab")
    assert space(groups=(MHA, MLA)) != space(groups=(MLA, MHA))
    assert space(adapters=adapters) != space(adapters=adapters[::-1])


def test_a_namespace_equals_nothing_else() -> None:
    assert space() != space().digest
    assert space() != space().canonical()


def test_what_was_digested_does_not_change_with_the_callers_mappings() -> None:
    rope: dict[str, Any] = {"theta": 10000.0}
    overrides: dict[str, Any] = {"a": 1}
    namespace = space(groups=(replace(MHA, rope=rope),), overrides=overrides)
    rope["theta"], overrides["a"] = 0.0, 2
    assert namespace.groups[0].rope == {"theta": 10000.0}
    assert namespace.overrides == {"a": 1}
    assert Namespace.from_canonical(namespace.canonical()).overrides == {"a": 1}


CHANGES: dict[str, Any] = {
    "weights": "sha256:" + "cd" * 32,
    "compute_dtype": "float32",
    "tokens_per_chunk": 512,
    "tokens_per_tail": 64,
    "adapters": ("sha256:" + "cd" * 32,),
    "overrides": {"quantization": "fp8"},
    "kv_scales": "v1",
    "quality": "int8",
    "hash_scheme": "sglang:pairs",
    "numerics": "engine:vllm-0.32.0",
    "groups": (replace(MHA, dtype="fp8_e4m3"),),
}
GROUP_CHANGES: dict[str, Any] = {
    "kind": AttentionKind.MLA,
    "layers": (0, 1, 2),
    "dtype": "fp8_e4m3",
    "num_kv_heads": 6,
    "head_size": 128,
    "v_head_size": 32,
    "hit_rule": HitRule.TRAILING,
    "window_tokens": 512,
    "rope": {"theta": 1e6},
    "state_nbytes": 7,
    "quantisation": "fp8_per_token_head",
}


def test_every_field_is_tried_below() -> None:
    assert set(CHANGES) == {spec.name for spec in fields(Namespace) if spec.init}
    assert set(GROUP_CHANGES) == {spec.name for spec in fields(KVGroup)}


@pytest.mark.parametrize("name", CHANGES)
def test_another_value_of_any_field_is_another_namespace_and_is_named(name: str) -> None:
    base = space(tokens_per_tail=32)
    other = replace(base, **{name: CHANGES[name]})
    assert other != base
    differences = base.differences(other)
    assert len(differences) == 1
    assert differences[0].startswith(name)


@pytest.mark.parametrize("name", GROUP_CHANGES)
def test_another_value_of_any_field_of_a_group_is_another_namespace_and_is_named(name: str) -> None:
    base = replace(MHA, window_tokens=1024)
    other = replace(base, **{name: GROUP_CHANGES[name]})
    differences = space(groups=(base,)).differences(space(groups=(other,)))
    assert space(groups=(base,)) != space(groups=(other,))
    assert any(line.startswith(f"groups[0].{name}") for line in differences)


def test_differences_say_both_values() -> None:
    here = space(overrides={"a": 1, "b": True}, groups=(MHA, MLA))
    there = space(overrides={"a": 1, "b": 1}, quality="int8", compute_dtype="float16")
    lines = here.differences(there)
    assert "quality: 'exact' here, 'int8' there" in lines
    assert "compute_dtype: 'bfloat16' here, 'float16' there" in lines
    assert "overrides.b: True here, 1 there" in lines
    assert "groups[1].head_size: 576 here, absent there" in lines
    assert not any(line.startswith(("overrides.a", "groups[0]", "weights")) for line in lines)


def test_what_did_not_shape_the_bytes_is_no_field() -> None:
    named = {spec.name for spec in fields(Namespace)} | {spec.name for spec in fields(KVGroup)}
    for absent in ("engine", "host", "block", "tp", "pp", "rank", "form", "shard"):
        assert not [name for name in named if absent in name.split("_")]


# ---- Defaults and refusals ----


@pytest.mark.parametrize(
    ("chunk", "tail"),
    [
        (256, 32),
        (8, 1),
        (7, 1),
        (1, 1),
        (16, 2),
        (512, 32),
        (4096, 32),
        (100, 4),
        (272, 16),
        (257, 1),
    ],
)
def test_a_tail_is_a_power_of_two_of_at_most_an_eighth_of_a_chunk_and_at_most_32(
    chunk: int, tail: int
) -> None:
    assert space(tokens_per_chunk=chunk).tokens_per_tail == tail
    assert space(tokens_per_chunk=chunk) == space(tokens_per_chunk=chunk, tokens_per_tail=tail)


@pytest.mark.parametrize(
    "sizes",
    [(0, 0), (-8, 1), (8, -1), (8, 3), (8, 16), (True, 1), (8.0, 1), (8, "1"), (None, 1)],
)
def test_a_chunk_or_tail_size_that_cannot_work_is_refused(sizes: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="tokens_per") as caught:
        space(tokens_per_chunk=sizes[0], tokens_per_tail=sizes[1])
    assert caught.value.hint


def test_weights_nobody_can_name_stay_in_the_process() -> None:
    assert space(weights="process:" + "0f" * 16).is_private
    assert not space().is_private


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", ""), ("weights", "HuggingFaceTB/SmolLM2-135M"), ("weights", WEIGHTS.upper()),
        ("weights", WEIGHTS + "\n"), ("weights", WEIGHTS[:-1]), ("weights", "process:1"),
        ("weights", None), ("adapters", ("my-lora",)), ("adapters", ("process:" + "0" * 32,)),
        ("compute_dtype", "torch.bfloat16"), ("compute_dtype", "auto"), ("compute_dtype", ""),
        ("numerics", "engine"), ("numerics", "engine:vllm"), ("numerics", "exact"),
        ("quality", "Int 8"), ("quality", ""), ("hash_scheme", ""), ("kv_scales", "two words"),
        ("groups", ()),
        ("overrides", {"x": [1]}), ("overrides", {"x": {}}), ("overrides", {1: "x"}),
        ("overrides", {"x": float("nan")}), ("overrides", {"x": np.float64(1)}),
        ("overrides", {"x": b"bytes"}), ("overrides", {"x": 2**64}), ("overrides", {"x": "\ud800"}),
        ("overrides", {f"x{i}": i for i in range(1025)}), ("overrides", {"x": "y" * 70_000}),
        ("groups", (replace(MHA, rope={"x": (1,)}),)),
        ("groups", (replace(MHA, layers=tuple(range(1025))),)),
    ],
)  # fmt: skip
def test_an_identity_that_names_nothing_or_two_things_is_refused(name: str, value: Any) -> None:
    with pytest.raises(IdentityError) as caught:
        space(**{name: value})
    assert caught.value.hint


# ---- Bytes from outside ----


def repacked(**changed: Any) -> bytes:
    described: dict[str, Any] = msgpack.unpackb(space().canonical())
    described |= changed
    kept = {key: value for key, value in sorted(described.items()) if value is not ...}
    return bytes(msgpack.packb(kept))


def test_repacking_alone_changes_nothing() -> None:
    assert Namespace.from_canonical(repacked()) == space()


@pytest.mark.parametrize("schema", [0, 1, 3, 99, "2", None, True, 1.0, ...])
def test_a_namespace_of_an_unknown_schema_is_refused_by_number(schema: Any) -> None:
    with pytest.raises(IdentityError, match="key schema") as caught:
        Namespace.from_canonical(repacked(schema=schema, some_new_field=1))
    assert caught.value.hint


def group_row(**changed: Any) -> dict[str, Any]:
    row: dict[str, Any] = msgpack.unpackb(space().canonical())["groups"][0]
    return dict(sorted((row | changed).items()))


def deep(depth: int) -> bytes:
    """A namespace whose weights are a list in a list in a list ..."""
    return repacked(weights="@").replace(b"\xa1@", b"\x91" * depth + b"\x00")


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "noise": b"\xc1\xff\x00",
    "a number": b"\x01",
    "a list": msgpack.packb([1, 2]),
    "cut short": space().canonical()[:-1],
    "trailing bytes": space().canonical() + b"\x00",
    "unsorted": msgpack.packb(dict(reversed(msgpack.unpackb(space().canonical()).items()))),
    "a field too many": repacked(host="a"),
    "a field too few": repacked(quality=...),
    "no groups": repacked(groups=[]),
    "groups of numbers": repacked(groups=[1]),
    "groups is text": repacked(groups="abc"),
    "groups is a number": repacked(groups=3),
    "an unknown kind": repacked(groups=[group_row(kind="spiral")]),
    "an unknown dtype": repacked(groups=[group_row(dtype="uint8")]),
    "an unknown group field": repacked(groups=[group_row(rank=1)]),
    "layers is a number": repacked(groups=[group_row(layers=1)]),
    "no layers": repacked(groups=[group_row(layers=[])]),
    "a float of a head size": repacked(groups=[group_row(head_size=64.0, v_head_size=64.0)]),
    "v head size left out": repacked(groups=[group_row(v_head_size=None)]),
    "rope is a list": repacked(groups=[group_row(rope=["ab"])]),
    "a chunk of no tokens": repacked(tokens_per_chunk=0),
    "a tail left out": repacked(tokens_per_tail=0),
    "a tail that divides nothing": repacked(tokens_per_tail=33),
    "a true chunk": repacked(tokens_per_chunk=True),
    "overrides is a list": repacked(overrides=["ab"]),
    "overrides is text": repacked(overrides="ab"),
    "nested overrides": repacked(overrides={"a": {}}),
    "weights is a number": repacked(weights=1),
    "weights too deep to print": deep(1000),
    "deeper than msgpack goes": b"\x91" * 5000,
    "a list said to be huge": b"\xdd\xff\xff\xff\xff",
    "a map said to be huge": b"\xdf\xff\xff\xff\xff",
    "text said to be huge": b"\xdb\xff\xff\xff\xff",
    "an extension": b"\xd4\x01\x00",
    "a key that is no text": b"\x81\xc4\x01a\x01",
    "a key twice": b"\x82\xa1a\x01\xa1a\x01",
    "too large": repacked(quality="x" * 70_000),
    "a number in a long form": space()
    .canonical()
    .replace(b"\xcd\x01\x00", b"\xce\x00\x00\x01\x00"),
}


@pytest.mark.parametrize("packed", GARBAGE.values(), ids=GARBAGE)
def test_bytes_that_are_no_canonical_namespace_are_refused(packed: bytes) -> None:
    with pytest.raises(IdentityError) as caught:
        Namespace.from_canonical(packed)
    assert caught.value.hint
    assert len(str(caught.value)) < 400


def test_hostile_bytes_allocate_a_bounded_amount() -> None:
    hostile = [
        b"\xdd\x00\x00\x04\x00" * 13_000,  # 1,024 entries, each a list of 1,024 entries, ...
        b"\xdf\x00\x00\x04\x00\xa1a" * 9_000,
        b"\xdd\x00\x01\x00\x00" * 13_000,
    ]
    tracemalloc.start()
    try:
        for packed in hostile:
            with pytest.raises(IdentityError):
                Namespace.from_canonical(packed)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


@settings(deadline=None)  # a busy machine is no failure
@given(namespaces(), st.data())
def test_one_flipped_byte_is_refused_or_is_another_namespace(
    namespace: Namespace, data: Any
) -> None:
    packed = bytearray(namespace.canonical())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = Namespace.from_canonical(bytes(packed))
    except IdentityError:
        return
    assert found.canonical() == bytes(packed)
    assert found.digest != namespace.digest


json_like = st.recursive(
    scalars | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.dictionaries(
        st.sampled_from([spec.name for spec in fields(Namespace) if spec.init]),
        json_like,
        max_size=3,
    )
)
def test_any_value_in_any_field_is_refused_or_reads_back(changed: Mapping[str, Any]) -> None:
    try:
        packed = repacked(**changed)
    except (OverflowError, ValueError):
        return
    try:
        found = Namespace.from_canonical(packed)
    except KVLayerError as exc:
        assert isinstance(exc, IdentityError)  # noqa: PT017  only the kind of refusal matters
        return
    assert found.canonical() == packed
