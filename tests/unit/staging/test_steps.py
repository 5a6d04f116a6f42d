"""How rows move on the CPU: in few calls, without the interpreter's lock, and nothing set aside."""

from __future__ import annotations

import tracemalloc
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

from kvlayer.abc.stager import HostCopy
from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import (
    DENSE,
    FUSED_HND,
    HND,
    MLA_BLOCKS,
    NHD,
    NHD_BLOCK_FIRST,
    NHD_PAIR,
    AttentionKind,
    KVGroup,
    KVLayout,
    KVView,
)
from kvlayer.payload import Payload
from kvlayer.staging.address import overlap, strips
from kvlayer.staging.device_cache import DeviceCache
from kvlayer.staging.geometry import TensorShape, cache_geometry
from kvlayer.staging.moves import plan_moves
from kvlayer.staging.sample import paged_view
from kvlayer.staging.slots import SlotTable, slot_runs
from kvlayer.staging.steps import Step, gather_steps, scatter_steps
from kvlayer.staging.torch_stager import TorchStager
from kvlayer.staging.torch_view import GeometryReader, tensors_of

MIB = 1 << 20
SIZE, BLOCKS = 16, 256
MHA = KVGroup(AttentionKind.MHA, (0, 1), "bfloat16", 8, 128)
MLA = KVGroup(AttentionKind.MLA, (0, 1), "bfloat16", 1, 576)
LAYOUTS = {
    "nhd": (MHA, NHD, "canonical"),
    "nhd native": (MHA, NHD, "native:nhd"),
    "hnd": (MHA, HND, "canonical"),
    "block first": (MHA, NHD_BLOCK_FIRST, "canonical"),
    "pair": (MHA, NHD_PAIR, "canonical"),
    "fused": (MHA, FUSED_HND, "canonical"),
    "mla": (MLA, MLA_BLOCKS, "canonical"),
    "mla native": (MLA, MLA_BLOCKS, "native:mla"),
}
CANONICAL = [name for name, (*_, form) in LAYOUTS.items() if form == "canonical"]


def layout_of(name: str) -> KVLayout:
    group, axes, form = LAYOUTS[name]
    return KVLayout.single(group, axes, tokens_per_block=SIZE, form=form)


def payload_of(layout: KVLayout, tokens: int) -> Payload:
    (group,) = layout.groups
    heads = (0, 8) if group.group is MHA else None
    return Payload.of(group.group, Part(0, (0, 2), heads, group.form), tokens)


def steps_of(name: str, blocks: list[int], *, gather: bool) -> list[Step]:
    """The steps of all strips of one layer."""
    layout = layout_of(name)
    view = paged_view(layout, BLOCKS, seed=0)
    slots = np.concatenate([np.arange(b * SIZE, (b + 1) * SIZE) for b in blocks])
    view = KVView.single(view.caches[0], torch.from_numpy(slots))
    payload = payload_of(layout, len(slots))
    copy = HostCopy(payload, memoryview(bytearray(payload.nbytes)), 0, len(slots))
    geometries = GeometryReader(layout).read(view)
    (move,) = plan_moves(layout, view, geometries, [copy], gather=gather)
    transfer = move.layers[0][2]
    of = transfer.gathers if gather else transfer.scatters
    return [step for number in range(len(transfer.strips)) for step in of(number)]


def nbytes(step: Step) -> int:
    return prod(step.payload.shape) * step.payload.dtype.itemsize


SCATTERED = [7, 3, 250, 0, 9, 100, 11, 64, 17, 200, 33, 5, 90, 41, 70, 150]


@pytest.mark.parametrize("name", LAYOUTS)
def test_scattered_blocks_of_a_layer_move_in_one_call(name: str) -> None:
    calls = 2 if name == "pair" else 1  # one for each tensor
    assert len(steps_of(name, SCATTERED, gather=True)) == calls
    assert len(steps_of(name, SCATTERED, gather=False)) == calls
    for step in steps_of(name, SCATTERED, gather=True):
        assert step.is_take
        assert len(step.payload.shape) == 1


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("gather", [True, False])
def test_neighbouring_blocks_move_in_one_strided_call(name: str, gather: bool) -> None:
    for step in steps_of(name, list(range(20, 36)), gather=gather):
        assert step.payload_at is step.cache_at is ...
        assert not step.is_take


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("gather", [True, False])
def test_no_long_call_keeps_the_interpreters_lock(name: str, gather: bool) -> None:
    """numpy lets go of it for a take, for more than 500 elements, and for more than an index."""
    for blocks in (SCATTERED, list(range(20, 36)), list(range(64)) + list(range(128, 192))):
        for step in steps_of(name, blocks, gather=gather):
            if step.is_take or nbytes(step) <= 256 * 1024:
                continue
            if step.cache_at is ...:
                assert prod(step.payload.shape) > 500
            else:
                assert len(step.payload.shape) > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_long_stretches_move_in_a_call_each(name: str) -> None:
    blocks = [*range(128, 240), *range(112)]
    assert len(steps_of(name, blocks, gather=False)) == (4 if name == "pair" else 2)


@pytest.mark.parametrize(
    ("name", "first"), [*product([*LAYOUTS, "dense"], [0]), *product([*CANONICAL, "dense"], [5])]
)
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.asyncio
async def test_nothing_but_indices_is_held_beside_the_memory_lent(
    name: str, first: int, gather: bool
) -> None:
    """8 bytes for each row of a layer, per thread, and a few times 8 for each token's slot."""
    group = LAYOUTS.get(name, (MHA, DENSE, "canonical"))[0]
    if name == "dense":
        layout = KVLayout.single(MHA, DENSE)
        tokens = BLOCKS * SIZE
        caches: list[Any] = [
            (torch.zeros(8, tokens, 128).bfloat16(), torch.zeros(8, tokens, 128).bfloat16())
            for _ in range(2)
        ]
        view = KVView.single(caches, range(tokens))
    else:
        layout = layout_of(name)
        view = paged_view(layout, BLOCKS, seed=0)
    tokens = view.num_tokens
    payload = payload_of(layout, tokens - first)
    host = memoryview(bytearray(payload.nbytes))
    assert payload.nbytes > 8 * MIB
    stager = TorchStager(layout, threads=2)
    call = stager.gather if gather else stager.scatter
    copies = [HostCopy(payload, host, first, tokens - first)]
    await call(view, copies)  # what is made once is there
    rows = tokens * (2 * 8 if group is MHA else 1)
    tracemalloc.start()
    try:
        await call(view, copies)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 8 * rows + 4 * 8 * tokens + 128 * 1024
    await stager.aclose()


@pytest.mark.asyncio
async def test_rows_apart_by_less_than_rows_are_set_aside_in_pieces() -> None:
    """K and V rows of uneven length: no row index fits, so numpy needs a temporary."""
    group = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 8, 192, 128)
    layout = KVLayout.single(group, FUSED_HND, tokens_per_block=SIZE)
    view = paged_view(layout, BLOCKS, seed=0)
    tokens = view.num_tokens
    payload = Payload.of(group, Part(0, (0, 1), (0, 8)), tokens)
    host = memoryview(bytearray(payload.nbytes))
    assert payload.nbytes > 16 * MIB
    stager = TorchStager(layout, threads=1)
    copies = [HostCopy(payload, host, 0, tokens)]
    await stager.gather(view, copies)
    tracemalloc.start()
    try:
        await stager.gather(view, copies)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert MIB <= peak < 2 * MIB
    await stager.aclose()


class DevicePathStager(TorchStager):
    """The path of other devices: torch's indexing, nothing of the steps."""

    def _open(self, tensor: Any) -> Any:
        return DeviceCache(tensor)


BLOCK_ORDERS = {
    "scattered": SCATTERED,
    "one piece": [*range(20, 84)],
    "long stretches": [*range(128, 240), *range(112)],
    "short stretches": [*range(8, 12), *range(4), *range(30, 33), 50],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("order", BLOCK_ORDERS)
@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.asyncio
async def test_whatever_the_order_of_blocks_steps_move_what_indexing_moves(
    name: str, order: str, first: int
) -> None:
    layout = layout_of(name)
    first = 0 if "native" in name else first
    source = paged_view(layout, BLOCKS, seed=5)
    offsets = np.arange(SIZE)
    slots = torch.from_numpy((np.array(BLOCK_ORDERS[order])[:, None] * SIZE + offsets).reshape(-1))
    tokens = len(slots) - first
    payload = payload_of(layout, tokens)
    stored: list[bytes] = []
    loaded: list[Any] = []
    for stager_type in (TorchStager, DevicePathStager):
        stager = stager_type(layout, threads=2)
        host = memoryview(bytearray(payload.nbytes))
        copies = [HostCopy(payload, host, first, tokens)]
        await stager.gather(KVView.single(source.caches[0], slots), copies)
        stored.append(bytes(host))
        target = paged_view(layout, BLOCKS, seed=6)
        await stager.scatter(KVView.single(target.caches[0], slots), copies)
        tensors = [t for cache in target.caches[0] for t in tensors_of(cache)]
        loaded.append(torch.stack(tensors).view(torch.int16))
        await stager.aclose()
    assert stored[0] == stored[1]
    assert torch.equal(loaded[0], loaded[1])


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.asyncio
async def test_copies_of_one_call_move_as_they_would_alone(gather: bool) -> None:
    """They share what is worked out for their payload, whole blocks and loose tokens alike."""
    layout = layout_of("nhd")
    blocks = torch.tensor([9, 4, 30, 31])[:, None] * SIZE + torch.arange(SIZE)
    slots = torch.cat([blocks.reshape(-1), torch.arange(100, 100 + 4 * SIZE)])
    payload = payload_of(layout, 2 * SIZE)
    moved: list[bytes] = []
    for together in (True, False):
        view = paged_view(layout, 32, seed=2)
        view = KVView.single(view.caches[0], slots)
        hosts = [memoryview(bytearray(payload.nbytes)) for _ in range(4)]
        if not gather:
            rng = np.random.default_rng(1)
            hosts = [memoryview(bytearray(rng.bytes(payload.nbytes))) for _ in hosts]
        copies = [HostCopy(payload, h, 2 * SIZE * i, 2 * SIZE) for i, h in enumerate(hosts)]
        stager = TorchStager(layout, threads=2)
        call = stager.gather if gather else stager.scatter
        for part in [copies] if together else [[copy] for copy in copies]:
            await call(view, part)
        tensors = torch.stack(list(view.caches[0])).view(torch.int16)
        moved.append(b"".join(hosts) if gather else tensors.numpy().tobytes())
        await stager.aclose()
    assert moved[0] == moved[1]


# -- planning ------------------------------------------------------------------------------------


def test_a_table_knows_the_blocks_of_whole_views_and_leaves_the_rest_alone() -> None:
    layout = layout_of("nhd")
    shape = TensorShape((2, 8, SIZE, 8, 128), (8 * 16384, 16384, 1024, 128, 1), 2)
    geometry = cache_geometry(layout.groups[0], [shape])
    slots = np.concatenate([np.arange(b * SIZE, (b + 1) * SIZE) for b in (3, 7, 0, 5)])
    table = SlotTable(slots, 32)
    found = table.blocks(32 + SIZE, 2 * SIZE, geometry)
    assert found is not None
    assert found.tolist() == [7, 0]
    assert table.slots(32 + SIZE, 3).tolist() == [112, 113, 114]
    assert table.blocks(33, SIZE, geometry) is None  # begins inside a block
    assert table.blocks(32, SIZE + 1, geometry) is None
    holes = slots.copy()
    holes[:SIZE] = -1
    assert SlotTable(holes, 32).blocks(32 + SIZE, SIZE, geometry) is None
    beyond = slots + 8 * SIZE
    assert SlotTable(beyond, 32).blocks(32, SIZE, geometry) is None
    with pytest.raises(LayoutError, match="outside"):
        slot_runs(beyond, 0, geometry)


@pytest.mark.parametrize("tokens", [SIZE, 4 * SIZE])
def test_what_a_table_plans_is_what_a_look_at_the_copy_plans(tokens: int) -> None:
    layout = layout_of("nhd")
    view = paged_view(layout, 8, seed=3)
    geometry = GeometryReader(layout).read(view)[0][0]
    payload = payload_of(layout, 6 * SIZE)
    copy = HostCopy(payload, memoryview(bytearray(payload.nbytes)), SIZE, tokens, skip=SIZE)
    geometries = [[geometry, geometry]]
    (move,) = plan_moves(layout, view, geometries, [copy], gather=False)
    transfer = move.layers[0][2]
    alone = slot_runs(view.slots[0].numpy()[SIZE : SIZE + tokens], SIZE, geometry)
    assert transfer.strips == strips(geometry, payload, overlap(layout.groups[0], payload))
    (found,), (expected,) = transfer.runs.runs, alone.runs
    assert found.row == expected.row
    assert found.ids.tolist() == expected.ids.tolist()
    assert gather_steps(transfer.strips[0], alone)[0].payload == transfer.gathers(0)[0].payload
    assert scatter_steps(transfer.strips[0], alone)[0].cache == transfer.scatters(0)[0].cache
