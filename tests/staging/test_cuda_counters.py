"""What a prompt of 8,192 tokens of Llama-3-8B costs the link: counted, nothing is moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fake_cupy
import pytest
import torch
from gpu_engine import DeviceTensor
from gpu_scenarios import NoTorch
from gpu_sim import Gpu

from kvlayer.abc.stager import HostCopy
from kvlayer.keys import Part
from kvlayer.layout import NHD, NHD_BLOCK_FIRST, AttentionKind, Axes, KVGroup, KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.pinned import PIECE_NBYTES
from kvlayer.staging.cuda.stager import CudaStager

LLAMA = KVGroup(AttentionKind.MHA, tuple(range(32)), "bfloat16", 8, 128)
BLOCK, CHUNK, TOKENS = 16, 256, 8192
PAYLOAD_NBYTES = 1 << 30  # 128 KiB a token
DEFAULTS = Calibration()
SLOTS_FILLED = PAYLOAD_NBYTES // DEFAULTS.slot_nbytes


async def moved(
    layout: KVLayout, blocks: torch.Tensor, verb: str, thresholds: Calibration = DEFAULTS
) -> Gpu:
    """One store or load of the whole prompt, from or to these blocks."""
    gpu = Gpu("count")
    (held,) = layout.groups
    form, part = held.form, Part(0, (0, 32), (0, 8), held.form)
    payload = Payload.of(LLAMA, part, CHUNK)
    extent = {"kv": 2, "block": TOKENS // BLOCK, "token": BLOCK, "head": 8, "dim": 128}
    shape = [extent[axis] for axis in held.axes]
    cache: Any = torch.empty(shape, dtype=torch.bfloat16).as_subclass(DeviceTensor)  # untouched
    slots = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).reshape(-1)
    assert form in ("canonical", "native:nhd-b16")
    slab = Slab(PAYLOAD_NBYTES)
    with fake_cupy.install(gpu):
        stager = CudaStager(layout, devices=Devices(slab, thresholds), torch_stager=NoTorch())
        assert await stager.ready()
        assert await stager.pinned() == slab.nbytes
        copies = [
            HostCopy(payload, slab.view(at * payload.nbytes, payload.nbytes), at * CHUNK, CHUNK)
            for at in range(TOKENS // CHUNK)
        ]
        view = KVView.single([cache] * 32, slots)
        await (stager.gather if verb == "store" else stager.scatter)(view, copies)
        await stager.aclose()
    slab.close()
    return gpu


def layout(axes: Axes = NHD, form: str = "canonical") -> KVLayout:
    return KVLayout.single(LLAMA, axes, tokens_per_block=BLOCK, form=form)


SHUFFLED = torch.randperm(TOKENS // BLOCK, generator=torch.Generator().manual_seed(1))
IN_ORDER = torch.arange(TOKENS // BLOCK)


@pytest.mark.asyncio
async def test_a_store_of_8192_tokens_sends_its_payload_once_in_a_copy_per_slot(figures) -> None:
    gpu = await moved(layout(), SHUFFLED, "store")
    counts = gpu.counts
    assert counts["to_host_nbytes"] == PAYLOAD_NBYTES
    assert counts["copies_to_host"] == SLOTS_FILLED == 64
    assert counts["launches"] == counts["copies_to_device"] == SLOTS_FILLED
    assert counts["to_device_nbytes"] == counts["table_nbytes"] <= PAYLOAD_NBYTES // 1000
    assert gpu.peak_pinned <= PAYLOAD_NBYTES + (4 << 20)
    figures("staging.store_8k", **counts, pinned=gpu.peak_pinned)


@pytest.mark.asyncio
async def test_a_load_of_8192_tokens_brings_its_payload_once_in_long_runs(figures) -> None:
    gpu = await moved(layout(), SHUFFLED, "load")
    counts = gpu.counts
    assert counts["to_host_nbytes"] == 0
    assert counts["to_device_nbytes"] - counts["table_nbytes"] == PAYLOAD_NBYTES
    assert counts["table_nbytes"] <= PAYLOAD_NBYTES // 500
    assert counts["launches"] == SLOTS_FILLED
    # Four layers of four chunks fill a slot, and a table comes with each.
    assert counts["copies_to_device"] == 4 * SLOTS_FILLED + SLOTS_FILLED
    assert gpu.peak_pinned <= PAYLOAD_NBYTES + (4 << 20)
    figures("staging.load_8k", **counts, pinned=gpu.peak_pinned)


@pytest.mark.asyncio
async def test_with_batches_a_load_of_8192_tokens_is_a_call_per_slot() -> None:
    counts = (await moved(layout(), SHUFFLED, "load", replace(DEFAULTS, batch_runs=4))).counts
    assert counts["batches"] == SLOTS_FILLED
    assert counts["to_device_nbytes"] - counts["table_nbytes"] == PAYLOAD_NBYTES


@pytest.mark.asyncio
@pytest.mark.parametrize(("blocks", "runs"), [(IN_ORDER, 1024), (SHUFFLED, 512 * 32)])
async def test_whole_blocks_go_straight_into_the_cache_and_neighbours_in_one_run(
    blocks: torch.Tensor, runs: int
) -> None:
    native = layout(NHD_BLOCK_FIRST, "native:nhd-b16")
    gpu = await moved(native, blocks, "load", replace(DEFAULTS, direct_nbytes=64 << 10))
    assert not gpu.counts["launches"]
    assert gpu.counts["to_device_nbytes"] == PAYLOAD_NBYTES
    # A shuffled neighbour is one by chance; a copy is cut where two pieces of the slab meet.
    assert runs * 0.98 <= gpu.counts["copies_to_device"] <= runs + PAYLOAD_NBYTES // PIECE_NBYTES
    assert gpu.counts["batches"] == 8  # layer groups
