"""Payloads whose bytes are the engine's own: native blocks and recurrent states."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch

from kvlayer.abc.stager import HostCopy
from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import (
    FUSED_HND,
    MLA_BLOCKS,
    NHD,
    NHD_BLOCK_FIRST,
    NHD_PAIR,
    STATE_BLOCKS,
    AttentionKind,
    HitRule,
    KVGroup,
    KVLayout,
    KVView,
)
from kvlayer.payload import Payload
from kvlayer.staging.device_cache import DeviceCache
from kvlayer.staging.torch_stager import TorchStager

LAYERS, HEADS, DIM, SIZE, BLOCKS = 3, 2, 4, 4, 7
EXTENTS = {"kv": 2, "block": BLOCKS, "token": SIZE, "head": HEADS, "dim": DIM, "kvdim": 2 * DIM}
MHA = KVGroup(AttentionKind.MHA, tuple(range(LAYERS)), "bfloat16", HEADS, DIM)
MLA = KVGroup(AttentionKind.MLA, tuple(range(LAYERS)), "bfloat16", 1, DIM)
STATE = KVGroup(
    AttentionKind.STATE,
    (0, 1),
    "float32",
    state_nbytes=24,
    hit_rule=HitRule.TRAILING,
    window_tokens=1,
)


class DevicePathStager(TorchStager):
    def _open(self, tensor: Any) -> Any:
        return DeviceCache(tensor)


@pytest.fixture(params=[TorchStager, DevicePathStager])
def stager_type(request: pytest.FixtureRequest) -> type[TorchStager]:
    return request.param


def blocks(axes: tuple[str, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    shape = [EXTENTS[a] for a in axes]
    bits = np.random.default_rng(seed).integers(0, 2**16, shape, dtype=np.uint16)
    return torch.from_numpy(bits.view(np.int16)).view(dtype)


def caches(axes: tuple[str, ...], pair: bool, seed: int = 0) -> list[Any]:
    def layer(i: int) -> Any:
        i += seed
        return (blocks(axes, i), blocks(axes, 100 + i)) if pair else blocks(axes, i)

    return [layer(i) for i in range(LAYERS)]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.int16).numpy().tobytes()


def slots_of(ids: list[int]) -> torch.Tensor:
    return torch.tensor([b * SIZE + t if b >= 0 else -1 for b in ids for t in range(SIZE)])


CASES = [
    (MHA, NHD, 1),
    (MHA, NHD_BLOCK_FIRST, 0),
    (MHA, NHD_PAIR, 0),
    (MHA, FUSED_HND, 0),
    (MHA, ("head", "block", "token", "kvdim"), 1),
    (MLA, MLA_BLOCKS, 0),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("group", "axes", "block_axis"), CASES)
@pytest.mark.parametrize("ids", [[3, 1, 6], [2, 3, 4], [0]])
async def test_a_native_payload_is_the_layer_tensor_with_its_block_axis_restricted(
    group: KVGroup,
    axes: tuple[str, ...],
    block_axis: int,
    ids: list[int],
    stager_type: type[TorchStager],
) -> None:
    layout = KVLayout.single(group, axes, tokens_per_block=SIZE, form="native:test")
    pair = layout.groups[0].is_pair
    kv = caches(axes, pair)
    part = Part(0, (1, 3), (0, HEADS) if group is MHA else None, "native:test")
    payload = Payload.of(group, part, SIZE * len(ids))
    host = memoryview(bytearray(payload.nbytes))
    stager = stager_type(layout)
    copies = [HostCopy(payload, host, 0, payload.tokens)]
    await stager.gather(KVView.single(kv, slots_of(ids)), copies)
    for i, layer in enumerate(kv[1:]):
        tensors = layer if pair else (layer,)
        expected = b"".join(bits(t.index_select(block_axis, torch.tensor(ids))) for t in tensors)
        at = payload.layer_offset(i)
        assert host[at : at + payload.layer_nbytes] == expected

    other = caches(axes, pair, seed=50)
    untouched = [bits(t) for t in (other[0] if pair else (other[0],))]
    target = [6, 5, 0][: len(ids)]
    await stager.scatter(KVView.single(other, slots_of(target)), copies)
    await stager.aclose()
    for stored, loaded in zip(kv[1:], other[1:], strict=True):
        pairs = zip(stored, loaded, strict=True) if pair else [(stored, loaded)]
        for a, b in pairs:
            for i, j in zip(ids, target, strict=True):
                assert bits(a.select(block_axis, i)) == bits(b.select(block_axis, j))
    assert [bits(t) for t in (other[0] if pair else (other[0],))] == untouched


@pytest.mark.asyncio
async def test_native_planes_that_are_not_equally_spaced_keep_their_order(
    stager_type: type[TorchStager],
) -> None:
    axes = ("kv", "head", "block", "token", "dim")
    layout = KVLayout.single(MHA, axes, tokens_per_block=SIZE, form="native:test")
    room = torch.randint(-(2**15), 2**15, (LAYERS, 2, 3, BLOCKS, SIZE, DIM), dtype=torch.int16)
    kv = [t.view(torch.bfloat16)[:, :HEADS] for t in room]
    payload = Payload.of(MHA, Part(0, (0, LAYERS), (0, HEADS), "native:test"), SIZE)
    host = memoryview(bytearray(payload.nbytes))
    stager = stager_type(layout)
    await stager.gather(KVView.single(kv, slots_of([3])), [HostCopy(payload, host, 0, SIZE)])
    await stager.aclose()
    for layer, cache in enumerate(kv):
        at = payload.layer_offset(layer)
        assert host[at : at + payload.layer_nbytes] == bits(cache[:, :, 3])


@pytest.mark.asyncio
async def test_native_blocks_of_holes_and_skipped_blocks_are_left_alone(
    stager_type: type[TorchStager],
) -> None:
    layout = KVLayout.single(MLA, MLA_BLOCKS, tokens_per_block=SIZE, form="native:test")
    payload = Payload.of(MLA, Part(0, (0, LAYERS), None, "native:test"), 4 * SIZE)
    host = memoryview(np.random.default_rng(0).bytes(payload.nbytes))
    kv = caches(MLA_BLOCKS, False)
    before = [bits(t) for t in kv]
    stager = stager_type(layout)
    view = KVView.single(kv, slots_of([5, -1, 2]))
    await stager.scatter(view, [HostCopy(payload, host, 0, 3 * SIZE, skip=SIZE)])
    await stager.aclose()
    nbytes = SIZE * DIM * 2
    for layer, cache in enumerate(kv):
        at = payload.layer_offset(layer)
        now = bits(cache)
        for block in range(BLOCKS):
            source = {5: 1, 2: 3}.get(block)
            found = now[block * nbytes : (block + 1) * nbytes]
            if source is None:
                assert found == before[layer][block * nbytes : (block + 1) * nbytes]
            else:
                assert found == host[at + source * nbytes : at + (source + 1) * nbytes]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("slots", "tokens", "skip"),
    [
        ([0, 1, 2, 3, 4, 5], 6, 0),  # not whole
        ([1, 2, 3, 4], 4, 0),  # not aligned
        ([3, 2, 1, 0], 4, 0),  # not in order
        ([0, 1, -1, 3], 4, 0),  # a hole inside a block
        ([0, 1, 2, 3], 4, 2),  # skips half a block
    ],
)
async def test_native_copies_of_anything_but_whole_blocks_are_refused(
    slots: list[int], tokens: int, skip: int
) -> None:
    layout = KVLayout.single(MLA, MLA_BLOCKS, tokens_per_block=SIZE, form="native:test")
    payload = Payload.of(MLA, Part(0, (0, LAYERS), None, "native:test"), tokens + skip)
    host = memoryview(bytearray(payload.nbytes))
    kv = caches(MLA_BLOCKS, False)
    before = [bits(t) for t in kv]
    stager = TorchStager(layout)
    with pytest.raises(LayoutError, match="whole blocks"):
        await stager.scatter(
            KVView.single(kv, array("q", slots)), [HostCopy(payload, host, 0, tokens, skip)]
        )
    await stager.aclose()
    assert [bits(t) for t in kv] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("per_block", [1, 4])
@pytest.mark.asyncio
async def test_a_state_payload_is_the_state_at_the_last_tokens_slot(
    dtype: torch.dtype, per_block: int, stager_type: type[TorchStager]
) -> None:
    layout = KVLayout.single(STATE, STATE_BLOCKS, tokens_per_block=per_block)
    raw = [torch.randint(0, 256, (5, 24), dtype=torch.uint8) for _ in range(2)]
    payload = Payload.of(STATE, Part(0, (0, 2), None), 3)
    host = memoryview(bytearray(payload.nbytes))
    stager = stager_type(layout)
    slots = array("i", [0, 0, 3 * per_block + per_block - 1])
    view = KVView.single([t.view(dtype) for t in raw], slots)
    await stager.gather(view, [HostCopy(payload, host, 0, 3)])
    for layer in range(2):
        at = payload.layer_offset(layer)
        assert host[at : at + 24] == raw[layer][3].numpy().tobytes()

    target = [torch.zeros(5, 24, dtype=torch.uint8) for _ in range(2)]
    view = KVView.single([t.view(dtype) for t in target], array("i", [-1, per_block]))
    await stager.scatter(view, [HostCopy(payload, host, 0, 2, skip=1)])
    for layer in range(2):
        assert torch.equal(target[layer][1], raw[layer][3])
        assert not target[layer][[0, 2, 3, 4]].any()

    gone = KVView.single([t.view(dtype) for t in target], array("i", [0, -1]))
    before = [t.clone() for t in target]
    await stager.scatter(gone, [HostCopy(payload, host, 0, 2, skip=1)])
    assert all(torch.equal(a, b) for a, b in zip(before, target, strict=True))
    with pytest.raises(LayoutError, match="last token"):
        await stager.scatter(view, [HostCopy(payload, host, 0, 2, skip=0)])
    await stager.aclose()


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.asyncio
async def test_two_states_of_one_block_are_refused(
    gather: bool, stager_type: type[TorchStager]
) -> None:
    """A block holds the state after one token: one of them would be the other's bytes."""
    layout = KVLayout.single(STATE, STATE_BLOCKS, tokens_per_block=8)
    states = [torch.arange(2 * 24, dtype=torch.uint8).reshape(2, 24) for _ in range(2)]
    payload = Payload.of(STATE, Part(0, (0, 2), None), 6)
    memory = [memoryview(bytearray(payload.nbytes)) for _ in range(2)]
    copies = [HostCopy(payload, host, at * 6, 6) for at, host in enumerate(memory)]
    stager = stager_type(layout)
    move = stager.gather if gather else stager.scatter
    with pytest.raises(LayoutError, match="end in block 0"):
        await move(KVView.single(states, array("i", [0] * 12)), copies)
    apart = KVView.single(states, array("i", [0] * 6 + [8] * 6))
    await move(apart, copies)
    # Parts of one payload, other layers of it, share their blocks.
    parts = [Payload.of(STATE, Part(0, (layer, layer + 1), None), 6) for layer in range(2)]
    if not gather:
        await move(
            apart, [HostCopy(part, host, 0, 6) for part, host in zip(parts, memory, strict=True)]
        )
    await stager.aclose()
