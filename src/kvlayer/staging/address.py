"""Where rows lie, in an engine's tensors and in a payload: bytes and strides. Pure arithmetic.

Everything a copy needs is one table of :class:`Strip`: equally spaced rows in the cache and in the
payload, in bytes. ``torch_stager`` turns a strip into strided views; a CUDA stager turns it into a
plane table (``data_ptr + cache.offset + plane * cache.plane``) and kernel arguments.
"""

from __future__ import annotations

from typing import NamedTuple

from kvlayer.errors import LayoutError
from kvlayer.layout import AttentionKind, GroupLayout
from kvlayer.payload import Payload
from kvlayer.staging.geometry import CacheGeometry

__all__ = ["Overlap", "Side", "Strip", "overlap", "strips"]


class Side(NamedTuple):
    """One end of a strip: byte offset of its first row and byte strides."""

    offset: int
    plane: int
    head: int
    block: int
    token: int


class Strip(NamedTuple):
    """Rows one strided copy (or one kernel launch) moves: planes x heads x blocks x rows.

    ``cache`` counts from the first element of the layer's tensor ``tensor``, ``host`` from the
    layer's start in the payload, at the payload's row 0.
    """

    tensor: int
    planes: int
    heads: int
    blocks: int
    rows: int
    row_nbytes: int
    cache: Side
    host: Side

    def whole_blocks(self) -> Strip:
        """The same strip with each block's rows as one row, where they are contiguous."""
        if self.rows == 1 or not self.cache.token == self.host.token == self.row_nbytes:
            return self
        nbytes = self.rows * self.row_nbytes
        return self._replace(rows=1, row_nbytes=nbytes)


class Overlap(NamedTuple):
    """What a payload and a rank have in common.

    ``layers`` pairs the index of a local cache with the byte offset of its layer in the payload;
    heads ``cache_head ..`` of the rank are heads ``host_head ..`` of the payload.
    """

    layers: tuple[tuple[int, int], ...]
    cache_head: int
    host_head: int
    heads: int


def overlap(layout: GroupLayout, payload: Payload) -> Overlap:
    """Layers and heads that ``payload`` and the rank share; possibly none.

    Raises ``LayoutError`` for a payload of another group or form, and for a native one whose
    heads are not exactly the rank's: packed blocks cannot be cut.
    """
    part = payload.part
    if payload.group is not layout.group and payload.group != layout.group:
        raise LayoutError(f"part {part} belongs to another KV group than the layout's")
    if part.form != layout.form:
        raise LayoutError(
            f"part {part} has form {part.form}, the rank's layout has {layout.form}",
            hint="only the engine's adapter knows how a native form is packed",
        )
    (r0, r1), (l0, l1) = layout.layer_range, part.layers
    layers = tuple(
        (at - r0, payload.layer_offset(at - l0)) for at in range(max(r0, l0), min(r1, l1))
    )
    if part.heads is None:
        return Overlap(layers, 0, 0, 1)
    (r0, r1), (h0, h1) = layout.head_range, part.heads
    if part.form != "canonical":
        if part.heads != layout.head_range:
            raise LayoutError(f"native part {part}: the rank holds heads {r0}-{r1}, all or none")
        return Overlap(layers, 0, 0, 1)
    first, last = max(r0, h0), min(r1, h1)
    return Overlap(layers, first - r0, first - h0, max(0, last - first))


def payload_rows(geometry: CacheGeometry, payload: Payload) -> int:
    """Rows each plane and head has in the payload."""
    if payload.group.kind is AttentionKind.STATE:
        return 1
    return payload.tokens * geometry.rows_per_block // geometry.tokens_per_block


def strips(geometry: CacheGeometry, payload: Payload, shared: Overlap) -> tuple[Strip, ...]:
    """The layer's rows in both memories, as few strips as possible (one, or two for a pair)."""
    rows = payload_rows(geometry, payload)
    native = payload.part.form != "canonical"
    payload_heads = 1 if native else payload.num_heads
    found: list[Strip] = []
    host = 0
    for plane in geometry.planes:
        strip = Strip(
            plane.tensor,
            1,
            shared.heads,
            geometry.blocks,
            geometry.rows_per_block,
            plane.row,
            Side(
                plane.offset + shared.cache_head * plane.head,
                0,
                plane.head,
                plane.block,
                plane.token,
            ),
            Side(
                host + shared.host_head * rows * plane.row,
                0,
                rows * plane.row,
                geometry.rows_per_block * plane.row,
                plane.row,
            ),
        )
        host += payload_heads * rows * plane.row
        joined = _joined(found[-1], strip) if found else None
        if joined is None:
            found.append(strip)
        else:
            found[-1] = joined
    return tuple(found)


def _joined(strip: Strip, after: Strip) -> Strip | None:
    """``strip`` with one more plane, or None where ``after`` does not continue it."""
    planes = strip.planes
    cache = after.cache.offset - strip.cache.offset
    host = after.host.offset - strip.host.offset
    if planes > 1:
        step = (strip.cache.plane * planes, strip.host.plane * planes)
        if (cache, host) != step:
            return None
        cache, host = strip.cache.plane, strip.host.plane
    one = strip._replace(
        planes=1,
        cache=strip.cache._replace(plane=0, offset=after.cache.offset),
        host=strip.host._replace(plane=0, offset=after.host.offset),
    )
    if one != after or cache < 0:
        return None
    return strip._replace(
        planes=planes + 1,
        cache=strip.cache._replace(plane=cache),
        host=strip.host._replace(plane=host),
    )
