"""Whatever call CUDA refuses: nothing leaks, nothing hangs, nothing is in flight afterwards."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import gpu_refusals
import numpy as np
import pytest
from engine import Engine
from fake_cupy import Calls
from gpu_engine import GpuEngine
from gpu_refusals import Refusals
from gpu_scenarios import BLOCKS, MIXED, SMALL, FellBackError, NoTorch, Stage
from gpu_sim import Gpu, bytes_at

from kvlayer.memory.slab import Slab
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.stager import DeviceStager

KINDS = {
    "malloc": "device",
    "free": "device",
    "hostAlloc": "pinned",
    "freeHost": "pinned",
    "hostRegister": "registered",
    "hostUnregister": "registered",
    "streamCreateWithPriority": "stream",
    "streamDestroy": "stream",
    "eventCreateWithFlags": "event",
    "eventDestroy": "event",
}
"""What a call gives or takes back."""


@pytest.fixture(scope="module", autouse=True)
def silent() -> Iterator[None]:
    """A device that is given up, and memory that is not pinned, are said; not looked at here."""
    names = ("kvlayer.staging.cuda.stager", "kvlayer.staging.cuda.pinned")
    for name in names:
        logging.getLogger(name).disabled = True
    yield
    for name in names:
        logging.getLogger(name).disabled = False


async def life(gpu: Gpu, refusals: Refusals) -> list[str]:
    """Open, pin, store, load through the ring and straight, grow the ring, close: what was wrong.

    A call that is refused falls back to torch, which is not there: then memory is the caller's.
    """
    with gpu_refusals.install(gpu, refusals):
        slab = Slab(1 << 20)
        stager = DeviceStager(
            MIXED,
            threads=1,
            devices=Devices(slab, SMALL, piece_nbytes=300 << 10),
            torch_stager=NoTorch(),
        )
        engine = GpuEngine(gpu, Engine(MIXED, BLOCKS))
        on = Stage(gpu, Calls(), engine, slab, stager)
        await stager.ready()
        await stager.pinned()
        slots = engine.engine.slots(80)
        small, large = [*on.copies(5), *on.copies(5, group=1)], on.copies(1, tokens=80)
        for verb, copies in (("gather", small), ("scatter", small), ("gather", large)):
            engine.write(engine.noise(1))
            try:
                await getattr(stager, verb)(engine.view(slots), copies)
            except FellBackError:
                on.host(copies, write=7)
                values = engine.noise(2)
                gpu.synchronize_stream(engine.stream)
                for (start, nbytes), value in zip(engine.storages(), values, strict=True):
                    bytes_at(start, nbytes)[:] = value
                gpu.drain()
                on.expect("of the cache, used again", engine.bits(), values)
                host = on.host(copies)
                on.expect("of host memory", host, [np.full_like(layer, 7) for layer in host])
        await stager.aclose()
        gpu.drain()
        return on.faults + gpu.faults


async def calls(every: bool) -> list[int]:
    """Numbers of the calls to refuse: of a life's every call, or of the first and last per line."""
    gpu = Gpu("lazy")
    refusals = Refusals(gpu)
    assert await life(gpu, refusals) == []
    assert gpu.held == {"stream": 1}, "the engine's"
    assert len(refusals.names) > 150 and set(KINDS) <= set(refusals.names)
    numbered = dict(enumerate(refusals.places, 1))
    if every:
        return [*numbered]
    last = {place: at for at, place in numbered.items()}
    first = {place: at for at, place in reversed(numbered.items())}
    return sorted({*first.values(), *last.values()})


@pytest.mark.asyncio
async def test_whatever_call_is_refused_everything_is_given_back(dose) -> None:
    for at in await calls(every=dose(0, 1) > 0):
        gpu = Gpu("lazy")
        refusals = Refusals(gpu, at)
        assert await life(gpu, refusals) == [], f"call {at}, {refusals.refused}"
        assert refusals.refused is not None
        kept = Counter(gpu.held) - Counter(stream=1)
        # What CUDA refuses to take back stays; that, and nothing else.
        gives_back = refusals.refused in ("free", "freeHost", "hostUnregister") or (
            refusals.refused.endswith("Destroy")
        )
        wanted = Counter({KINDS[refusals.refused]: 1}) if gives_back else Counter[str]()
        assert kept == wanted, f"call {at}, {refusals.refused}: {kept}"


@pytest.mark.asyncio
async def test_a_device_that_fails_for_good_ends_every_call_and_closes(dose) -> None:
    for at in await calls(every=dose(0, 1) > 0):
        gpu = Gpu("lazy")
        refusals = Refusals(gpu, at, for_good=True)
        assert await life(gpu, refusals) == [], f"from call {at}, {refusals.refused}, on"
