"""Every kernel, run from its own source on the CPU, does what the torch stager and numpy do."""

from __future__ import annotations

import os

import numpy as np
import pytest
from cases import NAMED
from checks import CHECKS
from emulator import ORDERS, Emulator, Memory

from kvlayer.identity.keys import Part
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer.payload import Payload
from kvlayer.staging.address import Side, Strip
from kvlayer.staging.geometry import CacheGeometry
from kvlayer.staging.kernels.int8 import dequantize_plan, int8_layer_nbytes, quantize_plan
from kvlayer.staging.kernels.launch import Kernels
from kvlayer.staging.kernels.plan import gather_plan, scatter_plan
from kvlayer.staging.kernels.tables import Layer, Piece
from kvlayer.staging.slots import BlockRun, SlotRuns

GIB = 1 << 30


@pytest.mark.parametrize("check", CHECKS)
def test_a_kernel_equals_its_oracle_over_random_layouts(emulator, check, dose, figures):
    cases = dose(25, 1000) if "SANITIZED_KERNELS" in os.environ else dose(200, 5000)
    for seed in range(cases):
        try:
            CHECKS[check](emulator, np.random.default_rng(seed))
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    figures(f"kernels.{check}", cases=cases)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("blocks", [1, 3, 1000])
def test_neither_the_order_of_threads_nor_the_grid_changes_a_byte(emulator, order, blocks):
    emulator.order, emulator.seed = order, 7
    rng = np.random.default_rng(0)
    row, size, heads, tokens = 48, 4, 3, 100
    strip = one_plane(row=row, size=size, heads=heads, tokens=tokens)
    ids = rng.permutation(tokens // size)
    cache, stage = (Memory(emulator, tokens * heads * row) for _ in range(2))
    cache.array[:] = rng.integers(0, 256, cache.nbytes, dtype=np.uint8)
    stage.array[:] = 0
    runs = SlotRuns(geometry(size), (BlockRun(0, ids),), None)
    plan = gather_plan((strip,), [Layer((cache.address,), 0)], [Piece(runs, stage.address)])
    run(emulator, plan, blocks)
    paged = cache.array.reshape(-1, size, heads, row)[ids].reshape(tokens, heads, row)
    assert np.array_equal(stage.array.reshape(heads, tokens, row), paged.transpose(1, 0, 2))
    for memory in (cache, stage):
        memory.close()


def test_blocks_may_lie_farther_apart_than_32_bits_reach(emulator):
    """Strides and products of block numbers are 64 bits wide; most of this memory is not there."""
    row, far = 64, 3 * GIB + 4096
    space = np.zeros(2 * far + row, np.uint8)  # touched where rows are, so the rest is never held
    emulator.lend(space.ctypes.data, space.nbytes)
    stage = Memory(emulator, 3 * row)
    strip = one_plane(row=row, size=1, heads=1, tokens=3)
    strip = strip._replace(cache=strip.cache._replace(block=far))
    runs = SlotRuns(geometry(1), (BlockRun(0, np.array([2, 0, 1])),), None)
    layer, piece = Layer((space.ctypes.data,), 0), Piece(runs, stage.address)
    stage.array[:] = np.arange(3 * row) % 251 + 1
    run(emulator, scatter_plan((strip,), [layer], [piece]), 2)
    for place, block in enumerate([2, 0, 1]):
        found = space[block * far : block * far + row]
        assert np.array_equal(found, stage.array[place * row : (place + 1) * row])
    wanted = stage.array.copy()
    stage.array[:] = 0
    run(emulator, gather_plan((strip,), [layer], [piece]), 2)
    assert np.array_equal(stage.array, wanted)
    emulator.take_back(space.ctypes.data)
    stage.close()


def test_null_rows_of_a_table_are_skipped(emulator):
    """A table padded with block -1 (a batch of fixed size) moves what is named and no more."""
    row = 32
    cache, stage = (Memory(emulator, 8 * row, fill=fill) for fill in (1, 2))
    strip = one_plane(row=row, size=1, heads=1, tokens=8)
    runs = SlotRuns(geometry(1), (BlockRun(0, np.array([3, -1, 5, -1, -1, 0])),), None)
    plan = gather_plan((strip,), [Layer((cache.address,), 0)], [Piece(runs, stage.address)])
    run(emulator, plan, 1)
    assert stage.array.reshape(8, row)[:, 0].tolist() == [1, 2, 1, 2, 2, 1, 2, 2]
    for memory in (cache, stage):
        memory.close()


def test_what_int8_makes_of_rows_that_are_no_ordinary_numbers(emulator):
    """As its page says, there and back: NaN is 0, an infinity spoils its row, tiny rows are 0."""
    size, largest = 8, np.finfo(np.float32).max
    rows = np.zeros((6, size), np.float32)
    rows[0, :3] = 127, np.nan, -64
    rows[1, :3] = np.inf, 1, -2
    rows[2] = np.nan
    rows[3, 1] = 2.0**-101
    rows[4, :2] = 2.0**-100, -(2.0**-101)
    rows[5, :2] = largest, -largest / 2
    group = KVGroup(AttentionKind.MLA, (0,), "float32", head_size=size)
    payload = Payload.of(group, Part(0, (0, 1), None), len(rows))
    strip = one_plane(row=4 * size, size=1, heads=1, tokens=len(rows))
    runs = SlotRuns(geometry(1), (BlockRun(0, np.arange(len(rows))),), None)
    before, after = (Memory(emulator, rows.nbytes) for _ in range(2))
    stage = Memory(emulator, int8_layer_nbytes(payload))
    before.array[:] = rows.view(np.uint8).reshape(-1)
    for make, cache in ((quantize_plan, before), (dequantize_plan, after)):
        layer, piece = Layer((cache.address,), 0), Piece(runs, stage.address)
        run(emulator, make((strip,), [layer], [piece], payload=payload), 2)
    found = after.array.copy().view(np.float32).reshape(rows.shape)
    for memory in (before, after, stage):
        memory.close()
    assert found[0].tolist() == [127, 0, -64, 0, 0, 0, 0, 0]
    assert np.isnan(found[1]).all()
    assert not found[2:4].any()
    assert found[4, :2] == pytest.approx([2.0**-100, -(2.0**-101)], rel=0.01)
    assert np.isinf(found[5, 0]) and found[5, 1] == pytest.approx(-largest / 2, rel=0.01)


def test_the_named_layouts_are_those_of_engines():
    assert {"vllm nhd", "vllm hnd", "sglang page first", "sglang layer first", "mla"} <= {*NAMED}


def one_plane(*, row: int, size: int, heads: int, tokens: int) -> Strip:
    """K alone, as NHD blocks and as a canonical payload."""
    cache = Side(0, 0, row, size * heads * row, heads * row)
    host = Side(0, 0, tokens * row, size * row, row)
    return Strip(0, 1, heads, tokens // size, size, row, cache, host)


def geometry(size: int) -> CacheGeometry:
    return CacheGeometry((), 1, 1, size, size)


def run(emulator: Emulator, plan, blocks: int) -> None:
    table = Memory(emulator, len(plan.table))
    table.array[:] = plan.table
    Kernels(emulator).launch(None, plan, table.address, blocks=blocks)
    table.close()
