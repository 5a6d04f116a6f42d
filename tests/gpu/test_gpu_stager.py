"""Stores and loads on the device: the bytes, the speed, and what it costs an engine at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from kvlayer.abc.stager import HostCopy
from kvlayer.bench.gpu import gpu_rows
from kvlayer.bench.host import LLAMA
from kvlayer.bench.report import table
from kvlayer.identity.keys import Part
from kvlayer.layout import HND, NHD, KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer.staging.sample import paged_view
from kvlayer.staging.torch_stager import TorchStager

CHUNK, BLOCK = 256, 16


def payloads(layout: KVLayout, slab: Slab, chunks: int) -> list[HostCopy]:
    form = layout.groups[0].form
    payload = Payload.of(LLAMA, Part(0, (0, 32), (0, 8), form), CHUNK)
    return [
        HostCopy(payload, slab.view(at * payload.nbytes, payload.nbytes), at * CHUNK, CHUNK)
        for at in range(chunks)
    ]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("axes", "form"), [(NHD, "canonical"), (HND, "canonical"), (NHD, "native:nhd-b16")]
)
async def test_a_device_moves_what_torch_moves(axes: Any, form: str, device: int) -> None:
    layout = KVLayout.single(LLAMA, axes, tokens_per_block=BLOCK, form=form)
    slab, plain = Slab(4 << 25), Slab(4 << 25)
    stager, oracle = DeviceStager(layout, slab=slab), TorchStager(layout)
    try:
        assert await stager.ready(device), "the log says why not"
        view = paged_view(layout, 4 * CHUNK // BLOCK, seed=2, device=f"cuda:{device}")
        copies, wanted = payloads(layout, slab, 4), payloads(layout, plain, 4)
        await stager.gather(view, copies)
        await oracle.gather(view, wanted)
        for copy, want in zip(copies, wanted, strict=True):
            assert bytes(copy.host) == bytes(want.host)
        before = [cache.clone() for cache in view.caches[0]]
        for cache in view.caches[0]:
            cache.zero_()
        torch.cuda.synchronize()
        await stager.scatter(view, copies)
        for cache, held in zip(view.caches[0], before, strict=True):
            assert torch.equal(cache.view(torch.int16), held.view(torch.int16))
    finally:
        await stager.aclose()
        await oracle.aclose()


@pytest.mark.asyncio
async def test_figures_stand_beside_a_bare_copy(
    device: int, figures: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = await gpu_rows(device, 1 << 30, 7)
    with capsys.disabled():
        print(f"\n{found.kind}: {found.calibration}")  # noqa: T201  # the table
        print("\n".join(table(found.rows)))  # noqa: T201  # the table
    for row in found.rows:
        figures(row.name, value=row.value, ceiling=row.ceiling or 0.0, ratio=row.ratio or 0.0)


@pytest.mark.asyncio
async def test_an_engine_that_multiplies_matrices_is_hardly_disturbed(
    device: int, figures: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reported, not judged: the model of docs/gpu.md says what would falsify it."""
    layout = KVLayout.single(LLAMA, NHD, tokens_per_block=BLOCK)
    slab = Slab(32 << 25)
    stager = DeviceStager(layout, slab=slab)
    try:
        assert await stager.ready(device)
        await stager.pinned()
        lent = paged_view(layout, 32 * CHUNK // BLOCK, seed=3, device=f"cuda:{device}")
        stream = torch.cuda.Stream()
        view = KVView(lent.caches, lent.slots)
        torch.cuda.synchronize()
        copies = payloads(layout, slab, 32)
        alone = median([engine(stream) for _ in range(9)][4:])  # the first ones find it asleep
        for verb, call in (("store", stager.gather), ("load", stager.scatter)):
            moving, slowed = await beside(stream, call, view, copies)
            idle = time.perf_counter()
            await call(view, copies)
            idle = time.perf_counter() - idle
            row = {"matmul_slowdown": slowed / alone, "copy_slowdown": moving / idle}
            figures(f"gpu.overlap.{verb}", **row)
            with capsys.disabled():
                print(f"gpu.overlap.{verb}: {row}")  # noqa: T201  # the table
    finally:
        await stager.aclose()


def engine(stream: torch.cuda.Stream) -> float:
    """Seconds of some 50 ms of matrix products on a stream of their own."""
    with torch.cuda.stream(stream):
        left = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        for _ in range(30):
            left @ left
        end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


async def beside(
    stream: torch.cuda.Stream, call: Callable[..., Any], view: KVView, copies: list[HostCopy]
) -> tuple[float, float]:
    """Seconds of a move, and of the products, while both run."""
    products = asyncio.get_running_loop().run_in_executor(None, engine, stream)
    started = time.perf_counter()
    await call(view, copies)
    return time.perf_counter() - started, await products
