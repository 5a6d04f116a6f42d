"""A cache over an engine on a (simulated) CUDA device: stored, evicted, read back from a file."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import caches
import fake_cupy
import pytest
import torch
from engine import Engine, same
from gpu_engine import GpuEngine
from gpu_sim import Gpu

from kvlayer import Cache
from kvlayer.staging import torch_stager
from kvlayer.staging.copy_order import CopyOrder
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer.staging.host_cache import HostCache
from kvlayer.staging.torch_stager import TorchStager

pytestmark = pytest.mark.asyncio

TOKENS = caches.tokens(70, seed=3)
BLOCKS = 40


@asynccontextmanager
async def opened(directory: Path) -> AsyncGenerator[Cache]:
    config = caches.config(directory, host="2MiB", tokens_per_tail=4)
    async with Cache.open(config, caches.layout()) as cache:
        yield cache


def stager_of(cache: Cache) -> DeviceStager:
    found = cache.stack.device._stager
    assert isinstance(found, DeviceStager)
    return found


def engine_on(gpu: Gpu, seed: int) -> GpuEngine:
    return GpuEngine(gpu, Engine(caches.layout(), BLOCKS, seed))


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
async def test_what_a_device_stored_comes_back_from_a_file_bit_for_bit(
    mode: str, tmp_path: Path
) -> None:
    gpu = Gpu(mode, seed=11)
    with fake_cupy.install(gpu):
        writer, reader = engine_on(gpu, 1), engine_on(gpu, 2)
        slots, elsewhere = writer.engine.slots(70, seed=1), reader.engine.slots(70, seed=2)
        async with opened(tmp_path) as cache:
            await stager_of(cache).ready()
            values = writer.noise(4)
            writer.write(values)
            report = await cache.store(TOKENS, writer.view(slots))
            assert report.stored == 5 and not report.failed
            writer.write(writer.noise(5), "the blocks' next tenant")
            await cache.flush()
            await cache.control.clear(
                "cpu"
            )  # host memory is empty: what follows is read from a file
            async with cache.lookup(TOKENS) as hit:
                assert hit.by_tier == {"cpu": 0, "file": 68}
                report = await cache.retrieve(hit, reader.view(elsewhere))
            assert report.tokens == 68 and not report.failed
            assert gpu.counts["launches"] > 0
        gpu.drain()
        writer.write(values)
        gpu.drain()
        assert same(writer.engine.read(slots[:68]), reader.engine.read(elsewhere[:68]))
        assert gpu.held == {"stream": 2}, "the engines' streams; nothing of the cache's"


async def test_another_process_reads_what_a_device_stored(tmp_path: Path) -> None:
    gpu = Gpu("lazy")
    with fake_cupy.install(gpu):
        writer = engine_on(gpu, 1)
        slots = writer.engine.slots(len(TOKENS), seed=1)
        async with opened(tmp_path) as cache:
            await stager_of(cache).ready()
            await cache.store(TOKENS, writer.view(slots))
    plain = Engine(caches.layout(), BLOCKS, 9)
    elsewhere = plain.slots(len(TOKENS), seed=9)
    async with opened(tmp_path) as cache, cache.lookup(TOKENS) as hit:
        assert (await cache.retrieve(hit, plain.view(elsewhere))).tokens == 68
    assert same(writer.engine.read(slots[:68]), plain.read(elsewhere[:68]))


# -- without a device that can be used -------------------------------------------------------------


@pytest.fixture
def torch_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let torch copy the tensors that only say they are on a GPU; the devices it was asked for."""
    asked: list[Any] = []

    class OnCpu(CopyOrder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            asked.append(self._device)
            self._device = torch.device("cpu")

    monkeypatch.setattr(torch_stager, "CopyOrder", OnCpu)
    monkeypatch.setattr(TorchStager, "_open", lambda self, tensor: HostCache(tensor))
    return asked


WITHOUT = {
    "no cupy": ({}, "CuPy cannot be imported"),
    "no driver": ({"devices": 0}, "no CUDA driver or device"),
    "unsupported architecture": ({"arch": (7, 5)}, "is sm_75; the kernels need sm_80"),
    "kernels do not compile": ({"compiles": False}, "does not build for sm_90"),
}


@pytest.mark.parametrize("what", WITHOUT)
async def test_without_a_usable_device_torch_does_the_same_and_one_line_says_so(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    torch_without_a_gpu: list[Any],
) -> None:
    options, line = WITHOUT[what]
    options = dict(options)
    gpu = Gpu("eager", devices=1)
    writer, reader = engine_on(gpu, 1), engine_on(gpu, 2)
    slots, elsewhere = writer.engine.slots(len(TOKENS), seed=1), reader.engine.slots(70, seed=2)
    gpu.devices = options.pop("devices", 1)
    if what == "no cupy":
        monkeypatch.setitem(__import__("sys").modules, "cupy", None)
        await store_and_load(tmp_path, writer, slots, reader, elsewhere)
    else:
        with fake_cupy.install(gpu, **options):
            await store_and_load(tmp_path, writer, slots, reader, elsewhere)
    assert same(writer.engine.read(slots[:68]), reader.engine.read(elsewhere[:68]))
    assert torch_without_a_gpu, "torch was asked"
    assert not gpu.counts["launches"]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1 and line in said[0] and "copied by torch" in said[0]


async def store_and_load(
    directory: Path, writer: GpuEngine, slots: Any, reader: GpuEngine, elsewhere: Any
) -> None:
    async with opened(directory) as cache:
        assert (await cache.store(TOKENS, writer.view(slots))).stored == 5
        assert not await stager_of(cache).ready()
        await cache.control.clear("cpu")
        async with cache.lookup(TOKENS) as hit:
            assert (await cache.retrieve(hit, reader.view(elsewhere))).tokens == 68


async def test_a_device_that_fails_is_left_and_the_call_ends_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, torch_without_a_gpu: list[Any]
) -> None:
    gpu = Gpu("lazy")
    with fake_cupy.install(gpu):
        writer, reader = engine_on(gpu, 1), engine_on(gpu, 2)
        slots, elsewhere = writer.engine.slots(70, seed=1), reader.engine.slots(70, seed=2)
        async with opened(tmp_path) as cache:
            assert await stager_of(cache).ready()
            gpu.failing_launch = 1
            assert (await cache.store(TOKENS, writer.view(slots))).stored == 5
            async with cache.lookup(TOKENS) as hit:
                assert (await cache.retrieve(hit, reader.view(elsewhere))).tokens == 68
    assert gpu.counts["launches"] == 1, "it is not asked again"
    assert same(writer.engine.read(slots[:68]), reader.engine.read(elsewhere[:68]))
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1 and "cudaErrorLaunchFailure" in said[0]


async def test_until_the_kernels_are_built_torch_does_the_work(
    tmp_path: Path, torch_without_a_gpu: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu("eager")
    with fake_cupy.install(gpu):
        writer = engine_on(gpu, 1)
        slots = writer.engine.slots(70, seed=1)
        async with opened(tmp_path) as cache:
            assert (await cache.store(TOKENS, writer.view(slots))).stored == 5
            assert torch_without_a_gpu and not gpu.counts["launches"]
            assert await stager_of(cache).ready()
            await cache.control.clear("cpu")
            async with cache.lookup(TOKENS) as hit:
                assert (await cache.retrieve(hit, writer.view(slots))).tokens == 68
            assert gpu.counts["launches"]
    assert not caplog.records
