"""Geometry and strips against numbers worked out by hand."""

from __future__ import annotations

import pytest

from kvlayer.identity.keys import Part
from kvlayer.layout import (
    DENSE,
    FUSED_HND,
    HND,
    MLA_BLOCKS,
    NHD,
    NHD_PAIR,
    AttentionKind,
    GroupLayout,
    KVGroup,
)
from kvlayer.payload import Payload
from kvlayer.staging.address import Overlap, Side, Strip, overlap, strips
from kvlayer.staging.geometry import CacheGeometry, Plane, TensorShape, cache_geometry

# 4 heads of 8 x bf16: rows of 16 bytes; blocks of 4 tokens; 10 blocks
GROUP = KVGroup(AttentionKind.MHA, tuple(range(6)), "bfloat16", 4, 8)
MLA = KVGroup(AttentionKind.MLA, tuple(range(6)), "bfloat16", 1, 8)


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, n = [], 1
    for extent in reversed(shape):
        strides.append(n)
        n *= extent
    return tuple(reversed(strides))


def geometry(layout: GroupLayout, *shapes: tuple[int, ...]) -> CacheGeometry:
    return cache_geometry(layout, [TensorShape(s, dense_strides(s), 2) for s in shapes])


def test_planes_of_the_common_layouts() -> None:
    def of(axes: tuple[str, ...], *shapes: tuple[int, ...]) -> tuple[Plane, ...]:
        return geometry(GroupLayout(GROUP, axes, 4), *shapes).planes

    assert of(NHD, (2, 10, 4, 4, 8)) == (
        Plane(0, 0, head=16, block=256, token=64, row=16),
        Plane(0, 2560, head=16, block=256, token=64, row=16),
    )
    assert of(HND, (2, 10, 4, 4, 8))[1] == Plane(0, 2560, head=64, block=256, token=16, row=16)
    assert of(FUSED_HND, (10, 4, 4, 16)) == (
        Plane(0, 0, head=128, block=512, token=32, row=16),
        Plane(0, 16, head=128, block=512, token=32, row=16),
    )
    assert of(NHD_PAIR, (10, 4, 4, 8), (10, 4, 4, 8)) == (
        Plane(0, 0, head=16, block=256, token=64, row=16),
        Plane(1, 0, head=16, block=256, token=64, row=16),
    )


def test_dense_tensors_are_blocks_of_one_token() -> None:
    found = geometry(GroupLayout(GROUP, DENSE), (4, 40, 8), (4, 40, 8))
    assert found.planes[1] == Plane(1, 0, head=640, block=16, token=16, row=16)
    assert (found.blocks, found.rows_per_block, found.tokens_per_block, found.slots) == (
        40,
        1,
        1,
        40,
    )


def test_only_equally_spaced_slots_are_seen_as_blocks_of_one_token() -> None:
    flat = geometry(GroupLayout(GROUP, NHD, 4), (2, 10, 4, 4, 8)).by_token()
    assert flat is not None
    assert flat.planes[0] == Plane(0, 0, head=16, block=64, token=16, row=16)
    assert (flat.blocks, flat.rows_per_block, flat.slots) == (40, 1, 40)
    assert geometry(GroupLayout(GROUP, HND, 4), (2, 10, 4, 4, 8)).by_token() is None
    native = GroupLayout(GROUP, NHD, 4, form="native:x")
    assert geometry(native, (2, 10, 4, 4, 8)).by_token() is None


def test_native_planes_are_whole_blocks_and_outer_axes_stay_outer() -> None:
    native = GroupLayout(GROUP, NHD, 4, form="native:x")
    found = geometry(native, (2, 10, 4, 4, 8))
    assert found.planes == (
        Plane(0, 0, head=256, block=256, token=256, row=256),
        Plane(0, 2560, head=256, block=256, token=256, row=256),
    )
    assert (found.rows_per_block, found.tokens_per_block, found.slots) == (1, 4, 40)


def test_k_and_v_of_one_tensor_are_one_strip() -> None:
    layout = GroupLayout(GROUP, NHD, 4)
    payload = Payload.of(GROUP, Part(0, (0, 6), (0, 4)), 8)
    shared = overlap(layout, payload)
    assert strips(geometry(layout, (2, 10, 4, 4, 8)), payload, shared) == (
        Strip(
            0,
            planes=2,
            heads=4,
            blocks=10,
            rows=4,
            row_nbytes=16,
            cache=Side(0, plane=2560, head=16, block=256, token=64),
            host=Side(0, plane=4 * 8 * 16, head=8 * 16, block=64, token=16),
        ),
    )


def test_a_pair_is_two_strips_and_v_follows_k_in_the_payload() -> None:
    layout = GroupLayout(GROUP, NHD_PAIR, 4)
    payload = Payload.of(GROUP, Part(0, (0, 6), (0, 4)), 8)
    k, v = strips(geometry(layout, (10, 4, 4, 8), (10, 4, 4, 8)), payload, overlap(layout, payload))
    assert (k.tensor, v.tensor, k.planes, v.planes) == (0, 1, 1, 1)
    assert (k.host.offset, v.host.offset) == (0, 4 * 8 * 16)


def test_heads_and_layers_are_cut_to_what_both_hold() -> None:
    layout = GroupLayout(GROUP, NHD, 4, layers=(2, 5), heads=(1, 3))
    payload = Payload.of(GROUP, Part(0, (1, 4), (2, 4)), 8)
    shared = overlap(layout, payload)
    offsets = [payload.layer_offset(i) for i in (1, 2)]
    assert shared == Overlap(((0, offsets[0]), (1, offsets[1])), 1, 0, 1)
    (strip,) = strips(geometry(layout, (2, 10, 4, 2, 8)), payload, shared)
    assert (strip.heads, strip.cache.offset, strip.host.offset) == (1, 16, 0)
    assert strip.host.plane == 2 * 8 * 16  # the payload's heads, not the shared ones

    other = Payload.of(GROUP, Part(0, (1, 4), (0, 2)), 8)
    (strip,) = strips(geometry(layout, (2, 10, 4, 2, 8)), other, overlap(layout, other))
    assert (strip.heads, strip.cache.offset, strip.host.offset) == (1, 0, 8 * 16)


def test_rows_of_a_block_that_touch_become_one_row() -> None:
    for group, axes, shape, nbytes in (
        (GROUP, HND, (2, 10, 4, 4, 8), 64),
        (MLA, MLA_BLOCKS, (10, 4, 8), 64),
        (GROUP, NHD, (2, 10, 4, 4, 8), 16),
    ):
        layout = GroupLayout(group, axes, 4)
        heads = (0, 4) if group is GROUP else None
        payload = Payload.of(group, Part(0, (0, 6), heads), 8)
        (strip,) = strips(geometry(layout, shape), payload, overlap(layout, payload))
        assert strip.whole_blocks().row_nbytes == nbytes


@pytest.mark.parametrize("size", [1, 4])
def test_a_geometry_counts_slots(size: int) -> None:
    layout = GroupLayout(MLA, MLA_BLOCKS, size)
    assert geometry(layout, (10, size, 8)).slots == 10 * size
