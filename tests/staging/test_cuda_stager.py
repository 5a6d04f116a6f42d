"""What a CUDA stager moves, over random layouts, and what it leaves behind."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from threading import Event as Gate
from typing import Any

import fake_cupy
import numpy as np
import pytest
from engine import Engine
from fake_cupy import Calls
from gpu_engine import GpuEngine
from gpu_layouts import random_copies, random_layout
from gpu_scenarios import (
    PAGED,
    SMALL,
    WHOLE,
    NoTorch,
    check_load,
    check_store,
    oracle,
    stage,
    twin,
)
from gpu_sim import Gpu, bytes_at
from hang import HANG

from kvlayer.abc.stager import HostCopy
from kvlayer.errors import LayoutError, UnsupportedError
from kvlayer.identity.keys import Part
from kvlayer.layout import KVLayout
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.staging.cuda import devices as devices_module
from kvlayer.staging.cuda import stager as stager_module
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.pipeline import Pipeline
from kvlayer.staging.cuda.runs import Runs
from kvlayer.staging.cuda.stager import DeviceStager

BLOCKS = 24


def ends_of(rng: random.Random, layout: KVLayout, copies: list[HostCopy]) -> list[HostCopy]:
    """What a load takes: all of a payload, or its end."""
    found: list[HostCopy] = []
    for copy in copies:
        held = layout.groups[copy.part.group]
        step = held.tokens_per_block if held.form != "canonical" else 1
        skip = rng.choice([0, 0, step * rng.randrange(copy.tokens // step)])
        found.append(
            HostCopy(copy.payload, copy.host, copy.first + skip, copy.tokens - skip, skip=skip)
        )
    return found


@pytest.mark.asyncio
@pytest.mark.parametrize("part", range(10))
async def test_over_random_layouts_a_device_moves_what_torch_moves(part: int, dose) -> None:
    for seed in range(part, dose(80, 4000), 10):
        rng = random.Random(seed)
        layout = random_layout(rng)
        thresholds = Calibration(
            slot_nbytes=rng.choice([4096, 16384]),
            slots=rng.choice([2, 3]),
            group_slots=rng.choice([1, 8]),
            direct_nbytes=rng.choice([1, 200, 1 << 20]),
            batch_runs=rng.choice([1, 4, 1000]),
            gap_nbytes=rng.choice([0, 100]),
        )
        gpu = Gpu(rng.choice(["lazy", "random"]), seed)
        async with stage(gpu, Calls(), layout, thresholds=thresholds) as on:
            tokens = 8 * rng.randint(2, 6)
            slots = on.engine.engine.slots(tokens, seed=seed)
            copies = random_copies(rng, layout, on.slab, tokens)
            view = on.engine.view(slots)
            await on.stager.gather(view, copies)
            stored = on.host(copies)
            wanted = await oracle(twin(on, on.engine.bits())[0], slots, copies, gather=True)
            on.expect("stored", stored, wanted)
            if rng.random() < 0.5 and all(g.form == "canonical" for g in layout.groups):
                for hole in rng.sample(range(tokens), tokens // 4):
                    slots[hole] = -1
            elsewhere = slots.roll(layout.groups[0].tokens_per_block)
            loads = ends_of(rng, layout, copies)
            engine, values = twin(on, on.engine.bits())
            await oracle(engine, elsewhere, loads, gather=False)
            await on.stager.scatter(on.engine.view(elsewhere), loads)
            on.expect("loaded", on.engine.bits(), values)
        assert on.faults == [], f"seed {seed}: {layout}"


@pytest.mark.asyncio
async def test_a_cancelled_call_starts_nothing_more_and_leaves_nothing_in_flight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stager_module, "_BATCH_NBYTES", 4096)  # a batch is one payload
    monkeypatch.setattr(stager_module, "_FIRST_NBYTES", 4096)
    gpu, gate = Gpu("lazy"), Gate()

    class Waiting:
        n_waiting = 0

        def wait(self, timeout: float) -> None:
            self.n_waiting += 1
            assert gate.wait(HANG)

    async with stage(gpu, Calls(), PAGED) as on:
        slots, copies = on.engine.engine.slots(80), on.copies(5)
        waiting: Any = Waiting()
        gpu.meeting = waiting
        call = asyncio.ensure_future(on.stager.gather(on.engine.view(slots), copies))
        while not waiting.n_waiting:  # noqa: ASYNC110  # its thread has no loop
            await asyncio.sleep(0)
        call.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not call.done(), "the device still writes to what was lent"
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert gpu.counts["launches"] == 2, "the batch under way, and the one queued behind it"
        on.host(copies, write=7)
        gpu.drain()
        on.expect("of host memory", on.host(copies), [np.full(4096, 7, np.uint8)] * 5)
    assert not on.faults


@pytest.mark.asyncio
async def test_a_driver_that_has_no_batches_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, asked = Gpu("lazy"), list[Runs]()

    def refused(runs: Runs, stream: int) -> None:
        asked.append(runs)
        raise UnsupportedError("cudaMemcpyBatchAsync failed: cudaErrorCallRequiresNewerDriver")

    monkeypatch.setattr(devices_module, "find_batch_copy", lambda: refused)
    async with stage(gpu, Calls(), PAGED, thresholds=replace(SMALL, batch_runs=1)) as on:
        await check_store(on, on.engine.engine.slots(80), on.copies(5), 3)
        await check_load(on, on.engine.engine.slots(80), on.copies(5), 4)
    assert len(asked) == 1 and not on.faults
    assert len(caplog.records) == 1 and "one by one" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["gather", "scatter"])
async def test_what_the_engine_queues_after_a_call_began_holds_up_none_of_its_batches(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stager_module, "_BATCH_NBYTES", 4096)
    monkeypatch.setattr(stager_module, "_FIRST_NBYTES", 4096)
    gpu, releases = Gpu("lazy"), []
    queue = getattr(Pipeline, f"_queue_{verb}")

    def then_held(pipeline: Pipeline, *args: Any) -> None:
        queue(pipeline, *args)
        gpu.device = 0
        releases.append(gpu.hold(on.engine.stream))

    monkeypatch.setattr(Pipeline, f"_queue_{verb}", then_held)
    async with stage(gpu, Calls(), PAGED, thresholds=replace(SMALL, group_slots=1)) as on:
        slots, copies = on.engine.engine.slots(80), on.copies(5)
        on.engine.write(on.engine.noise(1))
        await getattr(on.stager, verb)(on.engine.view(slots), copies)
        assert len(releases) > 2, "batches"
        for release in releases:
            release()
    assert not on.faults


@pytest.mark.asyncio
@pytest.mark.parametrize("layout", [PAGED, WHOLE], ids=["ring", "straight"])
async def test_a_call_with_an_event_follows_that_and_nothing_the_engine_has_queued_since(
    layout: KVLayout,
) -> None:
    gpu = Gpu("lazy")
    async with stage(gpu, Calls(), layout) as on:
        slots, copies, values = on.engine.engine.slots(80), on.copies(5), on.engine.noise(1)
        on.engine.write(values)
        view = replace(on.engine.view(slots), ready=on.engine.queued())
        release = gpu.hold(on.engine.stream)
        await on.stager.gather(view, copies)
        wanted = await oracle(twin(on, values)[0], slots, copies, gather=True)
        on.expect("of a store", on.host(copies), wanted)
        release()
        on.engine.write(on.engine.noise(2), "zeroes for the next tenant")
        view = replace(on.engine.view(slots), ready=on.engine.queued())
        release = gpu.hold(on.engine.stream)
        await on.stager.scatter(view, copies)
        release()
        gpu.drain()
        found = await oracle(twin(on, on.engine.bits())[0], slots, copies, gather=True)
        on.expect("of a load", found, wanted)
    assert not on.faults


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["gather", "scatter"])
async def test_a_call_whose_event_comes_before_the_engines_work_races_with_it(verb: str) -> None:
    gpu = Gpu("race")
    async with stage(gpu, Calls(), PAGED) as on:
        slots, copies = on.engine.engine.slots(80), on.copies(5)
        view = replace(on.engine.view(slots), ready=on.engine.queued())
        on.engine.write(on.engine.noise(1))
        await getattr(on.stager, verb)(view, copies)
    assert any("the model" in fault for fault in on.faults), "a control: no order was there"


@pytest.mark.asyncio
async def test_what_is_wrong_with_a_call_is_said_before_anything_moves() -> None:
    gpu = Gpu("eager")
    async with stage(gpu, Calls(), PAGED) as on:
        slots, copies = on.engine.engine.slots(80), on.copies(5)
        slots[70] = -1
        with pytest.raises(LayoutError, match="have no slot"):
            await on.stager.gather(on.engine.view(slots), copies)
        slots[70] = 10_000
        with pytest.raises(LayoutError, match="outside"):
            await on.stager.scatter(on.engine.view(slots), copies)
        assert not gpu.counts["copies"]


@pytest.mark.asyncio
async def test_calls_of_nothing_need_no_device() -> None:
    gpu = Gpu("eager")
    async with stage(gpu, Calls(), PAGED) as on:
        slots = on.engine.engine.slots(80)
        await on.stager.gather(on.engine.view(slots), [])
        await on.stager.scatter(on.engine.view(slots), [])
        slots[:] = -1
        await on.stager.scatter(on.engine.view(slots), on.copies(5))
        assert not gpu.counts["launches"]
    assert not on.faults


@pytest.mark.asyncio
async def test_an_engine_on_the_default_stream_is_waited_for() -> None:
    gpu = Gpu("race")
    async with stage(gpu, Calls(), PAGED) as on:
        on.engine.stream = 0
        await check_store(on, on.engine.engine.slots(80), on.copies(5), 3)
    assert not on.faults


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["lazy", "race"])
async def test_two_devices_share_one_stager_and_one_pinned_slab(mode: str) -> None:
    gpu = Gpu(mode, devices=2)
    slab = Slab(1 << 20)
    gpu.watch(np.frombuffer(slab.view(0, slab.nbytes), np.uint8).ctypes.data, slab.nbytes)
    with fake_cupy.install(gpu):
        stager = DeviceStager(PAGED, devices=Devices(slab, SMALL), torch_stager=NoTorch())
        assert await stager.ready(0) and await stager.ready(1)
        await stager.pinned()
        payload = Payload.of(PAGED.groups[0].group, Part(0, (0, 4), (0, 2)), 16)
        engines = [GpuEngine(gpu, Engine(PAGED, BLOCKS, n), number=n) for n in range(2)]
        lent, works, slots = [], [], engines[0].engine.slots(80)
        for number, engine in enumerate(engines):
            engine.write(engine.noise(number))
            copies = [
                HostCopy(
                    payload,
                    slab.view((number * 5 + i) * payload.nbytes, payload.nbytes),
                    i * 16,
                    16,
                )
                for i in range(5)
            ]
            lent.append(copies)
            works.append(stager.gather(engine.view(slots), copies))
        await asyncio.gather(*works)
        for engine, copies in zip(engines, lent, strict=True):
            found = [bytes(copy.host) for copy in copies]
            for copy, held in zip(copies, found, strict=True):
                (wanted,) = await oracle(engine.engine, slots, [copy], gather=True)
                assert held == wanted.tobytes()
        await stager.aclose()
    assert not gpu.faults and (gpu.races is None or not gpu.races.found)
    assert gpu.held == {"stream": 2}, "each engine's own"


@pytest.mark.asyncio
async def test_closing_twice_is_closing_once_and_everything_is_given_back() -> None:
    gpu = Gpu("eager")
    async with stage(gpu, Calls(), PAGED) as on:
        await check_store(on, on.engine.engine.slots(80), on.copies(5), 3)
        assert gpu.held["registered"] and gpu.held["event"] and gpu.held["device"]
        await on.stager.aclose()
        assert gpu.held == {"stream": 1}


@pytest.mark.asyncio
@pytest.mark.parametrize("turns", range(5))
async def test_closing_that_is_cancelled_has_closed_when_it_raises(turns: int) -> None:
    gpu = Gpu("eager")
    async with stage(gpu, Calls(), PAGED) as on:
        closing = asyncio.ensure_future(on.stager.aclose())
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        assert not closing.done()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert gpu.held == {"stream": 1}, "the slab is not pinned when it is unmapped"


@pytest.mark.asyncio
async def test_memory_that_cannot_be_pinned_is_copied_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gpu = Gpu("lazy")
    gpu.pinnable = 40_000
    slab = Slab(1 << 20)
    with fake_cupy.install(gpu):
        stager = DeviceStager(
            PAGED,
            devices=Devices(slab, SMALL, piece_nbytes=10 << 10),
            torch_stager=NoTorch(),
        )
        assert await stager.ready()
        assert 0 < await stager.pinned() < slab.nbytes
        gpu.pinnable = None
        engine = GpuEngine(gpu, Engine(PAGED, BLOCKS))
        payload = Payload.of(PAGED.groups[0].group, Part(0, (0, 4), (0, 2)), 16)
        slots = engine.engine.slots(80)
        copies = [
            HostCopy(payload, slab.view(i * 3 * payload.nbytes, payload.nbytes), i * 16, 16)
            for i in range(5)
        ]
        await stager.gather(engine.view(slots), copies)
        for copy in copies:
            (wanted,) = await oracle(engine.engine, slots, [copy], gather=True)
            assert bytes(copy.host) == wanted.tobytes()
        before = engine.bits()
        await stager.scatter(engine.view(slots), copies)
        for (start, nbytes), value in zip(engine.storages(), before, strict=True):
            assert np.array_equal(bytes_at(start, nbytes), value)
        await stager.aclose()
    assert gpu.counts["pageable_copies"] > 0 and not gpu.faults
    assert len(caplog.records) == 1 and "cannot be pinned" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
@pytest.mark.parametrize("layout", [PAGED, WHOLE], ids=["ring", "straight"])
async def test_a_layer_has_landed_when_it_holds_everything_and_in_the_models_order(
    mode: str, layout: KVLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stager_module, "_BATCH_NBYTES", 4096)  # several batches, whoever waits
    monkeypatch.setattr(stager_module, "_FIRST_NBYTES", 4096)
    async with stage(Gpu(mode, seed=5), Calls(), layout, threads=2) as on:
        slots, copies = on.engine.engine.slots(80), on.copies(5)
        rng = np.random.default_rng(1)
        for copy in copies:
            np.frombuffer(copy.host, np.uint8)[:] = rng.integers(0, 256, copy.host.nbytes, np.uint8)
        on.host(copies)
        engine, wanted = twin(on, on.engine.bits())
        await oracle(engine, slots, copies, gather=False)
        seen: list[tuple[int, int]] = []

        def landed(group: int, local: int) -> None:
            seen.append((group, local))
            found = on.engine.by_layer(on.engine.bits())[local]
            on.expect(f"of layer {local}", [found], [on.engine.by_layer(wanted)[local]])

        await on.stager.scatter_layers(on.engine.view(slots), copies, landed)
        assert seen == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert not on.faults


@pytest.mark.asyncio
async def test_a_callback_that_fails_leaves_nothing_in_flight() -> None:
    gpu = Gpu("lazy")

    def loaded(_: object) -> None:
        raise ValueError("the engine's own")

    async with stage(gpu, Calls(), PAGED) as on:
        slots, copies = on.engine.engine.slots(80), on.copies(5)
        with pytest.raises(ValueError, match="the engine's own"):
            await on.stager.scatter(on.engine.view(slots, loaded), copies)
        before = on.engine.bits()
        gpu.drain()
        on.expect("of the cache", on.engine.bits(), before)
    assert not on.faults
