"""Copies against a naive oracle: one token, one head, one row at a time, by named axes."""

from __future__ import annotations

from array import array
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.abc.stager import HostCopy
from kvlayer.identity.keys import Part
from kvlayer.layout import (
    DTYPE_NBYTES,
    AttentionKind,
    GroupLayout,
    KVGroup,
    KVLayout,
    KVView,
)
from kvlayer.payload import Payload
from kvlayer.staging import steps, torch_stager
from kvlayer.staging.device_cache import DeviceCache
from kvlayer.staging.torch_stager import TorchStager

TORCH_DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "fp8_e4m3": [torch.float8_e4m3fn, torch.uint8],
    "fp8_e5m2": [torch.float8_e5m2, torch.uint8],
    "int8": [torch.int8],
}
MHA_AXES = [
    {"kv", "block", "token", "head", "dim"},
    {"block", "token", "head", "dim"},
    {"block", "token", "head", "kvdim"},
    {"head", "token", "dim"},
    {"kv", "token", "head", "dim"},
]
MLA_AXES = [{"block", "token", "dim"}, {"token", "dim"}]


class DevicePathStager(TorchStager):
    """The path of other devices, on CPU tensors."""

    def _open(self, tensor: Any) -> Any:
        return DeviceCache(tensor)


STAGERS = st.sampled_from([TorchStager, DevicePathStager])
THREADS = st.integers(1, 3)


@dataclass
class Engine:
    """One rank's tensors, with garbage in them."""

    layout: GroupLayout
    caches: list[Any]
    num_slots: int

    def view(self, slots: Any) -> KVView:
        return KVView.single(self.caches, slots)

    def rows(self, layer: int, plane: int) -> Any:
        """One plane as numpy bytes [head][slot][row byte]; a copy, made by axis names only."""
        cache = self.caches[layer]
        tensor = cache[plane] if self.layout.is_pair else cache
        width = "kvdim" if "kvdim" in self.layout.axes else "dim"
        axes = [*(a for a in self.layout.axes if a != width), width]
        tensor = tensor.permute([self.layout.axes.index(a) for a in axes])
        values = tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
        if "kv" in axes:
            values = values.take(plane, axis=axes.index("kv"))
            axes.remove("kv")
        for axis in ("block", "head"):
            if axis not in axes:
                values, axes = values[None], [axis, *axes]
        values = values.transpose([axes.index(a) for a in ("head", "block", "token", width)])
        values = values.reshape(values.shape[0], -1, values.shape[-1])
        if width == "kvdim":
            k = self.layout.group.head_size * self.layout.group.itemsize
            values = values[..., :k] if plane == 0 else values[..., k:]
        return values.copy()

    def state(self) -> list[list[Any]]:
        planes = range(len(self.layout.group.planes()))
        return [[self.rows(layer, p) for p in planes] for layer in range(len(self.caches))]


def build(layout: GroupLayout, blocks: int, rng: np.random.Generator, order: list[str]) -> Engine:
    """Random bits in tensors whose axes lie in memory in ``order``, inside larger allocations."""
    group, (lo, hi) = layout.group, layout.head_range
    heads = hi - lo if group.kind is AttentionKind.MHA else 1
    dense = "block" not in layout.axes
    extents = {
        "kv": 2,
        "block": blocks,
        "token": blocks * layout.tokens_per_block if dense else layout.tokens_per_block,
        "head": heads,
        "kvdim": sum(group.planes()),
    }
    dtypes = TORCH_DTYPES[group.dtype]
    dtype = dtypes[rng.integers(len(dtypes))]

    def tensor(dim: int) -> Any:
        shape = [{**extents, "dim": dim}[a] for a in order]
        shape[0] += 2
        nbytes = int(np.prod(shape)) * group.itemsize
        bits = torch.from_numpy(rng.integers(0, 256, nbytes, dtype=np.uint8)).view(dtype)
        return bits.view(shape)[1:-1].permute([order.index(a) for a in layout.axes])

    def cache() -> Any:
        if layout.is_pair:
            return tuple(tensor(dim) for dim in group.planes())
        return tensor(group.head_size)

    layers = layout.layer_range[1] - layout.layer_range[0]
    slots = blocks * layout.tokens_per_block
    return Engine(layout, [cache() for _ in range(layers)], slots)


@st.composite
def groups(draw: st.DrawFn) -> KVGroup:
    kind = draw(st.sampled_from([AttentionKind.MHA, AttentionKind.MHA, AttentionKind.MLA]))
    return KVGroup(
        kind,
        tuple(range(draw(st.integers(1, 4)))),
        draw(st.sampled_from(sorted(DTYPE_NBYTES))),
        num_kv_heads=draw(st.integers(1, 4)) if kind is AttentionKind.MHA else 1,
        head_size=draw(st.sampled_from([1, 3, 4, 8])),
        v_head_size=draw(st.sampled_from([None, 2])) if kind is AttentionKind.MHA else None,
    )


@st.composite
def ranges(draw: st.DrawFn, stop: int, start: int = 0) -> tuple[int, int]:
    lo = draw(st.integers(start, stop - 1))
    return lo, draw(st.integers(lo + 1, stop))


@st.composite
def engines(draw: st.DrawFn, group: KVGroup) -> Engine:
    mha = group.kind is AttentionKind.MHA
    uneven = group.v_head_size not in {None, group.head_size}
    names = draw(
        st.sampled_from([a for a in (MHA_AXES if mha else MLA_AXES) if not (uneven and "kv" in a)])
    )
    axes = tuple(draw(st.permutations(sorted(names))))
    width = "kvdim" if "kvdim" in names else "dim"
    order = [*draw(st.permutations(sorted(names - {width}))), width]
    layout = GroupLayout(
        group,
        axes,
        tokens_per_block=draw(st.sampled_from([1, 2, 3, 4, 8])) if "block" in names else 1,
        layers=draw(ranges(len(group.layers))),
        heads=draw(ranges(group.num_kv_heads)) if mha else None,
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return build(layout, draw(st.integers(1, 64 // layout.tokens_per_block)), rng, order)


@st.composite
def slot_lists(draw: st.DrawFn, engine: Engine, holes: bool) -> list[int]:
    """Whole blocks in any order, then tokens cut off the front and the back, or moved about."""
    size = engine.layout.tokens_per_block
    blocks = engine.num_slots // size
    ids = draw(st.one_of(st.permutations(range(blocks)), st.just(list(range(blocks)))))
    slots = [b * size + t for b in ids for t in range(size)]
    slots = slots[draw(st.sampled_from([0, 0, 1, 3])) :]
    slots = slots[: draw(st.integers(1, len(slots)))] if slots else [0]
    if draw(st.booleans()):
        slots = slots[: max(1, len(slots) // size * size)]
    if draw(st.integers(0, 4)) == 0:
        slots = draw(st.permutations(slots))
    if holes and draw(st.booleans()):
        front = draw(st.integers(0, len(slots)))
        gone = {*range(front), *draw(st.sets(st.integers(0, len(slots) - 1), max_size=4))}
        slots = [-1 if i in gone else s for i, s in enumerate(slots)]
    return slots


def as_buffer(slots: list[int], kind: str) -> Any:
    if kind == "range" and slots == list(range(slots[0], slots[0] + len(slots))):
        return range(slots[0], slots[0] + len(slots))
    return {
        "torch32": lambda: torch.tensor(slots, dtype=torch.int32),
        "torch64": lambda: torch.tensor(slots),
        "strided": lambda: torch.tensor([slots, slots]).T.contiguous()[:, 0],
        "numpy": lambda: np.array(slots, dtype=np.int32),
        "array": lambda: array("q", slots),
        "range": lambda: memoryview(array("i", slots)),
    }[kind]()


BUFFERS = st.sampled_from(["torch32", "torch64", "strided", "numpy", "array", "range"])


@st.composite
def parts(draw: st.DrawFn, group: KVGroup, within: GroupLayout | None = None) -> Part:
    mha = group.kind is AttentionKind.MHA
    (l0, l1), (h0, h1) = (0, len(group.layers)), (0, group.num_kv_heads)
    if within is not None:
        (l0, l1), (h0, h1) = within.layer_range, within.head_range
    return Part(0, draw(ranges(l1, l0)), draw(ranges(h1, h0)) if mha else None)


@contextmanager
def any_path(data: st.DataObject) -> Generator[None]:
    """Small test blocks take the paths of large ones, too, and small calls are split."""
    sizes = {
        "_STRETCH_NBYTES": st.sampled_from([0, 1 << 30]),
        "_TEMPORARY_NBYTES": st.sampled_from([1, 100, 1 << 20]),
        "_GRAIN_NBYTES": st.sampled_from([1, 4, 512]),
    }
    batch = data.draw(st.sampled_from([1, 100, 1 << 20]))
    with (
        patch.multiple(steps, **{name: data.draw(size) for name, size in sizes.items()}),
        patch.multiple(torch_stager, _BATCH_NBYTES=batch, _LEAST_NBYTES=1),
    ):
        yield


def payload_of(data: st.DataObject, group: KVGroup, part: Part, tokens: int) -> Payload:
    """A payload of one segment, as small ones are, or of several, as real ones are."""
    payload = Payload.of(group, part, tokens)
    per_segment = data.draw(st.integers(1, payload.num_layers))
    return replace(payload, layers_per_segment=per_segment)


def payload_rows(payload: Payload, host: memoryview, layer: int, plane: int, head: int) -> Any:
    """[token][row byte] of one head of one plane of layer ``layer`` of the payload: a view."""
    rows = [n * payload.group.itemsize for n in payload.group.planes()]
    at = payload.layer_offset(layer)
    at += sum(payload.num_heads * payload.tokens * row for row in rows[:plane])
    at += head * payload.tokens * rows[plane]
    nbytes = payload.tokens * rows[plane]
    return np.frombuffer(host, np.uint8)[at : at + nbytes].reshape(payload.tokens, rows[plane])


def random_host(payload: Payload, rng: np.random.Generator) -> memoryview:
    return memoryview(bytearray(rng.bytes(payload.nbytes)))


def head_range(part: Part) -> tuple[int, int]:
    return part.heads or (0, 1)


def scatter_oracle(engine: Engine, copy: HostCopy, slots: list[int]) -> list[list[Any]]:
    """What every plane must hold after the copy: most of it what it held before."""
    state, part = engine.state(), copy.part
    (r0, r1), (h0, h1) = engine.layout.layer_range, engine.layout.head_range
    if part.heads is None:
        h0, h1 = 0, 1
    for layer, plane, head in product(
        range(*part.layers), range(len(copy.payload.group.planes())), range(*head_range(part))
    ):
        if not (r0 <= layer < r1 and h0 <= head < h1):
            continue
        rows = payload_rows(
            copy.payload, copy.host, layer - part.layers[0], plane, head - head_range(part)[0]
        )
        for i in range(copy.tokens):
            slot = slots[copy.first + i]
            if slot >= 0:
                state[layer - r0][plane][head - h0, slot] = rows[copy.skip + i]
    return state


def same(left: list[list[Any]], right: list[list[Any]]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(np.array_equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True))


@pytest.mark.asyncio
@settings(deadline=None, max_examples=300)
@given(st.data(), STAGERS, BUFFERS)
async def test_gather_equals_copying_token_by_token(
    data: st.DataObject, stager_type: type[TorchStager], buffer: str
) -> None:
    group = data.draw(groups())
    engine = data.draw(engines(group))
    slots = data.draw(slot_lists(engine, holes=False))
    first = data.draw(st.integers(0, len(slots) - 1))
    tokens = data.draw(st.integers(1, len(slots) - first))
    payload = payload_of(data, group, data.draw(parts(group, engine.layout)), tokens)
    host = random_host(payload, np.random.default_rng(0))
    before = bytes(host)
    stager = stager_type(KVLayout((engine.layout,)), threads=data.draw(THREADS))
    view = engine.view(as_buffer(slots, buffer))
    with any_path(data):
        await stager.gather(view, [HostCopy(payload, host, first, tokens)])
    await stager.aclose()

    expected = memoryview(bytearray(before))
    (r0, _), (h0, _) = engine.layout.layer_range, engine.layout.head_range
    for layer, plane, head in product(
        range(*payload.part.layers), range(len(group.planes())), range(*head_range(payload.part))
    ):
        rows = payload_rows(
            payload,
            expected,
            layer - payload.part.layers[0],
            plane,
            head - head_range(payload.part)[0],
        )
        local_head = head - h0 if payload.part.heads else 0
        rows[:] = engine.rows(layer - r0, plane)[local_head, slots[first : first + tokens]]
    assert bytes(host) == bytes(expected)


@pytest.mark.asyncio
@settings(deadline=None, max_examples=300)
@given(st.data(), STAGERS, BUFFERS)
async def test_scatter_writes_what_the_rank_holds_and_nothing_else(
    data: st.DataObject, stager_type: type[TorchStager], buffer: str
) -> None:
    group = data.draw(groups())
    engine = data.draw(engines(group))
    slots = data.draw(slot_lists(engine, holes=True))
    first = data.draw(st.integers(0, len(slots) - 1))
    tokens = data.draw(st.integers(0, len(slots) - first))
    skip = data.draw(st.integers(0, 9))
    rest = data.draw(st.sampled_from([0, 0, 0, 5]))
    payload = payload_of(data, group, data.draw(parts(group)), max(1, skip + tokens + rest))
    host = random_host(payload, np.random.default_rng(1))
    copy = HostCopy(payload, host.toreadonly(), first, tokens, skip)
    expected = scatter_oracle(engine, copy, slots)
    stager = stager_type(KVLayout((engine.layout,)), threads=data.draw(THREADS))
    with any_path(data):
        await stager.scatter(engine.view(as_buffer(slots, buffer)), [copy])
    await stager.aclose()
    assert same(engine.state(), expected)


@pytest.mark.asyncio
@settings(deadline=None, max_examples=150)
@given(st.data())
async def test_what_one_layout_stores_any_other_layout_loads_bit_for_bit(
    data: st.DataObject,
) -> None:
    group = data.draw(groups())
    source, target = data.draw(engines(group)), data.draw(engines(group))
    whole = {"layers": None, "heads": None}
    source, target = (
        build(
            replace(e.layout, **whole),
            max(2, e.num_slots // e.layout.tokens_per_block),
            np.random.default_rng(seed),
            sorted(e.layout.axes, key=lambda a: (a in {"dim", "kvdim"}, a)),
        )
        for seed, e in enumerate((source, target))
    )
    tokens = min(source.num_slots, target.num_slots)
    chunk = data.draw(st.integers(1, tokens))
    slots = [data.draw(st.permutations(range(e.num_slots)))[:tokens] for e in (source, target)]
    heads = (0, group.num_kv_heads) if group.kind is AttentionKind.MHA else None
    copies = []
    for start in range(0, tokens, chunk):
        held = min(chunk, tokens - start)
        payload = Payload.of(group, Part(0, (0, len(group.layers)), heads), held)
        host = memoryview(bytearray(payload.nbytes))
        copies.append(HostCopy(payload, host, start, held))
    for engine, order, copy in ((source, slots[0], "gather"), (target, slots[1], "scatter")):
        stager = TorchStager(KVLayout((engine.layout,)), threads=data.draw(THREADS))
        with any_path(data):
            await getattr(stager, copy)(engine.view(torch.tensor(order)), copies)
        await stager.aclose()
    for stored, loaded in zip(source.state(), target.state(), strict=True):
        for a, b in zip(stored, loaded, strict=True):
            assert np.array_equal(a[:, slots[0]], b[:, slots[1]])
