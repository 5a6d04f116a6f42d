"""What a prompt of 8,192 tokens of Llama-3-8B costs the link: counted, nothing is moved."""

from __future__ import annotations

from dataclasses import replace

import fake_cupy
import pytest
import torch
from gpu_engine import DeviceTensor
from gpu_scenarios import NoTorch
from gpu_sim import Gpu
from llama_8k import IN_ORDER, PAYLOAD_NBYTES, SHUFFLED, layout, lent

from kvlayer.layout import NHD_BLOCK_FIRST, KVLayout
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.pinned import PIECE_NBYTES
from kvlayer.staging.cuda.stager import DeviceStager

DEFAULTS = Calibration()
SLOTS_FILLED = PAYLOAD_NBYTES // DEFAULTS.slot_nbytes
BATCHES = 7  # of 32, 64, 128 and 256 MiB, and what is left
GROUPS = 10  # of one, two and four layers, and what is left


async def moved(
    layout: KVLayout, blocks: torch.Tensor, verb: str, thresholds: Calibration = DEFAULTS
) -> Gpu:
    """One store or load of the whole prompt, from or to these blocks."""
    gpu = Gpu("count")
    lending = lent(layout, blocks, DeviceTensor)
    with fake_cupy.install(gpu):
        stager = DeviceStager(
            layout, devices=Devices(lending.slab, thresholds), torch_stager=NoTorch()
        )
        assert await stager.ready()
        assert await stager.pinned() == lending.slab.nbytes
        if verb == "load by layers":
            heard: list[int] = []
            await stager.scatter_layers(
                lending.view, lending.copies, lambda _, layer: heard.append(layer)
            )
            assert heard == list(range(32))
        else:
            move = stager.gather if verb == "store" else stager.scatter
            await move(lending.view, lending.copies)
        await stager.aclose()
    lending.close()
    return gpu


@pytest.mark.asyncio
async def test_a_store_of_8192_tokens_sends_its_payload_once_in_a_copy_per_slot(figures) -> None:
    gpu = await moved(layout(), SHUFFLED, "store")
    counts = gpu.counts
    assert counts["to_host_nbytes"] == PAYLOAD_NBYTES
    assert counts["copies_to_host"] == SLOTS_FILLED == 64
    assert counts["launches"] == SLOTS_FILLED
    assert counts["copies_to_device"] == BATCHES  # a table each
    assert counts["to_device_nbytes"] == counts["table_nbytes"] <= PAYLOAD_NBYTES // 4000
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
    assert counts["copies_to_device"] == SLOTS_FILLED + BATCHES
    assert gpu.peak_pinned <= PAYLOAD_NBYTES + (4 << 20)
    figures("staging.load_8k", **counts, pinned=gpu.peak_pinned)


@pytest.mark.asyncio
async def test_a_load_that_somebody_follows_layer_by_layer_brings_it_in_shorter_runs(
    figures,
) -> None:
    gpu = await moved(layout(), SHUFFLED, "load by layers")
    counts = gpu.counts
    assert counts["to_device_nbytes"] - counts["table_nbytes"] == PAYLOAD_NBYTES
    assert counts["launches"] == SLOTS_FILLED
    # One run for all layers that a group has of each of 32 chunks, and a table for each group.
    assert counts["copies_to_device"] == GROUPS * 32 + GROUPS
    figures("staging.load_8k_by_layers", **counts, pinned=gpu.peak_pinned)


@pytest.mark.asyncio
async def test_with_batches_a_load_of_8192_tokens_by_layers_is_a_call_per_slot() -> None:
    thresholds = replace(DEFAULTS, batch_runs=4)
    counts = (await moved(layout(), SHUFFLED, "load by layers", thresholds)).counts
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
    assert gpu.counts["batches"] == BATCHES
