"""What one launch does: which kernel, its table, how threads share the rows. Pure arithmetic.

A kernel's work is cut into tiles: one plane, up to 64 rows, all heads. A thread block takes a tile
at a time. In it, groups of 1 to 32 lanes take a row of one head (or 32 vectors of a longer one)
each, a vector of up to 16 bytes per lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvlayer.errors import LayoutError
from kvlayer.staging.address import Strip
from kvlayer.staging.kernels.tables import (
    VECTOR_NBYTES,
    Addresses,
    Layer,
    Piece,
    Planes,
    PlaneSteps,
    Rows,
    RowSteps,
    Tables,
    bases_of,
    packed,
    plane_steps,
    planes_of,
    row_steps,
    rows_of,
    widest,
)
from kvlayer.staging.lazy import np

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

__all__ = [
    "CopyPlanes",
    "Plan",
    "Shape",
    "are_whole",
    "copy_shape",
    "copy_tables",
    "gather_plan",
    "lanes_log2",
    "make_plan",
    "scatter_plan",
]

_MAX_TILE_LOG2 = 6  # MAX_TILE in kv.cuh
_MAX_LANES_LOG2 = 5  # a warp
# Every thread of a block has work, and few rows keep many blocks busy.
_TILE_NBYTES = 64 << 10
_MAX_ROWS = 1 << 31


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One launch.

    ``table`` must be in memory the device reads, at a multiple of 16, from before the launch until
    it has ended. ``source`` names the ``.cu`` file and ``kernel`` a function in it, whose arguments
    are the addresses of the arrays that begin ``starts`` bytes into the table, then ``numbers``
    (unsigned, 32 bits). More than ``tiles`` thread blocks have nothing to do. ``nbytes`` is what
    moves, counted in the cache.
    """

    source: str
    kernel: str
    table: NDArray[uint8]
    starts: tuple[int, ...]
    numbers: tuple[int, ...]
    tiles: int
    nbytes: int


class Shape(NamedTuple):
    """What a plan says beside its kernel and where its tables lie: see :class:`Plan`."""

    numbers: tuple[int, ...]
    tiles: int
    nbytes: int


class CopyPlanes(NamedTuple):
    """Planes for ``copy.cu`` and what counts of them: several plans may share them.

    ``longest`` is the longest row of a head, ``row_nbytes`` one row of a head of each plane.
    """

    planes: Planes
    heads: int
    steps: PlaneSteps
    longest: int
    row_nbytes: int

    @classmethod
    def of(cls, strips: Sequence[Strip], layers: Sequence[Layer], *, whole: bool) -> CopyPlanes:
        """``whole``: of blocks that :func:`are_whole`, for pieces that have no loose rows."""
        blocks = [strip.whole_blocks() for strip in strips] if whole else strips
        return cls.counted(planes_of(blocks, layers), strips[0].heads)

    @classmethod
    def counted(cls, planes: Planes, heads: int) -> CopyPlanes:
        """Any planes."""
        _check_counts(len(planes), 1)
        longest, row_nbytes = _row_nbytes(planes)
        return cls(planes, heads, plane_steps(planes), longest, row_nbytes)

    def width(self, base: int) -> int:
        """The widest vectors that the addresses of any rows allow, whatever their numbers."""
        return min(widest(self.steps, RowSteps(1, 1, 1, 1), base, self.heads))


def are_whole(strips: Sequence[Strip]) -> bool:
    """Whether blocks lie in one piece in both memories: then a block that moves whole is a row."""
    return all(strip.whole_blocks().rows == 1 for strip in strips)


def gather_plan(strips: Sequence[Strip], layers: Sequence[Layer], pieces: Sequence[Piece]) -> Plan:
    """Rows from the cache to staging memory, as they lie in the payload."""
    return _copy_plan("kv_gather", strips, layers, pieces)


def scatter_plan(strips: Sequence[Strip], layers: Sequence[Layer], pieces: Sequence[Piece]) -> Plan:
    """Rows from staging memory, where they lie as in the payload, to the cache."""
    return _copy_plan("kv_scatter", strips, layers, pieces)


def _copy_plan(
    kernel: str, strips: Sequence[Strip], layers: Sequence[Layer], pieces: Sequence[Piece]
) -> Plan:
    runs = [piece.runs for piece in pieces]
    whole = are_whole(strips) and all(each.loose is None for each in runs)
    planes, rows = CopyPlanes.of(strips, layers, whole=whole), rows_of(runs, whole_blocks=whole)
    return _alone(kernel, planes, rows, bases_of(pieces))


def copy_tables(kernel: str, tables: Tables, heads: int) -> Plan:
    """A plan of ``copy.cu`` from its tables."""
    return _alone(kernel, CopyPlanes.counted(tables.planes, heads), tables.rows, tables.bases)


def _alone(kernel: str, planes: CopyPlanes, rows: Rows, bases: Addresses) -> Plan:
    """A plan with tables of its own."""
    _check_counts(1, len(rows))
    shape = copy_shape(planes, rows, int(np.gcd.reduce(bases)))
    table, starts = packed((planes.planes, bases, rows))
    return Plan("copy", kernel, table, starts, *shape)


def copy_shape(planes: CopyPlanes, rows: Rows, base: int) -> Shape:
    """These rows of these planes, by the widest vectors that every row's address allows.

    ``base`` divides the bases of all pieces.
    """
    width = planes.width(base)
    if width < VECTOR_NBYTES:
        width = min(widest(planes.steps, row_steps(rows), base, planes.heads))
    vectors = -(-planes.longest // width)
    lanes = lanes_log2(vectors)
    counts = len(planes.planes), len(rows), planes.heads
    nbytes = planes.longest, planes.row_nbytes
    return _shape(counts, nbytes, lanes, (-(-vectors >> lanes), width))


def lanes_log2(vectors: int) -> int:
    """How many lanes share a row of this many vectors, as a power of two."""
    return min(_MAX_LANES_LOG2, (vectors - 1).bit_length())


def make_plan(  # noqa: PLR0917 - a kernel's arguments, in their order
    source: str,
    kernel: str,
    tables: Tables,
    heads: int,
    lanes: int,
    numbers: tuple[int, ...],
    arrays: Sequence[NDArray[Any]] = (),
) -> Plan:
    """A plan of any kernel: planes, bases, rows, ``arrays``; counts, then ``numbers``."""
    planes, rows = len(tables.planes), len(tables.rows)
    _check_counts(planes, rows)
    shape = _shape((planes, rows, heads), _row_nbytes(tables.planes), lanes, numbers)
    table, starts = packed((*tables, *arrays))
    return Plan(source, kernel, table, starts, *shape)


def _row_nbytes(planes: Planes) -> tuple[int, int]:
    """Bytes of the longest row of a head, and of one row of a head of each plane."""
    nbytes = planes["row_nbytes"]
    return int(nbytes.max()), int(nbytes.sum())


def _shape(
    counts: tuple[int, int, int], nbytes: tuple[int, int], lanes: int, numbers: tuple[int, ...]
) -> Shape:
    """``counts``: planes, rows, heads; ``nbytes``: as of ``_row_nbytes``."""
    planes, rows, heads = counts
    longest, row_nbytes = nbytes
    tile = max(0, min(_MAX_TILE_LOG2, (_TILE_NBYTES // (heads * longest)).bit_length() - 1))
    tiles = planes * -(-rows >> tile)
    if rows >= _MAX_ROWS or tiles >= _MAX_ROWS:
        raise LayoutError(f"a launch moves fewer than 2^31 rows and tiles, found {rows}, {tiles}")
    return Shape((*counts, tile, lanes, *numbers), tiles, heads * row_nbytes * rows)


def _check_counts(planes: int, rows: int) -> None:
    if not planes or not rows:
        raise LayoutError("a launch needs at least one plane and one row, found none")
