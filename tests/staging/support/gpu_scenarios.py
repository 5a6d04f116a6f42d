"""Stores and loads on a simulated GPU, each with everything around it that an engine would do.

A scenario runs once, in the order its ``Gpu`` says, and returns what was wrong: bytes, races,
errors. Whatever the order, the list is empty.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from threading import Barrier
from typing import Any

import fake_cupy
import numpy as np
from engine import Engine
from fake_cupy import Calls, Mutant
from gpu_engine import GpuEngine
from gpu_sim import FakeCudaError, Gpu, bytes_at

from kvlayer.abc.stager import HostCopy, Stager
from kvlayer.identity.keys import Part
from kvlayer.layout import (
    HND,
    NHD,
    NHD_BLOCK_FIRST,
    AttentionKind,
    GroupLayout,
    KVGroup,
    KVLayout,
    KVView,
    LoadedLayers,
)
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer.staging.torch_stager import TorchStager

__all__ = ["SCENARIOS", "Scenario", "run"]

Scenario = Callable[[Gpu, Calls], Awaitable[list[str]]]

BLOCKS, TOKENS_PER_BLOCK, TOKENS = 24, 4, 16
GROUP = KVGroup(AttentionKind.MHA, (0, 1, 2, 3), "bfloat16", 2, 8)
PAGED = KVLayout.single(GROUP, NHD, tokens_per_block=TOKENS_PER_BLOCK)
WHOLE = KVLayout.single(
    GROUP, NHD_BLOCK_FIRST, tokens_per_block=TOKENS_PER_BLOCK, form="native:test"
)
SMALL = Calibration(
    slot_nbytes=4096, slots=2, group_slots=2, direct_nbytes=256, batch_runs=3, gap_nbytes=64
)


class FellBackError(AssertionError):
    """Torch was asked to do what the device should have done."""


class NoTorch(Stager):
    """In place of the fallback, which would hide a failure."""

    def check(self, view: KVView) -> None:
        raise NotImplementedError

    async def gather(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        raise FellBackError("gather fell back to torch")

    async def scatter(self, view: KVView, copies: Sequence[HostCopy]) -> None:
        raise FellBackError("scatter fell back to torch")


@dataclass
class Stage:
    """A GPU, an engine on it, host memory, and the stager between them."""

    gpu: Gpu
    calls: Calls
    engine: GpuEngine
    slab: Slab
    stager: DeviceStager
    faults: list[str] = field(default_factory=list)
    lent: int = 0

    def copies(self, count: int, *, tokens: int = TOKENS, group: int = 0) -> list[HostCopy]:
        """Payloads one after the other in the slab, for the view's tokens from 0 on."""
        held = self.engine.engine.layout.groups[group]
        part = Part(group, held.layer_range, held.head_range, held.form)
        payload = Payload.of(held.group, part, tokens)
        start, self.lent = self.lent, self.lent + count * payload.nbytes
        return [
            HostCopy(
                payload,
                self.slab.view(start + at * payload.nbytes, payload.nbytes),
                at * tokens,
                tokens,
            )
            for at in range(count)
        ]

    def expect(self, what: str, found: Any, wanted: Any) -> None:
        if not all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True)):
            self.faults.append(f"wrong bytes: {what}")

    def host(self, copies: Sequence[HostCopy], *, write: int | None = None) -> list[Any]:
        """The payloads' layers as they are now; the host reads them, or overwrites them."""
        found: list[Any] = []
        for copy in copies:
            for segment in copy.payload.segments():
                memory = np.frombuffer(copy.host, np.uint8)[segment.offset :][: segment.nbytes]
                self.gpu.host_access(memory.ctypes.data, segment.nbytes, is_write=write is not None)
                if write is not None:
                    memory[:] = write
                found.append(memory.copy())
        return found


@asynccontextmanager
async def stage(
    gpu: Gpu,
    calls: Calls,
    layout: KVLayout,
    *,
    threads: int = 1,
    thresholds: Calibration = SMALL,
    slab_nbytes: int = 1 << 20,
) -> AsyncGenerator[Stage]:
    """Everything ready: kernels built, the slab pinned."""
    with fake_cupy.install(gpu, calls=calls):
        slab = Slab(slab_nbytes)
        gpu.watch(np.frombuffer(slab.view(0, slab.nbytes), np.uint8).ctypes.data, slab.nbytes)
        stager = DeviceStager(
            layout,
            threads=threads,
            devices=Devices(slab, thresholds, piece_nbytes=10 << 10),
            torch_stager=NoTorch(),
        )
        assert await stager.ready()
        assert await stager.pinned() == slab.nbytes
        found = Stage(gpu, calls, GpuEngine(gpu, Engine(layout, BLOCKS)), slab, stager)
        try:
            yield found
        finally:
            await stager.aclose()
            with suppress(FakeCudaError):  # which is among the faults
                gpu.drain()
            found.faults += gpu.faults
            if gpu.races is not None:
                found.faults += [f"race: {race}" for race in gpu.races.found]


async def oracle(
    engine: Engine, slots: Any, copies: Sequence[HostCopy], *, gather: bool
) -> list[Any]:
    """What torch makes of it: of the payloads, or of the engine's memory (which it changes)."""
    stager = TorchStager(engine.layout, threads=1)
    try:
        if not gather:
            await stager.scatter(engine.view(slots), copies)
            return []
        found: list[Any] = []
        for copy in copies:
            memory = bytearray(copy.payload.nbytes)
            lent = HostCopy(copy.payload, memoryview(memory), copy.first, copy.tokens)
            await stager.gather(engine.view(slots), [lent])
            whole = np.frombuffer(memory, np.uint8)
            found += [whole[s.offset :][: s.nbytes] for s in copy.payload.segments()]
        return found
    finally:
        await stager.aclose()


def twin(stage: Stage, values: Sequence[Any]) -> tuple[Engine, list[Any]]:
    """An engine like the stage's in ordinary memory, with these values; and its storages."""
    engine = Engine(stage.engine.engine.layout, BLOCKS)
    other = GpuEngine(Gpu(), engine)  # the views are of its memory: keep it
    for (start, nbytes), value in zip(other.storages(), values, strict=True):
        bytes_at(start, nbytes)[:] = value
    return engine, [bytes_at(start, nbytes) for start, nbytes in other.storages()]


async def check_store(on: Stage, slots: Any, copies: Sequence[HostCopy], seed: int) -> None:
    """The model has just written what is stored, and goes on writing afterwards."""
    values = on.engine.noise(seed)
    on.engine.write(values)
    await on.stager.gather(on.engine.view(slots), copies)
    found = on.host(copies)
    on.engine.write(on.engine.noise(seed + 1), "the next tokens")
    on.gpu.drain()
    wanted = await oracle(twin(on, values)[0], slots, copies, gather=True)
    on.expect("when the store returned", found, wanted)
    on.expect("after the model went on", on.host(copies), wanted)


async def check_load(
    on: Stage,
    slots: Any,
    copies: Sequence[HostCopy],
    seed: int,
    loaded: Callable[[LoadedLayers], None] | None = None,
) -> list[Any]:
    """The model may still be at work on the blocks, and host memory is used again afterwards."""
    rng = np.random.default_rng(seed)
    for copy in copies:
        np.frombuffer(copy.host, np.uint8)[:] = rng.integers(0, 256, copy.host.nbytes, np.uint8)
    on.host(copies, write=None)
    values = on.engine.noise(seed + 1)
    engine, wanted = twin(on, values)
    await oracle(engine, slots, copies, gather=False)
    on.engine.write(values, "the blocks' last tenant")
    await on.stager.scatter(on.engine.view(slots, loaded), copies)
    found = on.engine.bits()
    for start, nbytes in on.engine.storages():
        on.gpu.host_access(start, nbytes, is_write=False)
    on.host(copies, write=0)
    on.gpu.drain()
    on.expect("when the load returned", found, wanted)
    on.expect("after the load returned", on.engine.bits(), wanted)
    return [value.copy() for value in wanted]


async def queued(gpu: Gpu, call: asyncio.Future[None]) -> None:
    """Return once a call's thread has queued its work and waits for it, or it has failed."""
    # Its thread has no loop on which to set an event.
    while (meeting := gpu.meeting) and not meeting.n_waiting and not call.done():  # noqa: ASYNC110
        await asyncio.sleep(0)


# -- scenarios -------------------------------------------------------------------------------------


async def store(gpu: Gpu, calls: Calls) -> list[str]:
    async with stage(gpu, calls, PAGED) as on:
        await check_store(on, on.engine.engine.slots(80), on.copies(5), 1)
    return on.faults


async def load(gpu: Gpu, calls: Calls) -> list[str]:
    async with stage(gpu, calls, PAGED) as on:
        await check_load(on, on.engine.engine.slots(80), on.copies(5), 2)
    return on.faults


async def load_some(gpu: Gpu, calls: Calls) -> list[str]:
    """Holes, ends of payloads, blocks that are not whole."""
    async with stage(gpu, calls, PAGED) as on:
        slots = on.engine.engine.slots(80)
        slots[[3, 17, 40]] = -1
        whole = on.copies(4)
        copies = [HostCopy(c.payload, c.host, c.first + 6, 10, skip=6) for c in whole]
        await check_load(on, slots, copies, 3)
    return on.faults


async def load_straight(gpu: Gpu, calls: Calls) -> list[str]:
    async with stage(gpu, calls, WHOLE) as on:
        await check_load(on, on.engine.engine.slots(80), on.copies(5), 4)
    assert not gpu.counts["launches"], "whole blocks go straight into the cache"
    return on.faults


def by_layers(layout: KVLayout, groups: list[tuple[int, int]]) -> Scenario:
    async def scenario(gpu: Gpu, calls: Calls) -> list[str]:
        """Attention over each layer waits for that layer's event, and for nothing else."""
        async with stage(gpu, calls, layout) as on:
            seen: list[tuple[int, int]] = []
            read: dict[int, list[Any]] = {}

            def loaded(layers: LoadedLayers) -> None:
                with gpu.lock:
                    gpu.wait(on.engine.stream, layers.event)
                    seen.append(layers.layers)
                    for layer in range(*layers.layers):
                        on.engine.read(layer, read.setdefault(layer, []))

            wanted = await check_load(on, on.engine.engine.slots(80), on.copies(5), 5, loaded)
            on.expect("of attention", [read[i][0] for i in range(4)], on.engine.by_layer(wanted))
            if seen != groups:
                on.faults.append(f"layers came as {seen}")
        return on.faults

    return scenario


async def two_at_once(gpu: Gpu, calls: Calls) -> list[str]:
    """A load is queued while a store is under way: they share the ring and one stream."""
    async with stage(gpu, calls, PAGED, threads=2) as on:
        slots = on.engine.engine.slots(BLOCKS * TOKENS_PER_BLOCK)
        out, back = on.copies(3), on.copies(3)
        there = [HostCopy(c.payload, c.host, c.first + 48, c.tokens) for c in back]
        rng = np.random.default_rng(6)
        for copy in there:
            np.frombuffer(copy.host, np.uint8)[:] = rng.integers(0, 256, copy.host.nbytes, np.uint8)
        on.host(there)
        values = on.engine.noise(7)
        on.engine.write(values)
        engine, wanted = twin(on, values)
        stored = await oracle(engine, slots, out, gather=True)
        await oracle(engine, slots, there, gather=False)
        gpu.meeting = Barrier(2)
        view = on.engine.view(slots)
        first = asyncio.ensure_future(on.stager.gather(view, out))
        await queued(gpu, first)
        await asyncio.gather(first, on.stager.scatter(view, there))
        on.expect("what was stored", on.host(out), stored)
        on.expect("what was loaded", on.engine.bits(), wanted)
    return on.faults


async def growing(gpu: Gpu, calls: Calls) -> list[str]:
    """A layer that is larger than a slot comes while the slots are in use."""
    async with stage(gpu, calls, PAGED, threads=2) as on:
        slots = on.engine.engine.slots(BLOCKS * TOKENS_PER_BLOCK)
        small, large = on.copies(2), on.copies(1, tokens=80)
        values = on.engine.noise(8)
        on.engine.write(values)
        engine, _ = twin(on, values)
        gpu.meeting = Barrier(2)
        view = on.engine.view(slots)
        first = asyncio.ensure_future(on.stager.gather(view, small))
        await queued(gpu, first)
        await asyncio.gather(first, on.stager.gather(view, large))
        for copies in (small, large):
            wanted = await oracle(engine, slots, copies, gather=True)
            on.expect("what was stored", on.host(copies), wanted)
    return on.faults


OTHER = KVGroup(AttentionKind.MHA, (4, 5), "bfloat16", 2, 8)
STRAIGHT = GroupLayout(OTHER, NHD_BLOCK_FIRST, TOKENS_PER_BLOCK, form="native:test")
MIXED = KVLayout((GroupLayout(GROUP, HND, TOKENS_PER_BLOCK), STRAIGHT))


async def load_mixed(gpu: Gpu, calls: Calls) -> list[str]:
    """One KV group goes through the ring, the other straight into the cache."""
    async with stage(gpu, calls, MIXED) as on:
        copies = [*on.copies(5), *on.copies(5, group=1)]
        await check_load(on, on.engine.engine.slots(80), copies, 9)
    return on.faults


def failing(verb: str, layout: KVLayout, *, launch: int = 0, copy: int = 0) -> Scenario:
    async def scenario(gpu: Gpu, calls: Calls) -> list[str]:
        """CUDA refuses halfway: when the call raises, nothing touches anything any more."""
        # Copies of a batch that is refused would be made one by one.
        async with stage(gpu, calls, layout, thresholds=replace(SMALL, batch_runs=1000)) as on:
            slots, copies = on.engine.engine.slots(80), on.copies(5)
            on.engine.write(on.engine.noise(10))
            gpu.failing_launch, gpu.failing_copy = launch, copy
            with suppress(FellBackError):
                await getattr(on.stager, verb)(on.engine.view(slots), copies)
                on.faults.append("nothing failed")
            on.host(copies, write=7)
            values = on.engine.noise(11)
            for (start, nbytes), value in zip(on.engine.storages(), values, strict=True):
                gpu.host_access(start, nbytes, is_write=True)
                bytes_at(start, nbytes)[:] = value
            gpu.drain()
            on.expect("of the cache, used again", on.engine.bits(), values)
            layers = on.host(copies)
            on.expect("of host memory, used again", layers, [np.full_like(x, 7) for x in layers])
        return on.faults

    return scenario


SCENARIOS: dict[str, Scenario] = {
    "store": store,
    "load": load,
    "load some": load_some,
    "load straight": load_straight,
    "load by layers": by_layers(PAGED, [(0, 2), (2, 4)]),
    "load straight by layers": by_layers(WHOLE, [(0, 2), (2, 4)]),
    "load mixed": load_mixed,
    "two at once": two_at_once,
    "growing": growing,
    "failing store": failing("gather", PAGED, launch=4),
    "failing load": failing("scatter", PAGED, launch=4),
    "failing straight load": failing("scatter", WHOLE, copy=8),
}


def run(
    name: str, mode: str, seed: int = 0, mutant: Mutant | None = None
) -> tuple[list[str], Calls]:
    """What was wrong with one run of a scenario, and what it called."""
    calls = Calls(mutant)
    gpu = Gpu(mode, seed)
    try:
        faults = asyncio.run(SCENARIOS[name](gpu, calls))  # type: ignore[arg-type]
    except (FellBackError, FakeCudaError) as exc:
        faults = [f"error: {exc}"]
    return faults, calls
