"""Slots split into runs: every token exactly once, blocks wherever there are whole ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlayer.errors import LayoutError
from kvlayer.staging.geometry import CacheGeometry, Plane
from kvlayer.staging.slots import SlotRuns, SlotTable, block_runs, slot_runs

ROW = 16


def geometry(size: int, spaced: bool = False) -> CacheGeometry:
    block = size * ROW if spaced else size * ROW + 4
    return CacheGeometry((Plane(0, 0, ROW, block, ROW, ROW),), 1, 64, size, size)


def moved(runs: SlotRuns) -> dict[int, int]:
    """Payload row -> slot, of everything the runs move."""
    size = runs.geometry.rows_per_block
    pairs: list[tuple[int, int]] = []
    for run in runs.runs:
        stretched = [b + i for _, b, n in run.stretches for i in range(n)]
        assert stretched == run.ids.tolist()
        assert [p for p, _, _ in run.stretches] == np.cumsum(
            [0, *(n for _, _, n in run.stretches)]
        ).tolist()[:-1]
        for at, block in enumerate(run.ids.tolist()):
            pairs += [(run.row + at * size + t, block * size + t) for t in range(size)]
    if runs.loose is not None:
        rows, blocks, tokens = (a.tolist() for a in runs.loose)
        pairs += [(r, b * size + t) for r, b, t in zip(rows, blocks, tokens, strict=True)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@given(st.data(), st.sampled_from([1, 2, 3, 4]), st.booleans(), st.integers(0, 5))
def test_runs_cover_every_held_token_exactly_once(
    data: st.DataObject, size: int, spaced: bool, first: int
) -> None:
    pieces = st.tuples(st.integers(-2, 10), st.integers(0, 3), st.integers(1, 9))
    slots: list[int] = []
    for block, offset, count in data.draw(st.lists(pieces, max_size=6)):
        start = block * size + offset
        slots += [start + i for i in range(count)] if block >= 0 else [-1] * count
    runs = slot_runs(np.array(slots, dtype=np.int64), first, geometry(size, spaced))
    expected = {first + i: s for i, s in enumerate(slots) if s >= 0}
    assert moved(runs) == expected


def test_whole_blocks_are_one_run_with_nothing_loose() -> None:
    slots = np.array([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7])
    runs = slot_runs(slots, 0, geometry(4))
    assert runs.loose is None
    (run,) = runs.runs
    assert (run.row, run.ids.tolist()) == (0, [2, 0, 1])
    assert run.stretches == ((0, 2, 1), (1, 0, 2))


def test_a_chunk_that_begins_and_ends_inside_a_block_keeps_its_whole_blocks() -> None:
    runs = slot_runs(np.arange(2, 15), 0, geometry(4))
    (run,) = runs.runs
    assert (run.row, run.ids.tolist()) == (2, [1, 2])
    assert runs.loose is not None
    assert runs.loose.rows.tolist() == [0, 1, 10, 11, 12]


def test_equally_spaced_slots_cross_block_borders_in_one_stretch() -> None:
    runs = slot_runs(np.arange(2, 15), 0, geometry(4, spaced=True))
    (run,) = runs.runs
    assert runs.loose is None
    assert run.stretches == ((0, 2, 13),)


def test_holes_split_runs() -> None:
    slots = np.array([-1, -1, 4, 5, -1, -1, 6, 7, 0, 1])
    runs = slot_runs(slots, 10, geometry(2))
    assert [(r.row, r.ids.tolist()) for r in runs.runs] == [(12, [2]), (16, [3, 0])]
    native = block_runs(slots, 10, geometry(2)._replace(rows_per_block=1))
    assert [(r.row, r.ids.tolist()) for r in native.runs] == [(11, [2]), (13, [3, 0])]


@pytest.mark.parametrize("block", [0, 62, 63, 64, 65, 1000])
def test_a_block_outside_the_tensors_is_never_taken_for_one_of_theirs(block: int) -> None:
    """There are 64: the whole call's table answers for those alone, and the others are refused."""
    shape = geometry(4)
    slots = np.concatenate([np.arange(8, 16), np.arange(4) + 4 * block])
    table = SlotTable(slots, 100)
    found = table.blocks(108, 4, shape)
    if block < shape.blocks:
        assert found is not None and found.tolist() == [block]
        assert table.blocks(100, 12, shape).tolist() == [2, 3, block]  # type: ignore[union-attr]
        slot_runs(slots, 0, shape)
    else:
        assert found is None
        assert table.blocks(100, 12, shape) is None
        with pytest.raises(LayoutError, match="is outside"):
            slot_runs(slots, 0, shape)


def test_a_table_answers_only_for_whole_blocks() -> None:
    table, shape = SlotTable(np.arange(8, 20), 100), geometry(4)
    assert table.blocks(101, 4, shape) is None and table.blocks(100, 6, shape) is None
    assert table.slots(103, 5).tolist() == [11, 12, 13, 14, 15]
    assert SlotTable(np.array([9, 10, 11, 12]), 0).blocks(0, 4, shape) is None
    assert SlotTable(np.array([-1, -1, -1, -1]), 0).blocks(0, 4, shape) is None
