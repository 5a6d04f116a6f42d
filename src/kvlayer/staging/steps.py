"""By which numpy calls a strip's rows move between a cache in host memory and a payload.

Rows are numpy void elements: one memmove each whatever the dtype, and NaN payloads survive. There
are as few calls as possible, and each is one that releases the interpreter's lock: a thread that
asks for it back every few microseconds would leave it to nobody else, and the event loop would
stand still for milliseconds. So what is scattered over the cache moves in one indexed call per
layer; only what lies there in one piece, or in long ones, gets a strided copy of its own.

Measured on one core with blocks of 16 tokens and rows of 256 bytes: ``take`` row by row costs what
an indexed read costs without its temporary, and an indexed write is fastest with the block axis
first and the others in the cache's own order.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from kvlayer.staging.address import Side, Strip
from kvlayer.staging.lazy import np
from kvlayer.staging.slots import BlockRun, IntArray, LooseRows, SlotRuns

if TYPE_CHECKING:
    from numpy import uint8, void
    from numpy.typing import NDArray

__all__ = ["Bytes", "Rows", "Step", "gather_steps", "scatter_steps"]

Bytes: TypeAlias = "NDArray[uint8]"
_Index: TypeAlias = "EllipsisType | IntArray | tuple[slice | IntArray, ...]"

_TEMPORARY_NBYTES = 1 << 20  # what a step may copy aside, where numpy cannot do without
_STRETCH_NBYTES = 1 << 20  # shorter stretches move faster, and quieter, all in one call
_GRAIN_NBYTES = 512  # numpy keeps the lock while it assigns up to 500 elements, however large


class Rows(NamedTuple):
    """Rows in some memory, whose first byte in question is still to be said."""

    shape: tuple[int, ...]
    dtype: Any
    offset: int
    strides: tuple[int, ...]

    def of(self, memory: Bytes, base: int) -> NDArray[void]:
        """A view. ``ValueError`` or ``TypeError`` where it would leave ``memory``."""
        view: NDArray[void] = np.ndarray(
            self.shape, self.dtype, memory, base + self.offset, self.strides
        )
        return view


class Step(NamedTuple):
    """One call: ``payload[payload_at]`` and ``cache[cache_at]`` become equal, in every layer."""

    payload: Rows
    cache: Rows
    payload_at: _Index
    cache_at: _Index
    is_take: bool = False
    """Read by ``cache.take(cache_at, out=payload)``, straight into the payload."""


def gather_steps(strip: Strip, runs: SlotRuns) -> list[Step]:
    """Steps that copy from the cache to the payload."""
    whole, found = strip.whole_blocks(), list[Step]()
    for run in runs.runs:
        if _is_long(run, whole):
            found += _strided(whole, run)
        else:
            found += _taken(whole, run) or _indexed(whole, run, _TEMPORARY_NBYTES)
    return [*found, *_loose(strip, runs.loose)]


def scatter_steps(strip: Strip, runs: SlotRuns) -> list[Step]:
    """Steps that copy from the payload to the cache."""
    whole, found = strip.whole_blocks(), list[Step]()
    for run in runs.runs:
        found += _strided(whole, run) if _is_long(run, whole) else _indexed(whole, run)
    return [*found, *_loose(strip, runs.loose)]


def _is_long(run: BlockRun, strip: Strip) -> bool:
    """Whether a call per stretch of neighbouring blocks is the better way."""
    count = 1 + int(np.count_nonzero(np.diff(run.ids) != 1))
    return count == 1 or len(run.ids) * _block_nbytes(strip) >= count * _STRETCH_NBYTES


def _strided(strip: Strip, run: BlockRun) -> Iterator[Step]:
    for position, block, count in run.stretches:
        part = strip._replace(blocks=count)
        row = run.row + position * strip.rows
        yield Step(
            _rows(part, part.host, row * strip.host.token),
            _rows(part, part.cache, block * strip.cache.block),
            ...,
            ...,
        )


def _taken(strip: Strip, run: BlockRun) -> list[Step]:
    """Nothing, where rows do not lie whole rows apart in the cache."""
    side, row = strip.cache, strip.row_nbytes
    steps = ((side.plane, strip.planes), (side.head, strip.heads), (side.token, strip.rows))
    if side.block % row or any(step % row for step, extent in steps if extent > 1):
        return []
    planes = np.arange(strip.planes) * (side.plane // row)
    heads = np.arange(strip.heads) * (side.head // row)
    rows = np.arange(strip.rows) * (side.token // row)
    blocks = ((run.ids * (side.block // row))[:, None] + rows).reshape(-1)
    index: IntArray = (planes[:, None] + heads)[:, :, None] + blocks
    dtype = np.dtype(f"V{row}")
    cache = Rows((int(index.max()) + 1,), dtype, side.offset, (row,))

    host, first = strip.host, strip.host.offset + run.row * strip.host.token
    length = len(blocks) * row
    if (strip.heads == 1 or host.head == length) and (
        strip.planes == 1 or host.plane == strip.heads * length
    ):
        return [
            Step(Rows((index.size,), dtype, first, (row,)), cache, ..., index.reshape(-1), True)
        ]
    return [
        Step(
            Rows((len(blocks),), dtype, first + plane * host.plane + head * host.head, (row,)),
            cache,
            ...,
            index[plane, head],
            is_take=True,
        )
        for plane, head in np.ndindex(strip.planes, strip.heads)
    ]


def _indexed(strip: Strip, run: BlockRun, most: int | None = None) -> Iterator[Step]:
    """Blocks by their ids, in pieces of ``most`` bytes, or in one."""
    side = strip.cache
    inner = sorted((0, 1, 3), key=(side.plane, side.head, 0, side.token).__getitem__, reverse=True)
    order = (2, *inner, 4)
    step = len(run.ids) if most is None else max(1, most // _block_nbytes(strip))
    for at in range(0, len(run.ids), step):
        ids = run.ids[at : at + step]
        first = (run.row + at * strip.rows) * strip.host.token
        payload = _rows(strip._replace(blocks=len(ids)), strip.host, first)
        yield Step(_ordered(payload, order), _ordered(_rows(strip, side), order), ..., ids)


def _loose(strip: Strip, loose: LooseRows | None) -> Iterator[Step]:
    if loose is None:
        return
    cache, every = _rows(strip, strip.cache), slice(None)
    most = max(1, _TEMPORARY_NBYTES // (strip.planes * strip.heads * strip.row_nbytes))
    for at in range(0, len(loose.rows), most):
        rows, blocks, tokens = (index[at : at + most] for index in loose)
        # The payload as blocks of one row.
        one = strip._replace(rows=1, blocks=int(rows.max()) + 1)
        payload = _rows(one, strip.host._replace(block=strip.host.token))
        yield Step(payload, cache, (every, every, rows, 0), (every, every, blocks, tokens))


def _block_nbytes(strip: Strip) -> int:
    return strip.planes * strip.heads * strip.rows * strip.row_nbytes


def _rows(strip: Strip, side: Side, first: int = 0) -> Rows:
    """[plane, head, block, row, grain], from byte ``first`` on: a long row is several elements."""
    grain = row = strip.row_nbytes
    if row > _GRAIN_NBYTES:
        grain = min(row & -row, _GRAIN_NBYTES)
    shape = (strip.planes, strip.heads, strip.blocks, strip.rows, row // grain)
    strides = (side.plane, side.head, side.block, side.token, grain)
    return Rows(shape, np.dtype(f"V{grain}"), side.offset + first, strides)


def _ordered(rows: Rows, order: tuple[int, ...]) -> Rows:
    shape, strides = (tuple(of[axis] for axis in order) for of in (rows.shape, rows.strides))
    return rows._replace(shape=shape, strides=strides)
