"""Slots of a copy as whole blocks and loose rows. Needs numpy, no tensor library.

Whole blocks are the fast path of every stager: a copy per block or per stretch of neighbouring
blocks. Loose rows are what is left: chunks that begin or end inside a block, holes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from kvlayer.errors import LayoutError
from kvlayer.staging.geometry import CacheGeometry
from kvlayer.staging.lazy import np

if TYPE_CHECKING:
    from numpy import int64
    from numpy.typing import NDArray

__all__ = [
    "BlockRun",
    "IntArray",
    "LooseRows",
    "SlotRuns",
    "SlotTable",
    "block_runs",
    "slot_runs",
    "state_runs",
]

IntArray: TypeAlias = "NDArray[int64]"


class BlockRun(NamedTuple):
    """Whole blocks ``ids``, whose rows follow each other in the payload from row ``row`` on."""

    row: int
    ids: IntArray

    @property
    def stretches(self) -> tuple[tuple[int, int, int], ...]:
        """The same blocks as (position in the run, first block, count) of neighbours."""
        cuts: list[int] = (np.flatnonzero(np.diff(self.ids) != 1) + 1).tolist()
        bounds = [0, *cuts, len(self.ids)]
        return tuple((a, int(self.ids[a]), z - a) for a, z in pairwise(bounds))


class LooseRows(NamedTuple):
    """Single rows: payload row ``rows[i]`` is row ``tokens[i]`` of block ``blocks[i]``."""

    rows: IntArray
    blocks: IntArray
    tokens: IntArray


class SlotRuns(NamedTuple):
    """Everything one copy moves, in the rows and blocks of ``geometry``."""

    geometry: CacheGeometry
    runs: tuple[BlockRun, ...]
    loose: LooseRows | None


class SlotTable:
    """The slots of one group, for the tokens from ``first`` on that a call moves.

    An engine's view is mostly whole blocks, token after token. That is found out for the whole
    call at once, so that each of its copies need not be looked at alone.
    """

    def __init__(self, slots: IntArray, first: int) -> None:
        self._slots = slots
        self._first = first
        self._blocks: dict[int, tuple[IntArray, int] | None] = {}
        """By block size: the ids and the largest of them."""

    def slots(self, first: int, tokens: int) -> IntArray:
        """The slots of ``tokens`` tokens from token ``first`` on."""
        return self._slots[first - self._first :][:tokens]

    def blocks(self, first: int, tokens: int, geometry: CacheGeometry) -> IntArray | None:
        """The ids of these tokens' blocks; None where they must be looked at alone.

        None says nothing about the slots; ids are whole blocks, inside the tensors.
        """
        size = geometry.tokens_per_block
        at = first - self._first
        if at % size or tokens % size:
            return None
        if size not in self._blocks:
            self._blocks[size] = self._whole_blocks(size)
        found = self._blocks[size]
        if found is None or found[1] >= geometry.blocks:
            return None
        return found[0][at // size :][: tokens // size]

    def _whole_blocks(self, size: int) -> tuple[IntArray, int] | None:
        ids = _whole_blocks(self._slots[: len(self._slots) // size * size], size)
        return None if ids is None or not len(ids) else (ids, int(ids.max()))


def slot_runs(slots: IntArray, first_row: int, geometry: CacheGeometry) -> SlotRuns:
    """Split token slots of a canonical copy; entry i is payload row ``first_row + i``.

    Holes (-1) are left out. Where a copy is not made of whole blocks, memory with equally spaced
    slots is seen as blocks of one token, so runs cross block borders and nothing is loose.
    """
    size = geometry.tokens_per_block
    _check_range(slots, geometry)
    whole = _whole_blocks(slots, size)
    if whole is not None:
        single = (BlockRun(first_row, whole),) if len(whole) else ()
        return SlotRuns(geometry, single, None)
    flat = geometry.by_token()
    if flat is not None:
        held = np.flatnonzero(slots >= 0)
        return SlotRuns(flat, _runs(held, slots[held], 1, first_row), None)
    inside = np.arange(size)
    starts = np.flatnonzero((slots >= 0) & (slots % size == 0))
    starts = starts[starts + size <= len(slots)]
    is_whole = (slots[starts[:, None] + inside] == slots[starts, None] + inside).all(axis=1)
    starts = starts[is_whole]
    loose = slots >= 0
    loose[starts[:, None] + inside] = False
    at = np.flatnonzero(loose)
    rows = LooseRows(at + first_row, slots[at] // size, slots[at] % size)
    runs = _runs(starts, slots[starts] // size, size, first_row)
    return SlotRuns(geometry, runs, rows if len(at) else None)


def block_runs(slots: IntArray, first_row: int, geometry: CacheGeometry) -> SlotRuns:
    """Split token slots of a native copy; its rows are blocks, ``first_row`` counts blocks.

    Blocks of holes (-1) are left out. Raises ``LayoutError`` unless slots are whole blocks.
    """
    size = geometry.tokens_per_block
    _check_range(slots, geometry)
    if len(slots) % size == 0:
        table = slots.reshape(-1, size)
        at = np.flatnonzero((table != -1).any(axis=1))
        ids = _whole_blocks(table[at].reshape(-1), size)
        if ids is not None:
            return SlotRuns(geometry, _runs(at, ids, 1, first_row), None)
    raise LayoutError(
        f"a native copy of {len(slots)} tokens must be whole blocks of {size} tokens, in order",
        hint="chunks and tails must be multiples of tokens_per_block and start on a block",
    )


def state_runs(slots: IntArray, geometry: CacheGeometry) -> SlotRuns:
    """The one row of a state copy: the state that lies at the last token's slot, if any."""
    last = slots[-1:]
    _check_range(last, geometry)
    held = last[last >= 0] // geometry.tokens_per_block
    return SlotRuns(geometry, (BlockRun(0, held),) if len(held) else (), None)


def _whole_blocks(slots: IntArray, size: int) -> IntArray | None:
    """Block ids, when ``slots`` are whole blocks and nothing else."""
    if len(slots) % size:
        return None
    table = slots.reshape(-1, size)
    first = table[:, 0]
    if (first < 0).any() or (first % size).any():
        return None
    if size > 1 and not (table == first[:, None] + np.arange(size)).all():
        return None
    return first // size


def _runs(at: IntArray, ids: IntArray, rows: int, first_row: int) -> tuple[BlockRun, ...]:
    """Group blocks at positions ``at`` (counted in rows) that follow each other in the payload."""
    if not len(at):
        return ()
    cuts: list[int] = (np.flatnonzero(np.diff(at) != rows) + 1).tolist()
    bounds = [0, *cuts, len(at)]
    return tuple(BlockRun(int(at[a]) + first_row, ids[a:z]) for a, z in pairwise(bounds))


def _check_range(slots: IntArray, geometry: CacheGeometry) -> None:
    if not len(slots):
        return
    low, high = int(slots.min()), int(slots.max())
    if low < -1 or high >= geometry.slots:
        raise LayoutError(
            f"slot {low if low < -1 else high} is outside 0..{geometry.slots} "
            f"({geometry.blocks} blocks of {geometry.tokens_per_block} tokens)",
            hint="slot = block_id * tokens_per_block + offset, or -1 where nothing is held",
        )
