"""Random engines, payloads and slots, what a launch makes of them, and what it should have made.

An engine's tensors lie in memory in any order of their axes, layers included, with padding or
without: vLLM's and SGLang's layouts are some of them (``NAMED``). The oracle is the torch stager,
which has its own, naive, oracle in ``tests/unit/staging``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from emulator import ORDERS, Emulator, Memory

from kvlayer.abc.stager import HostCopy
from kvlayer.identity.keys import Part
from kvlayer.layout import (
    DENSE,
    DTYPE_NBYTES,
    FUSED_HND,
    HND,
    MLA_BLOCKS,
    NHD,
    NHD_BLOCK_FIRST,
    NHD_PAIR,
    STATE_BLOCKS,
    AttentionKind,
    GroupLayout,
    KVGroup,
    KVLayout,
    KVView,
)
from kvlayer.payload import Payload
from kvlayer.staging.kernels.launch import Kernels
from kvlayer.staging.kernels.plan import Plan
from kvlayer.staging.kernels.tables import Layer, Piece
from kvlayer.staging.moves import Move, plan_moves
from kvlayer.staging.torch_stager import TorchStager
from kvlayer.staging.torch_view import GeometryReader, tensors_of

__all__ = ["NAMED", "Case", "Planner", "launch", "random_case"]

NAMED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # Axes of a layer's tensor, and how all layers lie in memory, outermost first.
    "vllm nhd": (NHD, ("layer", "kv", "block", "token", "head")),
    "vllm hnd": (HND, ("layer", "kv", "block", "head", "token")),
    "vllm block first": (NHD_BLOCK_FIRST, ("block", "layer", "kv", "token", "head")),
    "fused hnd": (FUSED_HND, ("layer", "block", "head", "token")),
    "pair": (NHD_PAIR, ("layer", "block", "token", "head")),
    "sglang layer first": (NHD_PAIR, ("layer", "block", "token", "head")),
    "sglang page first": (NHD_PAIR, ("block", "token", "layer", "head")),
    "sglang page first direct": (NHD_PAIR, ("block", "layer", "token", "head")),
    "dense": (DENSE, ("layer", "head", "token")),
    "mla": (MLA_BLOCKS, ("layer", "block", "token")),
    "mla page first": (MLA_BLOCKS, ("block", "layer", "token")),
    "state": (STATE_BLOCKS, ("layer", "block")),
}
TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.uint8,
    "int8": torch.int8,
}
WIDTHS = ("dim", "kvdim", "state")
FLOATS = ("bfloat16", "float16", "float32")

Planner = Callable[..., Plan | Sequence[Plan]]
"""``gather_plan`` and its likes."""


@dataclass
class Case:
    """One rank's tensors, and copies of equal payloads. ``memories`` hold the tensors."""

    layout: GroupLayout
    blocks: int
    order: tuple[str, ...]
    padding: int
    offset: int
    slots: list[int]
    payload: Payload
    spans: list[tuple[int, int, int]]
    rng: np.random.Generator

    def nbytes(self) -> list[int]:
        """Of each allocation: one, or two for pairs."""
        return [
            (self.offset + sum((n - 1) * s for n, s in zip(*self._place(dim), strict=True)) + 1)
            * self.layout.group.itemsize
            for dim in self._dims()
        ]

    def view(self, arrays: Sequence[Any]) -> KVView:
        """The engine's view, over these bytes."""
        layers = range(*self.layout.layer_range)
        caches = []
        for at in range(len(layers)):
            tensors = [
                self._tensor(a, dim, at) for a, dim in zip(arrays, self._dims(), strict=True)
            ]
            caches.append(tuple(tensors) if len(tensors) > 1 else tensors[0])
        return KVView.single(caches, torch.tensor(self.slots))

    def copies(self, hosts: Sequence[Any]) -> list[HostCopy]:
        """The copies, with these arrays as host memory."""
        return [
            HostCopy(self.payload, memoryview(host), *span)
            for host, span in zip(hosts, self.spans, strict=True)
        ]

    def oracle(self, arrays: Sequence[Any], hosts: Sequence[Any], *, gather: bool) -> None:
        """What the torch stager makes of it."""

        async def run() -> None:
            stager = TorchStager(KVLayout((self.layout,)), threads=1)
            move = stager.gather if gather else stager.scatter
            await move(self.view(arrays), self.copies(hosts))
            await stager.aclose()

        asyncio.run(run())

    def moves(self, arrays: Sequence[Any], hosts: Sequence[Any], *, gather: bool) -> list[Move]:
        layout, view = KVLayout((self.layout,)), self.view(arrays)
        geometries = GeometryReader(layout).read(view)
        return [*plan_moves(layout, view, geometries, self.copies(hosts), gather=gather)]

    def _dims(self) -> list[int]:
        group = self.layout.group
        if group.kind is AttentionKind.STATE:
            return [group.state_nbytes // group.itemsize]
        if "kvdim" in self.layout.axes:
            return [sum(group.planes())]
        return [*group.planes()] if self.layout.is_pair else [group.head_size]

    def _extents(self) -> dict[str, int]:
        lo, hi = self.layout.head_range
        dense = "block" not in self.layout.axes
        size = self.layout.tokens_per_block
        return {
            "layer": len(range(*self.layout.layer_range)),
            "kv": 2,
            "block": self.blocks,
            "token": self.blocks * size if dense else size,
            "head": hi - lo if self.layout.group.kind is AttentionKind.MHA else 1,
        }

    def _place(self, dim: int) -> tuple[list[int], list[int]]:
        """Extents and strides, in elements, in memory order and the row last."""
        extents = [*(self._extents()[axis] for axis in self.order), dim]
        strides = [1]
        step = dim + self.padding
        for extent in reversed(extents[:-1]):
            strides.insert(0, step)
            step *= extent
        return extents, strides

    def _tensor(self, array: Any, dim: int, layer: int) -> Any:
        extents, strides = self._place(dim)
        place = dict(zip((*self.order, "row"), zip(extents, strides, strict=True), strict=True))
        axes = [place["row" if axis in WIDTHS else axis] for axis in self.layout.axes]
        dtype = TORCH_DTYPES[self.layout.group.dtype]
        bits = torch.from_numpy(array).view(dtype)
        first = self.offset + layer * place["layer"][1]
        return bits.as_strided([n for n, _ in axes], [s for _, s in axes], first)


def random_case(
    rng: np.random.Generator, *, gather: bool, floats: bool = False, vectors: bool = False
) -> Case:
    """A case; ``floats``: of dtypes and kinds that kernels compute with; ``vectors``: aligned."""

    def choose(*of: Any) -> Any:
        return of[rng.integers(len(of))]

    kind = choose(AttentionKind.MHA, AttentionKind.MHA, AttentionKind.MHA, AttentionKind.MLA)
    if not floats and rng.integers(8) == 0:
        kind = AttentionKind.STATE
    mha, state = kind is AttentionKind.MHA, kind is AttentionKind.STATE
    dtype = choose(*(FLOATS if floats else sorted(DTYPE_NBYTES)))
    wide = 512 if dtype == "float32" else 576  # elements of 2048 bytes are the longest int8 rows
    even = choose(8, 16, 64, 80, 128, wide) if vectors else choose(2, 4, 6, 12, 16, 34, 64, 80, 128)
    group = KVGroup(
        kind,
        tuple(range(rng.integers(1, 4))),
        dtype,
        num_kv_heads=int(rng.integers(1, 5)) if mha else 1,
        head_size=0 if state else even + (0 if floats or vectors else choose(0, 0, 0, 1)),
        v_head_size=choose(None, None, 16) if mha else None,
        state_nbytes=int(rng.integers(1, 400)) * DTYPE_NBYTES[dtype] if state else 0,
    )
    uneven = group.v_head_size not in {None, group.head_size}
    names = [
        name
        for name, (axes, _) in NAMED.items()
        if (("dim" if not mha else "head") in axes or state)
        and ("state" in axes) == state
        and (mha or "head" not in axes)
        and not (uneven and "kv" in axes)
    ]
    axes, order = NAMED[choose(*names)]
    if rng.integers(2):
        order = tuple(rng.permutation(list(order)).tolist())
    native = not floats and not state and "block" in axes and rng.integers(5) == 0
    if native:
        order = ("layer", *(a for a in axes if a not in WIDTHS))
    size = choose(1, 2, 3, 4, 8, 16) if "block" in axes else 1
    layout = GroupLayout(
        group,
        axes,
        tokens_per_block=size,
        form="native:test" if native else "canonical",
        layers=_range(rng, len(group.layers)),
        heads=_range(rng, group.num_kv_heads) if mha else None,
    )
    blocks = int(rng.integers(2, max(3, 96 // size)))
    slots = _slots(rng, blocks, size, whole=native)
    tokens, spans = _spans(rng, slots, size if native else 1, gather=gather)
    held = (
        set() if gather or native else {*range(rng.integers(3)), *rng.integers(0, 99, 3).tolist()}
    )
    slots = [-1 if at in held else slot for at, slot in enumerate(slots)]
    if state:
        spans = _apart(spans, slots, size)
    (l0, l1), (h0, h1) = layout.layer_range, layout.head_range
    part = Part(0, (l0, l1), (h0, h1) if mha else None, layout.form)
    if not gather and not native:
        part = Part(0, (0, len(group.layers)), (0, group.num_kv_heads) if mha else None)
    payload = Payload.of(group, part, tokens)
    payload = replace(payload, layers_per_segment=int(rng.integers(1, payload.num_layers + 1)))
    padding = 0 if native else choose(0, 0, 16 if vectors else 3)
    offset = 0 if vectors else choose(0, 0, 0, 1)
    return Case(layout, blocks, order, padding, offset, slots, payload, spans, rng)


def _range(rng: np.random.Generator, stop: int) -> tuple[int, int]:
    lo = int(rng.integers(stop))
    return lo, int(rng.integers(lo + 1, stop + 1))


def _slots(rng: np.random.Generator, blocks: int, size: int, *, whole: bool) -> list[int]:
    """Whole blocks in any order; mostly cut off at both ends; now and then no blocks at all."""
    ids = rng.permutation(blocks) if rng.integers(3) else np.arange(blocks)
    slots = (ids[:, None] * size + np.arange(size)).reshape(-1)
    if not whole and rng.integers(2):
        slots = slots[rng.integers(size) :][: rng.integers(1, len(slots) + 1)]
        if rng.integers(4) == 0:
            slots = rng.permutation(slots)
    found: list[int] = slots.tolist()
    return found or [0]


def _spans(
    rng: np.random.Generator, slots: list[int], size: int, *, gather: bool
) -> tuple[int, list[tuple[int, int, int]]]:
    """Tokens of a payload, and ``(first, tokens, skip)`` of one to three copies."""
    pieces = int(rng.integers(1, 4))
    tokens = max(1, len(slots) // size // pieces) * size
    pieces = min(pieces, len(slots) // tokens)
    spans = [(piece * tokens, tokens, 0) for piece in range(pieces)]
    if not gather and size == 1 and tokens > 2 and rng.integers(2):
        skip = int(rng.integers(1, tokens - 1))
        spans[0] = (skip, tokens - skip, skip)
    return tokens, spans


def _apart(
    spans: list[tuple[int, int, int]], slots: list[int], size: int
) -> list[tuple[int, int, int]]:
    """Those whose last token lies in a block of its own: a block holds one state."""
    ends = [slots[first + tokens - 1] for first, tokens, _ in spans]
    blocks = [end // size if end >= 0 else None for end in ends]
    return [
        span
        for at, (span, block) in enumerate(zip(spans, blocks, strict=True))
        if block is None or block not in blocks[:at]
    ]


def launch(
    emulator: Emulator,
    case: Case,
    moves: Sequence[Move],
    bases: Sequence[int],
    view: KVView,
    planner: Planner,
    *,
    at: Callable[[int, int], int] | None = None,
    shifts: Sequence[int] | None = None,
    **more: Any,
) -> list[Plan]:
    """Plan the moves and launch them in any order of threads.

    ``bases`` are the pieces' addresses; ``at`` says where layer number i that begins at byte n of
    the payload begins in a piece. Returns the plans.
    """
    kernels, rng, done = Kernels(emulator), case.rng, list[Plan]()
    alike: dict[Any, list[tuple[Move, int, int]]] = {}
    for number, (move, base) in enumerate(zip(moves, bases, strict=True)):
        transfer = move.layers[0][2]
        shift = 0 if shifts is None else shifts[number]
        alike.setdefault((transfer.strips, transfer.runs.geometry), []).append((move, base, shift))
    for (strips, _), found in alike.items():
        pieces = [Piece(move.layers[0][2].runs, base, shift) for move, base, shift in found]
        if all(piece.is_empty for piece in pieces):
            continue  # holes and nothing else
        layers = [
            Layer(
                tuple(t.data_ptr() for t in tensors_of(view.caches[0][local])),
                place if at is None else at(number, place),
            )
            for number, (local, place, _) in enumerate(found[0][0].layers)
        ]
        plans = planner(strips, layers, pieces, **more)
        for plan in (plans,) if isinstance(plans, Plan) else plans:
            emulator.order = ORDERS[rng.integers(3)]
            emulator.seed = int(rng.integers(1 << 30))
            table = Memory(emulator, len(plan.table))
            table.array[:] = plan.table
            try:
                kernels.launch(None, plan, table.address, blocks=int(rng.integers(1, 6)))
            finally:
                table.close()
            done.append(plan)
    return done


def random_bytes(rng: np.random.Generator, nbytes: int) -> Any:
    return rng.integers(0, 256, nbytes, dtype=np.uint8)


def random_floats(rng: np.random.Generator, nbytes: int, dtype: str, *, finite: bool = True) -> Any:
    """Bytes of numbers of very different sizes, zeros among them; or of what is no number too."""
    count = math.ceil(nbytes / DTYPE_NBYTES[dtype])
    sizes = np.repeat(rng.choice([0, 1e-37, 1e-3, 1, 1, 1, 40], count // 8 + 1), 8)[:count]
    values = torch.from_numpy(rng.standard_normal(count) * rng.choice([0, 1, 1], count) * sizes)
    if not finite:
        odd = rng.integers(0, count, count // 40)
        values[odd] = torch.from_numpy(rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45], len(odd)))
    return values.to(TORCH_DTYPES[dtype]).view(torch.uint8).numpy()[:nbytes].copy()
