"""Tensor and pipeline parallel ranks read what ranks of another number wrote."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kvlayer.abc.stager import HostCopy
from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import FUSED_HND, HND, NHD, AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.payload import Payload
from kvlayer.runtime.offload import Offload
from kvlayer.staging.torch_stager import TorchStager

LAYERS, HEADS, DIM, TOKENS = 4, 8, 8, 64
GROUP = KVGroup(AttentionKind.MHA, tuple(range(LAYERS)), "float16", HEADS, DIM)
TRUTH = torch.randint(-(2**15), 2**15, (LAYERS, 2, HEADS, TOKENS, DIM), dtype=torch.int16)


@dataclass
class Rank:
    """One rank's share of the model, its layout and tensors."""

    layout: KVLayout
    caches: list[torch.Tensor]
    slots: torch.Tensor

    @property
    def view(self) -> KVView:
        return KVView.single(self.caches, self.slots)


def ranks(tp: int, pp: int, axes: tuple[str, ...], size: int, filled: bool) -> list[Rank]:
    order = torch.randperm(TOKENS // size + 3)[: TOKENS // size]
    slots = (order[:, None] * size + torch.arange(size)).flatten()
    found = []
    for stage in range(pp):
        for rank in range(tp):
            layers = (stage * LAYERS // pp, (stage + 1) * LAYERS // pp)
            heads = (rank * HEADS // tp, (rank + 1) * HEADS // tp)
            layout = KVLayout.single(GROUP, axes, tokens_per_block=size, layers=layers, heads=heads)
            shape = [2, TOKENS // size + 3, size, heads[1] - heads[0], DIM]
            nhd = torch.zeros(layers[1] - layers[0], *shape, dtype=torch.int16)
            if filled:
                truth = TRUTH[layers[0] : layers[1], :, heads[0] : heads[1]]
                flat = nhd.view(nhd.shape[0], 2, -1, *nhd.shape[4:])
                flat[:, :, slots] = truth.permute(0, 1, 3, 2, 4)
            found.append(Rank(layout, [_as(axes, t).view(torch.float16) for t in nhd], slots))
    return found


def _as(axes: tuple[str, ...], nhd: torch.Tensor) -> torch.Tensor:
    """[kv, block, token, head, dim] as other axes, contiguous."""
    if axes == FUSED_HND:
        return nhd.permute(1, 3, 2, 0, 4).flatten(3).contiguous()
    return nhd.permute([NHD.index(a) for a in axes]).contiguous()


def truth_of(rank: Rank) -> torch.Tensor:
    """[layer, kv, head, token, dim] as the rank holds it."""
    axes, (lo, hi) = rank.layout.groups[0].axes, rank.layout.groups[0].head_range
    layers = []
    for cache in rank.caches:
        bits = cache.view(torch.int16)
        if axes == FUSED_HND:
            bits = bits.unflatten(3, (2, DIM)).permute(3, 0, 2, 1, 4)
        else:
            bits = bits.permute([axes.index(a) for a in NHD])
        layers.append(bits.reshape(2, -1, hi - lo, DIM)[:, rank.slots].permute(0, 2, 1, 3))
    return torch.stack(layers)


@pytest.mark.asyncio
@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (1, 4), (2, 1), (4, 1), (2, 4), (8, 2)])
@pytest.mark.parametrize("shards", [8, 4])
async def test_any_tp_size_reads_what_any_other_wrote(
    writers: int, readers: int, shards: int
) -> None:
    shards = max(shards, writers)
    offload = Offload(1, "test")
    chunk = 32
    stored: list[HostCopy] = []
    for rank in ranks(writers, 2, NHD, 16, filled=True):
        layout = rank.layout.groups[0]
        lo, hi = layout.head_range
        step = HEADS // shards
        copies = []
        for head in range(lo, hi, step):
            part = Part(0, layout.layer_range, (head, head + step))
            for first in range(0, TOKENS, chunk):
                payload = Payload.of(GROUP, part, chunk)
                host = memoryview(bytearray(payload.nbytes))
                copies.append(HostCopy(payload, host, first, chunk))
        await TorchStager(rank.layout, offload=offload).gather(rank.view, copies)
        stored += copies
    for axes, size in ((HND, 32), (FUSED_HND, 4)):
        for rank in ranks(readers, 1, axes, size, filled=False):
            await TorchStager(rank.layout, offload=offload).scatter(rank.view, stored)
            lo, hi = rank.layout.groups[0].head_range
            assert torch.equal(truth_of(rank), TRUTH[:, :, lo:hi])
    offload.close()


@pytest.mark.asyncio
async def test_a_part_that_shares_nothing_with_the_rank_changes_nothing() -> None:
    rank = ranks(2, 2, NHD, 16, filled=True)[0]
    before = [t.clone() for t in rank.caches]
    stager = TorchStager(rank.layout)
    for layers, heads in (((2, 4), (0, 8)), ((0, 4), (4, 8))):
        payload = Payload.of(GROUP, Part(0, layers, heads), TOKENS)
        host = memoryview(bytes(payload.nbytes))
        await stager.scatter(rank.view, [HostCopy(payload, host, 0, TOKENS)])
    await stager.aclose()
    for a, b in zip(before, rank.caches, strict=True):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("layers", "heads"), [((0, 4), (0, 4)), ((0, 2), (0, 8)), ((0, 2), (3, 5)), ((2, 4), (0, 4))]
)
async def test_a_rank_gathers_only_parts_within_its_share(
    layers: tuple[int, int], heads: tuple[int, int]
) -> None:
    rank = ranks(2, 2, NHD, 16, filled=True)[0]
    payload = Payload.of(GROUP, Part(0, layers, heads), TOKENS)
    stager = TorchStager(rank.layout)
    host = memoryview(bytearray(payload.nbytes))
    with pytest.raises(LayoutError, match="not within the rank's layers and heads"):
        await stager.gather(rank.view, [HostCopy(payload, host, 0, TOKENS)])
    await stager.aclose()
