"""What one launch does: which kernel, its table, how threads share the rows. Pure arithmetic.

A kernel's work is cut into tiles: one plane, up to 64 rows, all heads. A thread block takes a tile
at a time. In it, groups of 1 to 32 lanes take a row of one head (or 32 vectors of a longer one)
each, a vector of up to 16 bytes per lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvlayer.errors import LayoutError
from kvlayer.staging.address import Strip
from kvlayer.staging.kernels.tables import (
    Layer,
    Piece,
    Tables,
    alignment,
    bases_of,
    packed,
    planes_of,
    rows_of,
)

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

__all__ = ["Plan", "copy_tables", "gather_plan", "lanes_log2", "make_plan", "scatter_plan"]

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


def gather_plan(strips: Sequence[Strip], layers: Sequence[Layer], pieces: Sequence[Piece]) -> Plan:
    """Rows from the cache to staging memory, as they lie in the payload."""
    return copy_tables("kv_gather", *_copied(strips, layers, pieces))


def scatter_plan(strips: Sequence[Strip], layers: Sequence[Layer], pieces: Sequence[Piece]) -> Plan:
    """Rows from staging memory, where they lie as in the payload, to the cache."""
    return copy_tables("kv_scatter", *_copied(strips, layers, pieces))


def _copied(
    strips: Sequence[Strip], layers: Sequence[Layer], pieces: Sequence[Piece]
) -> tuple[Tables, int]:
    """Tables and heads. Blocks that lie in one piece in both memories are one row each."""
    blocks = [strip.whole_blocks() for strip in strips]
    whole = all(strip.rows == 1 for strip in blocks) and all(
        piece.runs.loose is None for piece in pieces
    )
    planes = planes_of(blocks if whole else strips, layers)
    return Tables(planes, bases_of(pieces), rows_of(pieces, whole_blocks=whole)), strips[0].heads


def copy_tables(kernel: str, tables: Tables, heads: int) -> Plan:
    """A plan of ``copy.cu``: the widest vectors that every row's address allows."""
    width = min(alignment(tables, heads))
    vectors = -(-int(tables.planes["row_nbytes"].max()) // width)
    lanes = lanes_log2(vectors)
    segments = -(-vectors >> lanes)
    return make_plan("copy", kernel, tables, heads, lanes, (segments, width))


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
    if not planes or not rows:
        raise LayoutError("a launch needs at least one plane and one row, found none")
    nbytes = heads * int(tables.planes["row_nbytes"].sum())  # of one row of all planes
    most = heads * int(tables.planes["row_nbytes"].max())
    tile = max(0, min(_MAX_TILE_LOG2, (_TILE_NBYTES // most).bit_length() - 1))
    tiles = planes * -(-rows >> tile)
    if rows >= _MAX_ROWS or tiles >= _MAX_ROWS:
        raise LayoutError(f"a launch moves fewer than 2^31 rows and tiles, found {rows}, {tiles}")
    table, starts = packed((*tables, *arrays))
    counts = (planes, rows, heads, tile, lanes)
    return Plan(source, kernel, table, starts, (*counts, *numbers), tiles, nbytes * rows)
