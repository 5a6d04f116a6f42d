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
    "Planes",
    "Rows",
    "Tables",
    "alignment",
    "bases_of",
    "packed",
    "planes_of",
    "rows_of",
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


def rows_of(pieces: Sequence[Piece], *, whole_blocks: bool = False) -> Rows:
    """The row table: a row per token, or one per block where whole blocks are one row."""
    found: list[Rows] = []
    for number, piece in enumerate(pieces):
        size = piece.runs.geometry.rows_per_block
        for run in piece.runs.runs:
            first = run.row + np.arange(len(run.ids)) * size
            if whole_blocks:
                found.append(_table(run.ids, 0, number, first))
            else:
                inside = np.tile(np.arange(size), len(run.ids))
                ids, at = np.repeat(run.ids, size), np.repeat(first, size)
                found.append(_table(ids, inside, number, at + inside))
        loose = piece.runs.loose
        if loose is not None:
            found.append(_table(loose.blocks, loose.tokens, number, loose.rows))
    table: Rows = np.concatenate(found) if found else np.empty((0, 4), np.int32)
    return table


def _table(blocks: Any, inside: Any, piece: int, at: Any) -> Rows:
    table: Rows = np.empty((len(blocks), 4), np.int32)
    table[:, 0], table[:, 1], table[:, 2], table[:, 3] = blocks, inside, piece, at
    return table


def alignment(tables: Tables, heads: int) -> tuple[int, int]:
    """The largest powers of two, up to 16, that divide each row's address: cache, staging."""
    planes, rows = tables.planes, tables.rows
    block, inside, row = (int(np.gcd.reduce(rows[:, at])) for at in (0, 1, 3))
    head = int(heads > 1)  # the stride of a single head is never taken

    def common(name: str) -> int:
        return int(np.gcd.reduce(planes[name]))

    cache = gcd(
        common("cache"),
        block * common("cache_block"),
        inside * common("cache_row"),
        head * common("cache_head"),
    )
    stage = gcd(
        common("stage"),
        row * common("stage_row"),
        head * common("stage_head"),
        int(np.gcd.reduce(tables.bases)),
    )
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
