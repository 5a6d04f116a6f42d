"""K re-rotated to other positions while it is scattered: RoPE turned on by a difference.

A key rotated for position p becomes the key of position p + shift when each of its pairs is turned
by ``shift * frequency`` (RoFormer, Su et al. 2021, equation 34: rotations of one plane add up).
Scaled variants that only change frequencies, or the length of the vector, turn the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvlayer.errors import LayoutError
from kvlayer.layout import AttentionKind
from kvlayer.payload import Payload
from kvlayer.staging.address import Strip
from kvlayer.staging.kernels.plan import Plan, copy_tables, lanes_log2, make_plan, scatter_plan
from kvlayer.staging.kernels.tables import (
    VECTOR_NBYTES,
    Layer,
    Piece,
    Tables,
    alignment,
    bases_of,
    planes_of,
    rows_of,
)
from kvlayer.staging.lazy import np

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

__all__ = ["FLOATS", "Rotation", "rotate_plans"]

FLOATS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
"""Dtypes that kernels compute with, and their names in kernels' names."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Which elements of a row of K are rotated, and how fast.

    ``frequencies`` has the angle per position of each pair, in radians; pair i is, with n pairs,
    elements ``first + i`` and ``first + n + i`` (``neox``), or ``first + 2i`` and ``first + 2i +
    1`` (``gptj``). All other elements are copied.
    """

    style: Literal["neox", "gptj"]
    frequencies: tuple[float, ...]
    first: int = 0

    def turns(self, shifts: Sequence[int]) -> NDArray[float32]:
        """``[shift][cos, sin][pair]``; angles in double precision."""
        angles = np.outer(np.array(shifts, np.float64), np.array(self.frequencies, np.float64))
        turns: NDArray[float32] = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
        return turns


def rotate_plans(
    strips: Sequence[Strip],
    layers: Sequence[Layer],
    pieces: Sequence[Piece],
    *,
    payload: Payload,
    rotation: Rotation,
) -> tuple[Plan, ...]:
    """Like ``scatter_plan``, each piece's K turned by its ``shift``: up to three plans.

    Pieces that have not moved, and V, are copied bit for bit. The plans may run in any order or
    at once. Computed in float32; the result is rounded once, to the nearest, ties to even.

    Raises ``LayoutError`` for rows that are not canonical, of a dtype that is no float of 16 or 32
    bits (fp8 needs scales that are the engine's), or shorter than the rotation.
    """
    _check(payload, rotation)
    held = [piece for piece in pieces if not piece.is_empty]
    still = [piece for piece in held if piece.shift == 0]
    moved = [piece for piece in held if piece.shift != 0]
    plans = [scatter_plan(strips, layers, still)] if still else list[Plan]()
    if moved:
        planes, per_layer = planes_of(strips, layers), len(payload.group.planes())
        heads, bases, rows = (
            strips[0].heads,
            bases_of(moved),
            rows_of([piece.runs for piece in moved]),
        )
        keys = Tables(planes[::per_layer], bases, rows)
        plans.append(_rotated(keys, heads, payload, rotation, [p.shift for p in moved]))
        if per_layer > 1:
            plans.append(copy_tables("kv_scatter", Tables(planes[1::2], bases, rows), heads))
    return tuple(plans)


def _rotated(
    tables: Tables, heads: int, payload: Payload, rotation: Rotation, shifts: Sequence[int]
) -> Plan:
    """A plan of ``rotate.cu``. A lane takes a vector of each half (neox), or one (gptj)."""
    item, size = payload.group.itemsize, payload.group.head_size
    pairs, is_neox = len(rotation.frequencies), rotation.style == "neox"
    run = pairs if is_neox else 2 * pairs  # elements that must be whole vectors
    vector = VECTOR_NBYTES // item
    whole = rotation.first % vector == run % vector == size % vector == 0
    if not whole or min(alignment(tables, heads)) < VECTOR_NBYTES:
        vector = 1  # element by element, a pair per lane
    work = (size - 2 * pairs) // vector + max(1, run // (vector if vector > 1 or is_neox else 2))
    return make_plan(
        "rotate",
        f"kv_rotate_{rotation.style}_{FLOATS[payload.group.dtype]}",
        tables,
        heads,
        lanes_log2(work),
        (pairs, rotation.first, int(vector > 1)),
        (rotation.turns(shifts),),
    )


def _check(payload: Payload, rotation: Rotation) -> None:
    group, end = payload.group, rotation.first + 2 * len(rotation.frequencies)
    if payload.part.form != "canonical" or group.kind is AttentionKind.STATE:
        raise LayoutError(f"cannot rotate {group.kind} rows of form {payload.part.form}")
    if group.dtype not in FLOATS:
        raise LayoutError(
            f"cannot rotate rows of {group.dtype}",
            hint=f"keys of {', '.join(FLOATS)} can be re-rotated; recompute others",
        )
    if not rotation.frequencies or rotation.first < 0 or end > group.head_size:
        raise LayoutError(
            f"cannot rotate elements {rotation.first}..{end} of a row of {group.head_size}"
        )
