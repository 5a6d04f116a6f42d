"""The arrays one launch reads: planes, bases of pieces, rows. Needs numpy, no tensor library.

Their layout is the structs ``Plane`` and ``Row`` of ``kv.cuh``. Addresses are plain integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kvlayer.staging.address import Strip
from kvlayer.staging.lazy import np
from kvlayer.staging.slots import SlotRuns

if TYPE_CHECKING:
    from numpy import int32, uint8, uint64
    from numpy.typing import NDArray

__all__ = [
    "VECTOR_NBYTES",
    "Addresses",
    "Layer",
    "Piece",
    "PlaneSteps",
    "Planes",
    "RowSteps",
    "Rows",
    "Tables",
    "alignment",
    "bases_of",
    "packed",
    "plane_steps",
    "planes_of",
    "row_steps",
    "rows_of",
    "widest",
]

Planes: TypeAlias = "NDArray[Any]"
"""Structured, an element per plane of each layer: ``struct Plane``."""
Addresses: TypeAlias = "NDArray[uint64]"
Rows: TypeAlias = "NDArray[int32]"
"""``(rows, 4)``: block, row in the block, piece, row in the payload: ``struct Row``."""

VECTOR_NBYTES = 16  # the widest access of a thread
_PLANE_FIELDS = [
    ("cache", "<u8"),  # address of head 0, block 0, row 0
    ("cache_block", "<u8"),  # strides in bytes
    ("cache_row", "<u8"),
    ("cache_head", "<u8"),
    ("stage", "<u8"),  # of head 0, row 0, counted from a piece's base
    ("stage_head", "<u8"),
    ("stage_row", "<u4"),
    ("row_nbytes", "<u4"),  # of a row in the cache
    ("scale", "<u8"),  # int8 only: of the scale of head 0, row 0, counted from a piece's base
]


class Layer(NamedTuple):
    """One layer: the addresses of its tensors' first elements, and where it begins in a piece."""

    tensors: tuple[int, ...]
    at: int


class Piece(NamedTuple):
    """One payload, or some layers of it: the rows that move, and its address in staging memory.

    ``shift`` says by how many positions its tokens have moved since their keys were rotated (new
    position minus old); only ``rotate_plans`` reads it.
    """

    runs: SlotRuns
    base: int
    shift: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether it is holes and nothing else; a plan needs one piece that is not."""
        return self.runs.loose is None and not self.runs.runs


class Tables(NamedTuple):
    """What every kernel reads."""

    planes: Planes
    bases: Addresses
    rows: Rows


class PlaneSteps(NamedTuple):
    """What divides a field in all planes: greatest common divisors."""

    cache: int
    cache_block: int
    cache_row: int
    cache_head: int
    stage: int
    stage_head: int
    stage_row: int


class RowSteps(NamedTuple):
    """What divides a column in all rows."""

    block: int
    inside: int
    piece: int
    row: int


def planes_of(strips: Sequence[Strip], layers: Sequence[Layer]) -> Planes:
    """The plane table: layer by layer, K before V."""
    found = [
        (
            layer.tensors[strip.tensor] + strip.cache.offset + plane * strip.cache.plane,
            strip.cache.block,
            strip.cache.token,
            strip.cache.head,
            layer.at + strip.host.offset + plane * strip.host.plane,
            strip.host.head,
            strip.host.token,
            strip.row_nbytes,
            0,
        )
        for layer in layers
        for strip in strips
        for plane in range(strip.planes)
    ]
    planes: Planes = np.array(found, _PLANE_FIELDS)
    return planes


def bases_of(pieces: Sequence[Piece]) -> Addresses:
    """The pieces' addresses, by their number."""
    bases: Addresses = np.array([piece.base for piece in pieces], np.uint64)
    return bases


def rows_of(runs: Sequence[SlotRuns], *, whole_blocks: bool = False) -> Rows:
    """The row table of pieces with these runs: a row per token, or one per block where whole
    blocks are one row."""
    counts = [_count(each, whole_blocks) for each in runs]
    table: Rows = np.empty((sum(counts), 4), np.int32)
    at = 0
    for number, (each, count) in enumerate(zip(runs, counts, strict=True)):
        mine = table[at : at + count]
        mine[:, 2] = number
        _fill_rows(mine, each, whole_blocks)
        at += count
    return table


def _count(runs: SlotRuns, whole_blocks: bool) -> int:
    blocks = sum(len(run.ids) for run in runs.runs)
    loose = 0 if runs.loose is None else len(runs.loose.rows)
    return loose + blocks * (1 if whole_blocks else runs.geometry.rows_per_block)


def _fill_rows(table: Rows, runs: SlotRuns, whole_blocks: bool) -> None:
    """All but the pieces' numbers: a block's rows one after the other, loose ones last."""
    size = runs.geometry.rows_per_block
    rows = 1 if whole_blocks else size
    inside = np.arange(rows)
    at = 0
    for run in runs.runs:
        count = len(run.ids)
        mine = table[at : at + count * rows].reshape(count, rows, 4)
        mine[:, :, 0] = run.ids[:, None]
        mine[:, :, 1] = inside
        mine[:, :, 3] = (run.row + np.arange(count) * size)[:, None] + inside
        at += count * rows
    if runs.loose is not None:
        loose = table[at:]
        loose[:, 0], loose[:, 1], loose[:, 3] = (
            runs.loose.blocks,
            runs.loose.tokens,
            runs.loose.rows,
        )


def alignment(tables: Tables, heads: int) -> tuple[int, int]:
    """The largest powers of two, up to 16, that divide each row's address: cache, staging."""
    planes, rows = plane_steps(tables.planes), row_steps(tables.rows)
    return widest(planes, rows, int(np.gcd.reduce(tables.bases)), heads)


def plane_steps(planes: Planes) -> PlaneSteps:
    words = np.ascontiguousarray(planes).view(np.uint64).reshape(len(planes), -1)
    # Six fields of eight bytes come first.
    found = [*np.gcd.reduce(words[:, :6], axis=0).tolist(), np.gcd.reduce(planes["stage_row"])]
    return PlaneSteps(*map(int, found))


def row_steps(rows: Rows) -> RowSteps:
    return RowSteps(*np.gcd.reduce(rows, axis=0).tolist())


def widest(planes: PlaneSteps, rows: RowSteps, base: int, heads: int) -> tuple[int, int]:
    """As :func:`alignment`; ``base`` divides the base of every piece."""
    head = int(heads > 1)  # the stride of a single head is never taken
    cache = gcd(
        planes.cache,
        rows.block * planes.cache_block,
        rows.inside * planes.cache_row,
        head * planes.cache_head,
    )
    stage = gcd(planes.stage, rows.row * planes.stage_row, head * planes.stage_head, base)
    return gcd(cache, VECTOR_NBYTES), gcd(stage, VECTOR_NBYTES)


def packed(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[uint8], tuple[int, ...]]:
    """The arrays' bytes in one buffer, and where each begins: on a multiple of 16."""
    starts: list[int] = []
    nbytes = 0
    for array in arrays:
        starts.append(nbytes)
        nbytes += -(-array.nbytes // VECTOR_NBYTES) * VECTOR_NBYTES
    table: NDArray[uint8] = np.zeros(nbytes, np.uint8)
    for start, array in zip(starts, arrays, strict=True):
        table[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return table, tuple(starts)
