"""Rows as int8 with one float32 scale per token and head, made and undone on the device.

The pattern for codecs that change rows on their way. A layer of the int8 form is the rows of all
planes as in the canonical payload, an element a byte; then, from the next multiple of 16 on, the
scales ``[K|V][head][token]``; padded to a multiple of 16. Symmetric: ``scale = max |x| / 127``,
``q = round(x * (127 / max |x|))``, ``x' = q * scale``, each step rounded to the nearest float32.
Rows whose largest element is below 2^-100 become zero. NaN becomes 0; a row with an infinity comes
back as NaN, all of it; the largest float32 may come back as infinity.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvlayer.errors import LayoutError
from kvlayer.layout import AttentionKind
from kvlayer.payload import Payload
from kvlayer.staging.address import Strip
from kvlayer.staging.kernels.plan import Plan, lanes_log2, make_plan
from kvlayer.staging.kernels.rotation import FLOATS
from kvlayer.staging.kernels.tables import (
    VECTOR_NBYTES,
    Layer,
    Piece,
    Planes,
    Tables,
    alignment,
    bases_of,
    planes_of,
    rows_of,
)

__all__ = ["dequantize_plan", "int8_layer_nbytes", "quantize_plan"]

_SCALE_NBYTES = 4
_MAX_ROW_NBYTES = 2048  # KEEP vectors in each lane of a warp (int8.cu)


def int8_layer_nbytes(payload: Payload) -> int:
    """Bytes of one layer of the int8 form; ``Layer.at`` and bases are multiples of 16."""
    return _align(_scales_at(payload) + _scales(payload) * _SCALE_NBYTES)


def quantize_plan(
    strips: Sequence[Strip], layers: Sequence[Layer], pieces: Sequence[Piece], *, payload: Payload
) -> Plan:
    """Rows from the cache to the int8 form in staging memory.

    Raises ``LayoutError`` for rows that are not canonical, no floats of 16 or 32 bits, no whole
    16-byte vectors or longer than 2048 bytes.
    """
    return _plan("kv_quantize", strips, layers, pieces, payload)


def dequantize_plan(
    strips: Sequence[Strip], layers: Sequence[Layer], pieces: Sequence[Piece], *, payload: Payload
) -> Plan:
    """Rows from the int8 form in staging memory to the cache. Raises as ``quantize_plan`` does."""
    return _plan("kv_dequantize", strips, layers, pieces, payload)


def _plan(
    kernel: str,
    strips: Sequence[Strip],
    layers: Sequence[Layer],
    pieces: Sequence[Piece],
    payload: Payload,
) -> Plan:
    group, heads = payload.group, strips[0].heads
    if payload.part.form != "canonical" or group.kind is AttentionKind.STATE:
        raise LayoutError(f"cannot quantise {group.kind} rows of form {payload.part.form}")
    if group.dtype not in FLOATS:
        raise LayoutError(
            f"cannot quantise rows of {group.dtype} to int8",
            hint=f"int8 rows are made of {', '.join(FLOATS)}",
        )
    row_nbytes = [n * group.itemsize for n in group.planes()]
    if max(row_nbytes) > _MAX_ROW_NBYTES or any(n % VECTOR_NBYTES for n in row_nbytes):
        raise LayoutError(
            f"int8 needs rows of whole {VECTOR_NBYTES}-byte vectors, at most {_MAX_ROW_NBYTES} "
            f"bytes, found {row_nbytes}"
        )
    planes = _int8_planes(planes_of(strips, layers), layers, payload)
    tables = Tables(planes, bases_of(pieces), rows_of([piece.runs for piece in pieces]))
    cache, stage = alignment(tables, heads)
    if (
        cache < VECTOR_NBYTES
        or stage * group.itemsize < VECTOR_NBYTES
        or bool((planes["scale"] % _SCALE_NBYTES).any())
    ):
        raise LayoutError(
            f"int8 needs rows that begin on multiples of {VECTOR_NBYTES} bytes in the cache, and "
            f"bases and layers that do so in staging memory"
        )
    return make_plan(
        "int8",
        f"{kernel}_{FLOATS[group.dtype]}",
        tables,
        heads,
        lanes_log2(max(row_nbytes) // VECTOR_NBYTES),
        (payload.tokens,),
    )


def _int8_planes(planes: Planes, layers: Sequence[Layer], payload: Payload) -> Planes:
    """The same planes with places in the int8 form."""
    item, tokens, heads = payload.group.itemsize, payload.tokens, payload.num_heads
    sizes = payload.group.planes()
    before = [sum(sizes[:plane]) * heads * tokens * item for plane in range(len(sizes))]
    for number, plane in enumerate(planes):
        layer, which = layers[number // len(sizes)], number % len(sizes)
        inside = int(plane["stage"]) - layer.at
        first_head = (inside - before[which]) // int(plane["stage_head"])
        plane["stage"] = layer.at + inside // item
        plane["scale"] = (
            layer.at + _scales_at(payload) + _SCALE_NBYTES * tokens * (which * heads + first_head)
        )
        plane["stage_head"] //= item
        plane["stage_row"] //= item
    return planes


def _scales_at(payload: Payload) -> int:
    return _align(payload.layer_nbytes // payload.group.itemsize)


def _scales(payload: Payload) -> int:
    return len(payload.group.planes()) * payload.num_heads * payload.tokens


def _align(nbytes: int) -> int:
    return -(-nbytes // VECTOR_NBYTES) * VECTOR_NBYTES
