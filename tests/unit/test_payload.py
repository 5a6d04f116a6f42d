"""Where the bytes of one object lie: in order, complete, few enough for one header."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import DTYPE_NBYTES, AttentionKind, HitRule, KVGroup
from kvlayer.payload import Payload, align


def mha(layers: int = 30, heads: int = 3, size: int = 64, **changed: Any) -> KVGroup:
    return KVGroup(AttentionKind.MHA, tuple(range(layers)), "bfloat16", heads, size, **changed)


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    kind = draw(st.sampled_from(AttentionKind))
    layers, heads = draw(st.integers(1, 300)), draw(st.integers(1, 16))
    is_state = kind is AttentionKind.STATE
    group = KVGroup(
        kind,
        tuple(range(layers)),
        draw(st.sampled_from(sorted(DTYPE_NBYTES))),
        num_kv_heads=heads,
        head_size=draw(st.integers(1, 600)),
        v_head_size=draw(st.none() | st.integers(1, 600)),
        hit_rule=HitRule.TRAILING if is_state else HitRule.EVERY_CHUNK,
        window_tokens=1 if is_state else None,
        state_nbytes=draw(st.integers(1, 3_000_000)) if is_state else 0,
    )
    first = draw(st.integers(0, layers - 1))
    low = draw(st.integers(0, heads - 1))
    part = Part(
        draw(st.integers(0, 3)),
        (first, draw(st.integers(first + 1, layers))),
        (low, draw(st.integers(low + 1, heads))) if kind is AttentionKind.MHA else None,
    )
    return Payload.of(group, part, draw(st.integers(1, 1024)))


@settings(deadline=None)  # a busy machine is no failure
@given(payloads())
def test_segments_lie_back_to_back_and_are_padded_once(payload: Payload) -> None:
    end = 0
    for segment in payload.segments():
        assert segment.offset == end
        assert segment.nbytes > 0
        end = segment.offset + segment.nbytes
    assert payload.body_nbytes == end
    assert payload.nbytes == align(end)


@settings(deadline=None)  # a busy machine is no failure
@given(payloads())
def test_segments_cover_every_layer_once_and_in_order(payload: Payload) -> None:
    layers = [
        layer
        for segment in payload.segments()
        for layer in range(segment.layer, segment.layer + segment.num_layers)
    ]
    assert layers == list(range(payload.num_layers))
    for segment in payload.segments():
        assert segment.nbytes == segment.num_layers * payload.layer_nbytes


@settings(deadline=None)  # a busy machine is no failure
@given(payloads())
def test_each_layer_lies_where_its_segment_says(payload: Payload) -> None:
    for segment in payload.segments():
        for inside in range(segment.num_layers):
            offset = segment.offset + inside * payload.layer_nbytes
            assert payload.layer_offset(segment.layer + inside) == offset


@settings(deadline=None)  # a busy machine is no failure
@given(payloads())
def test_one_header_can_list_all_segments(payload: Payload) -> None:
    assert 1 <= len(payload.segments()) <= 64


@settings(deadline=None)  # a busy machine is no failure
@given(payloads())
def test_the_bytes_are_those_of_every_element(payload: Payload) -> None:
    group, count = payload.group, payload.num_layers
    rows = {
        AttentionKind.MHA: lambda: payload.num_heads * sum(group.planes()) * group.itemsize,
        AttentionKind.MLA: lambda: group.head_size * group.itemsize,
        AttentionKind.STATE: lambda: 0,
    }[group.kind]()
    raw = sum(segment.nbytes for segment in payload.segments())
    is_state = group.kind is AttentionKind.STATE
    assert raw == count * (group.state_nbytes if is_state else payload.tokens * rows)


def test_a_known_model_has_the_known_size() -> None:
    payload = Payload.of(mha(), Part(0, (0, 30), (0, 3)), 256)
    assert sum(segment.nbytes for segment in payload.segments()) == 23_040 * 256  # SmolLM2-135M
    assert payload.layer_nbytes == 196_608
    assert [segment.num_layers for segment in payload.segments()] == [2] * 15
    assert payload.nbytes == payload.body_nbytes == 23_040 * 256


def test_a_half_of_the_heads_is_half_of_the_bytes() -> None:
    group = mha(heads=4)
    whole, half = (Payload.of(group, Part(0, (0, 30), (0, high)), 256) for high in (4, 2))
    assert 2 * half.layer_nbytes == whole.layer_nbytes
    assert (whole.num_heads, half.num_heads) == (4, 2)


@pytest.mark.parametrize(("nbytes", "aligned"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_align_rounds_up(nbytes: int, aligned: int) -> None:
    assert align(nbytes) == aligned


MLA = KVGroup(AttentionKind.MLA, (0, 1), "bfloat16", head_size=576)


@pytest.mark.parametrize(
    ("group", "part", "tokens"),
    [
        (mha(2), Part(0, (0, 3), (0, 3)), 8),
        (mha(2), Part(0, (0, 2), (0, 4)), 8),
        (mha(2), Part(0, (0, 2), None), 8),
        (MLA, Part(0, (0, 2), (0, 1)), 8),
        (mha(2), Part(0, (0, 2), (0, 3)), 0),
    ],
    ids=["layer", "head", "no heads", "heads of MLA", "no token"],
)
def test_a_part_the_group_does_not_have_has_no_payload(
    group: KVGroup, part: Part, tokens: int
) -> None:
    with pytest.raises(LayoutError):
        Payload.of(group, part, tokens)
