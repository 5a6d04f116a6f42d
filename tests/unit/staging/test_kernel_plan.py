"""Plans of launches: which vectors fit, what is one row, and what no kernel can do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import FUSED_HND, HND, NHD, AttentionKind, GroupLayout, KVGroup
from kvlayer.payload import Payload
from kvlayer.staging.address import overlap, strips
from kvlayer.staging.geometry import TensorShape, cache_geometry
from kvlayer.staging.kernels.int8 import dequantize_plan, int8_layer_nbytes, quantize_plan
from kvlayer.staging.kernels.launch import THREADS, Kernels
from kvlayer.staging.kernels.plan import gather_plan, scatter_plan
from kvlayer.staging.kernels.rotation import Rotation, rotate_plans
from kvlayer.staging.kernels.tables import Layer, Piece
from kvlayer.staging.slots import BlockRun, LooseRows, SlotRuns, slot_runs

SIZE, BLOCKS, TOKENS, BASE, CACHE = 16, 8, 32, 1 << 20, 1 << 30
MHA = KVGroup(AttentionKind.MHA, (0, 1), "bfloat16", num_kv_heads=4, head_size=128)
HALF = Rotation("neox", (1.0,) * 32)


class Move:
    """What a stager knows of one copy, of all tokens of ``TOKENS``."""

    def __init__(self, group: KVGroup = MHA, axes=NHD, slots=None, form="canonical") -> None:
        extents = {"kv": 2, "block": BLOCKS, "token": SIZE, "head": group.num_kv_heads}
        shape = [extents.get(axis, sum(group.planes())) for axis in axes]
        shape[-1] = group.head_size if axes[-1] == "dim" else shape[-1]
        strides = np.cumprod([1, *shape[:0:-1]])[::-1].tolist()
        layout = GroupLayout(group, axes, tokens_per_block=SIZE, form=form)
        geometry = cache_geometry(
            layout, [TensorShape(tuple(shape), tuple(strides), group.itemsize)]
        )
        heads = (0, group.num_kv_heads) if group.kind is AttentionKind.MHA else None
        self.payload = Payload.of(group, Part(0, (0, 2), heads, form), TOKENS)
        self.runs = slot_runs(np.arange(TOKENS) if slots is None else slots, 0, geometry)
        self.strips = strips(self.runs.geometry, self.payload, overlap(layout, self.payload))
        self.layers = [Layer((CACHE,), at=self.payload.layer_offset(layer)) for layer in (0, 1)]

    def plan(self, make=gather_plan, *, base=BASE, shift=0, **more):
        pieces = [Piece(self.runs, base, shift)]
        return make(self.strips, self.layers, pieces, **more)


def test_a_plan_names_its_kernel_and_packs_its_arrays_at_multiples_of_16():
    plan = Move().plan()
    assert (plan.source, plan.kernel) == ("copy", "kv_gather")
    assert plan.starts[0] == 0 and all(start % 16 == 0 for start in plan.starts)
    planes, rows, heads = plan.numbers[:3]
    assert (planes, rows, heads) == (4, TOKENS, 4)
    assert len(plan.table) == plan.starts[2] + rows * 16
    assert plan.starts[1] == planes * 64
    assert plan.nbytes == 2 * 2 * TOKENS * 4 * 256


def test_blocks_in_one_piece_in_both_memories_are_one_row_each():
    whole, by_token = Move(axes=HND).plan(), Move(axes=NHD).plan()
    assert whole.numbers[1] == TOKENS // SIZE
    assert by_token.numbers[1] == TOKENS
    assert whole.nbytes == by_token.nbytes


def test_a_row_shared_with_its_value_is_no_whole_block():
    assert Move(axes=FUSED_HND).plan().numbers[1] == TOKENS


@pytest.mark.parametrize(
    ("base", "width"), [(BASE, 16), (BASE + 8, 8), (BASE + 4, 4), (BASE + 1, 1)]
)
def test_vectors_are_as_wide_as_every_address_allows(base, width):
    assert Move().plan(base=base).numbers[-1] == width


def test_an_odd_head_size_narrows_the_vectors():
    assert Move(replace(MHA, head_size=20)).plan().numbers[-1] == 8
    assert Move(replace(MHA, head_size=3, dtype="fp8_e4m3")).plan().numbers[-1] == 1


def test_a_plan_of_nothing_is_refused():
    move = Move()
    empty = SlotRuns(move.runs.geometry, (), None)
    assert Piece(empty, BASE).is_empty and not Piece(move.runs, BASE).is_empty
    loose = LooseRows(*(np.array([1]) for _ in range(3)))
    assert not Piece(empty._replace(loose=loose), BASE).is_empty
    with pytest.raises(LayoutError, match="at least one plane and one row"):
        gather_plan(move.strips, move.layers, [Piece(empty, BASE)])


def test_pieces_that_moved_are_turned_and_the_others_copied():
    move = Move()
    pieces = [Piece(move.runs, BASE), Piece(move.runs, BASE + (1 << 20), shift=-7)]
    plans = rotate_plans(move.strips, move.layers, pieces, payload=move.payload, rotation=HALF)
    assert [plan.kernel for plan in plans] == ["kv_scatter", "kv_rotate_neox_bf16", "kv_scatter"]
    assert [plan.numbers[0] for plan in plans] == [4, 2, 2]
    assert sum(plan.nbytes for plan in plans) == 2 * move.plan(scatter_plan).nbytes
    still = move.plan(rotate_plans, payload=move.payload, rotation=HALF)
    assert [plan.kernel for plan in still] == ["kv_scatter"]


def test_angles_are_exact_for_shifts_far_apart():
    turns = Rotation("gptj", (1.0, 1e-4)).turns([0, 1 << 20])
    assert turns.shape == (2, 2, 2)
    assert turns[0].tolist() == [[1, 1], [0, 0]]
    angles = (1 << 20) * np.array([1.0, 1e-4])
    assert np.array_equal(turns[1], np.array([np.cos(angles), np.sin(angles)], np.float32))


@pytest.mark.parametrize(
    ("group", "rotation", "message"),
    [
        (replace(MHA, dtype="fp8_e4m3"), HALF, "cannot rotate rows of fp8_e4m3"),
        (MHA, Rotation("neox", (1.0,) * 65), "elements 0..130 of a row of 128"),
        (MHA, Rotation("neox", (1.0,) * 32, first=96), "elements 96..160 of a row of 128"),
        (MHA, Rotation("neox", ()), "elements 0..0"),
    ],
)
def test_what_cannot_be_rotated_is_refused(group, rotation, message):
    move = Move(group)
    with pytest.raises(LayoutError, match=message):
        move.plan(rotate_plans, shift=1, payload=move.payload, rotation=rotation)


def test_native_blocks_are_neither_rotated_nor_quantised():
    move = Move()
    native = replace(move.payload, part=replace(move.payload.part, form="native:x"))
    with pytest.raises(LayoutError, match="form native:x"):
        move.plan(rotate_plans, shift=1, payload=native, rotation=HALF)
    with pytest.raises(LayoutError, match="form native:x"):
        move.plan(quantize_plan, payload=native)


def test_the_int8_form_of_128_floats_of_16_bits_is_about_half_as_large():
    payload = Move().payload
    assert int8_layer_nbytes(payload) / payload.layer_nbytes == pytest.approx(0.516, abs=1e-3)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (replace(MHA, dtype="fp8_e5m2"), "cannot quantise rows of fp8_e5m2"),
        (replace(MHA, head_size=20), r"whole 16-byte vectors, .* found \[40, 40\]"),
        (replace(MHA, head_size=1032), r"at most 2048 bytes, found \[2064, 2064\]"),
    ],
)
def test_rows_that_no_int8_kernel_takes_are_refused(group, message):
    move = Move(group)
    for make in (quantize_plan, dequantize_plan):
        with pytest.raises(LayoutError, match=message):
            move.plan(make, payload=move.payload)


def test_int8_rows_begin_on_multiples_of_16():
    move = Move()
    with pytest.raises(LayoutError, match="multiples of 16"):
        move.plan(quantize_plan, payload=move.payload, base=BASE + 4)


class Recorder:
    """Functions that note how they were called."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def function(self, source: str, kernel: str):
        def call(grid, block, args, stream=None):
            self.calls.append((source, kernel, grid, block, args, stream))

        return call


@pytest.mark.parametrize(("blocks", "grid"), [(1, 1), (3, 3), (10_000, 4), (0, 1)])
def test_a_launch_runs_as_many_blocks_as_it_may_and_has_work_for(blocks, grid):
    functions, plan, stream = Recorder(), Move().plan(), object()
    Kernels(functions).launch(stream, plan, 4096, blocks=blocks)
    ((source, kernel, found, block, args, queue),) = functions.calls
    assert (source, kernel, queue) == ("copy", "kv_gather", stream)
    assert (found, block) == ((grid,), (THREADS,))
    assert [int(arg) for arg in args] == [*(4096 + start for start in plan.starts), *plan.numbers]
    assert {type(arg) for arg in args} == {np.uint64, np.uint32}


def test_rows_and_planes_say_where_each_row_lies():
    """The table of two pieces, read back: block, row of the block, piece, row of the payload."""
    move = Move(slots=np.array([40, 41, -1, *range(64, 80), *range(13)]))
    pieces = [
        Piece(move.runs, BASE),
        Piece(SlotRuns(move.runs.geometry, (BlockRun(0, np.array([5])),), None), BASE),
    ]
    plan = gather_plan(move.strips, move.layers, pieces)
    rows = plan.table[plan.starts[2] :].view(np.int32).reshape(-1, 4)
    assert (rows[:2] == [[40, 0, 0, 0], [41, 0, 0, 1]]).all()
    assert rows[-1].tolist() == [5, 0, 1, 0]
    assert (rows[:, 3] != 2).all()  # a hole is no row
