"""One layer's cache as planes of equally spaced rows, in bytes. Pure arithmetic, no tensor library.

A group's axes and a tensor's shape and strides go in; a geometry that holds for every tensor of
that shape comes out, or a ``LayoutError`` that says what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from kvlayer.errors import LayoutError
from kvlayer.layout import AttentionKind, GroupLayout

__all__ = ["CacheGeometry", "Plane", "TensorShape", "cache_geometry"]


class TensorShape(NamedTuple):
    """What addresses are computed from: extents, strides in elements, bytes per element."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


class Plane(NamedTuple):
    """The K rows, or the V rows, of one layer's cache; strides and sizes in bytes.

    Row (head h, block b, row r of the block) starts ``offset + h * head + b * block + r * token``
    bytes after the first element of tensor ``tensor`` (1: the V of a pair) and is ``row``
    contiguous bytes.
    """

    tensor: int
    offset: int
    head: int
    block: int
    token: int
    row: int


class CacheGeometry(NamedTuple):
    """One layer's cache. Relative to its tensors' first elements, so it holds no memory.

    A row is one token of one head; in native and state groups a whole block (of one plane), then
    ``rows_per_block`` is 1 whatever ``tokens_per_block``. Dense tensors have blocks of one token.
    """

    planes: tuple[Plane, ...]
    heads: int
    blocks: int
    rows_per_block: int
    tokens_per_block: int

    @property
    def slots(self) -> int:
        """One more than the highest slot."""
        return self.blocks * self.tokens_per_block

    def by_token(self) -> CacheGeometry | None:
        """The same memory as blocks of one token; None unless slots are equally spaced in it."""
        rows = self.rows_per_block
        if rows != self.tokens_per_block or any(p.block != rows * p.token for p in self.planes):
            return None
        planes = tuple(p._replace(block=p.token, token=p.row) for p in self.planes)
        return CacheGeometry(planes, self.heads, self.slots, 1, 1)


def cache_geometry(layout: GroupLayout, tensors: Sequence[TensorShape]) -> CacheGeometry:
    """Geometry of one layer's cache: its tensor, or its (K, V) pair.

    Raises ``LayoutError`` when ranks, extents or contiguity contradict ``layout``.
    """
    expected = 2 if layout.is_pair else 1
    if len(tensors) != expected:
        raise LayoutError(f"expected {expected} tensor(s) per layer, found {len(tensors)}")
    parts = [_tensor_geometry(layout, t, tensor) for t, tensor in enumerate(tensors)]
    first = parts[0]
    if any(p.blocks != first.blocks for p in parts):
        raise LayoutError(
            f"K has {first.blocks} blocks and V has {parts[1].blocks}",
            hint="both tensors of a pair share one block table",
        )
    return first._replace(planes=tuple(p for part in parts for p in part.planes))


def _tensor_geometry(layout: GroupLayout, index: int, tensor: TensorShape) -> CacheGeometry:
    group, axes, item = layout.group, layout.axes, tensor.itemsize
    if len(tensor.shape) != len(axes):
        raise LayoutError(
            f"expected a tensor with axes {_names(axes)}, found shape {tensor.shape}",
            hint="the layout's axes name every axis of a layer's tensor, outermost first",
        )
    stride = {a: s * item for a, s in zip(axes, tensor.strides, strict=True)}
    for axis, extent, found in _extents(layout, index, tensor):
        if found != extent:
            raise LayoutError(
                f"expected {axis} extent {extent}, found {found} in shape {tensor.shape} "
                f"with axes {_names(axes)}"
            )
    if layout.form != "canonical":
        return _native_geometry(layout, index, tensor)
    row_axis = next(a for a in ("dim", "kvdim", "state") if a in axes)
    if stride[row_axis] != item and tensor.shape[axes.index(row_axis)] > 1:
        raise LayoutError(
            f"the {row_axis} axis must be contiguous, found stride {stride[row_axis] // item} "
            f"in shape {tensor.shape}",
            hint="declare a native form for blocks whose rows are transposed or interleaved",
        )
    if group.kind is AttentionKind.STATE:
        blocks = tensor.shape[axes.index("block")]
        plane = Plane(0, 0, 0, stride["block"], group.state_nbytes, group.state_nbytes)
        return CacheGeometry((plane,), 1, blocks, 1, layout.tokens_per_block)
    rows = [n * item for n in group.planes()]
    if layout.is_pair:
        placed = [(0, rows[index])]
    else:
        gap = rows[0] if "kvdim" in axes else stride.get("kv", 0)
        placed = [(p * gap, row) for p, row in enumerate(rows)]
    dense = "block" not in axes
    block, token = ("token", "") if dense else ("block", "token")
    planes = tuple(
        Plane(index, offset, stride.get("head", row), stride[block], stride.get(token, row), row)
        for offset, row in placed
    )
    per_block = 1 if dense else layout.tokens_per_block
    lo, hi = layout.head_range if group.kind is AttentionKind.MHA else (0, 1)
    return CacheGeometry(planes, hi - lo, tensor.shape[axes.index(block)], per_block, per_block)


def _extents(
    layout: GroupLayout, index: int, tensor: TensorShape
) -> Iterator[tuple[str, int, int]]:
    """(axis, expected extent, found extent) of every axis whose extent the layout fixes."""
    group, axes = layout.group, layout.axes
    found = dict(zip(axes, tensor.shape, strict=True))
    if group.kind is AttentionKind.STATE:
        _require(axes, {"block", "state"}, "a state group")
        yield "state", group.state_nbytes // tensor.itemsize, found["state"]
        return
    k, v = group.planes()[0], group.planes()[-1]
    width = {"kvdim"} if "kvdim" in axes else {"dim"}
    place = {"block", "token"} if layout.tokens_per_block > 1 and "block" in axes else set[str]()
    _require(axes, width | place, f"a {group.kind} group")
    if not {"block", "token"} & set(axes):
        raise LayoutError(f"axes {_names(axes)} have neither a block nor a token axis")
    if "kv" in axes and k != v:
        raise LayoutError(
            f"a kv axis needs equal K and V head sizes, found {k} and {v}",
            hint="use a pair of tensors or a kvdim axis",
        )
    if "kvdim" in axes:
        yield "kvdim", k + v, found["kvdim"]
    else:
        yield "dim", v if index else k, found["dim"]
    lo, hi = layout.head_range if group.kind is AttentionKind.MHA else (0, 1)
    yield "head", hi - lo, found.get("head", 1)
    if "kv" in axes:
        yield "kv", 2, found["kv"]
    if "block" in axes:
        yield "token", layout.tokens_per_block, found.get("token", 1)


def _native_geometry(layout: GroupLayout, index: int, tensor: TensorShape) -> CacheGeometry:
    """Blocks as bytes: axes before the block axis are planes, those after it are one row."""
    axes, item = layout.axes, tensor.itemsize
    at = axes.index("block")
    row = item
    for axis, extent, stride in reversed(
        list(zip(axes[at + 1 :], tensor.shape[at + 1 :], tensor.strides[at + 1 :], strict=True))
    ):
        if extent > 1 and stride * item != row:
            raise LayoutError(
                f"a native form needs contiguous blocks, but axis {axis} has stride {stride} in "
                f"shape {tensor.shape}",
                hint="name the axes in the order in which they lie in memory",
            )
        row *= extent
    steps = [s * item for s in tensor.strides[:at]]
    planes = tuple(
        Plane(index, sum(map(int.__mul__, outer, steps)), row, tensor.strides[at] * item, row, row)
        for outer in product(*map(range, tensor.shape[:at]))
    )
    return CacheGeometry(planes, 1, tensor.shape[at], 1, layout.tokens_per_block)


def _require(axes: tuple[str, ...], needed: set[str], what: str) -> None:
    missing = needed - set(axes)
    if missing:
        raise LayoutError(f"{what} needs axes {_names(sorted(needed))}, found {_names(axes)}")


def _names(axes: Sequence[str]) -> str:
    return f"({', '.join(axes)})"
