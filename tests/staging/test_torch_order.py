"""Where torch copies on a CUDA device: behind the engine, on a stream of its own, beside it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace

import fake_torch_cuda
import numpy as np
import pytest
from engine import Engine
from gpu_engine import GpuEngine
from gpu_scenarios import PAGED, oracle
from gpu_sim import Gpu

from kvlayer.abc.stager import HostCopy
from kvlayer.identity.keys import Part
from kvlayer.payload import Payload
from kvlayer.staging.torch_stager import TorchStager

pytestmark = pytest.mark.asyncio

BLOCKS, TOKENS, CHUNKS = 24, 16, 5
PAYLOAD = Payload.of(PAGED.groups[0].group, Part(0, (0, 4), (0, 2), "canonical"), TOKENS)


@asynccontextmanager
async def opened(gpu: Gpu) -> AsyncGenerator[tuple[GpuEngine, TorchStager]]:
    with fake_torch_cuda.install(gpu):
        engine, stager = GpuEngine(gpu, Engine(PAGED, BLOCKS)), TorchStager(PAGED, threads=1)
        try:
            yield engine, stager
        finally:
            await stager.aclose()


def copies_of() -> list[HostCopy]:
    n = PAYLOAD.nbytes
    memory = memoryview(bytearray(CHUNKS * n))
    return [
        HostCopy(PAYLOAD, memory[at * n : (at + 1) * n], at * TOKENS, TOKENS)
        for at in range(CHUNKS)
    ]


async def in_cache(engine: GpuEngine, slots: object) -> bytes:
    """What the engine's memory holds now, as payloads."""
    found = await oracle(engine.engine, slots, copies_of(), gather=True)
    return b"".join(np.asarray(each).tobytes() for each in found)


@pytest.mark.parametrize("has_event", [True, False], ids=["by an event", "by its stream"])
async def test_a_store_holds_what_the_engine_had_queued(has_event: bool) -> None:
    gpu = Gpu("lazy")
    async with opened(gpu) as (engine, stager):
        slots, copies = engine.engine.slots(CHUNKS * TOKENS), copies_of()
        engine.write(engine.noise(1))
        view = engine.view(slots)
        if has_event:
            view = replace(view, ready=engine.queued())
        await stager.gather(view, copies)
        assert b"".join(map(bytes, (copy.host for copy in copies))) == await in_cache(engine, slots)


@pytest.mark.parametrize("verb", ["gather", "scatter"])
async def test_what_the_engine_queues_after_its_event_holds_no_copy_up(verb: str) -> None:
    """On the engine's own stream a copy would wait for something endless."""
    gpu = Gpu("lazy")
    async with opened(gpu) as (engine, stager):
        slots, copies = engine.engine.slots(CHUNKS * TOKENS), copies_of()
        engine.write(engine.noise(1))
        view = replace(engine.view(slots), ready=engine.queued())
        release = gpu.hold(engine.stream)
        await getattr(stager, verb)(view, copies)
        assert b"".join(map(bytes, (copy.host for copy in copies))) == await in_cache(engine, slots)
        release()
        gpu.drain()
    assert not gpu.faults


async def test_without_an_event_a_load_follows_what_was_queued_when_it_began() -> None:
    """Each layer goes by itself; what the engine queues after the first holds up none."""
    gpu = Gpu("lazy")
    async with opened(gpu) as (engine, stager):
        slots, copies = engine.engine.slots(CHUNKS * TOKENS), copies_of()
        engine.write(engine.noise(1), "zeroes")
        landed: list[int] = []

        def tell(_group: int, local: int) -> None:
            if not landed:
                gpu.hold(engine.stream)
            landed.append(local)

        await stager.scatter_layers(engine.view(slots), copies, tell)
        assert landed == [0, 1, 2, 3]


async def test_all_calls_share_one_stream_that_is_not_the_engines() -> None:
    gpu = Gpu("race")
    with fake_torch_cuda.install(gpu) as made:
        engine, stager = GpuEngine(gpu, Engine(PAGED, BLOCKS)), TorchStager(PAGED)
        slots = engine.engine.slots(CHUNKS * TOKENS)
        for seed in range(3):
            engine.write(engine.noise(seed))
            view = replace(engine.view(slots), ready=engine.queued())
            await stager.gather(view, copies_of())
        await stager.aclose()
    assert len(made) == 1 and made[0].cuda_stream != engine.stream
    assert gpu.races is not None and not gpu.races.found


@pytest.mark.parametrize("verb", ["gather", "scatter"])
async def test_a_call_whose_event_comes_before_the_engines_work_races_with_it(verb: str) -> None:
    gpu = Gpu("race")
    async with opened(gpu) as (engine, stager):
        view = engine.view(engine.engine.slots(CHUNKS * TOKENS))
        view = replace(view, ready=engine.queued())
        engine.write(engine.noise(1))
        await getattr(stager, verb)(view, copies_of())
    assert gpu.races is not None
    assert any("the model" in str(race) for race in gpu.races.found), "a control: nothing orders"
