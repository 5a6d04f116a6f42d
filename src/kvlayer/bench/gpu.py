"""How fast KV moves between a GPU's blocks and host memory, beside a bare copy of its bytes.

Before that it chooses the thresholds of the device (``staging/cuda/calibration``).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from kvlayer.abc.stager import HostCopy
from kvlayer.bench.host import BLOCK, LLAMA, NBYTES_PER_TOKEN
from kvlayer.bench.measure import Row, alternate
from kvlayer.errors import UnsupportedError
from kvlayer.identity.keys import Part
from kvlayer.layout import NHD, KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.runtime.offload import Offload
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.copies import find_batch_copy
from kvlayer.staging.cuda.devices import Devices, device_kind
from kvlayer.staging.cuda.measure import SLOTS, Figures, bare_copy, choose, choose_slot, measure
from kvlayer.staging.cuda.runtime import Runtime, cupy_runtime
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer.staging.kernels.build import Builder
from kvlayer.staging.kernels.launch import Kernels
from kvlayer.staging.sample import paged_view

__all__ = ["Measured", "gpu_rows"]

_CHUNK = 256
_WARM = 2
_BARE_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Measured:
    """One device's kind, its thresholds, and figures beside their ceilings."""

    kind: str
    calibration: Calibration
    rows: list[Row]


@dataclass(frozen=True, slots=True)
class _Ask:
    """What is moved how often, on which device; ``lend`` makes the engine's memory."""

    number: int
    chunks: int
    rounds: int
    lend: Callable[[KVLayout, int], KVView]


async def gpu_rows(
    number: int,
    nbytes: int,
    rounds: int,
    *,
    view: Callable[[KVLayout, int], KVView] | None = None,
    probe_nbytes: int = 64 << 20,
) -> Measured:
    """Calibrate device ``number``, then store and load ``nbytes`` at a time with the result.

    ``view`` makes the engine's memory of a layout and a number of blocks; by default torch does.
    Raises ``UnsupportedError`` where the device cannot be used.
    """
    offload = Offload(1, "kvlayer-bench-gpu")
    chunks = max(nbytes // NBYTES_PER_TOKEN // _CHUNK, 1)
    ask = _Ask(number, chunks, rounds, view or partial(_torch_view, number))
    try:
        runtime, figures = await offload.run(_figures, number, rounds, probe_nbytes)
        calibration = choose(figures)
        slots = {
            slot: await _seconds(ask, replace(calibration, slot_nbytes=slot)) for slot in SLOTS
        }
        calibration = replace(calibration, slot_nbytes=choose_slot(slots))
        rows = [
            Row("gpu.copy.to_host", figures.to_host, "B/s"),
            Row("gpu.copy.to_device", figures.to_device, "B/s"),
            Row("gpu.gather", figures.by_blocks[max(figures.by_blocks)], "B/s"),
        ]
        for form in ("canonical", "native"):
            async with _moving(ask, form, calibration) as call:
                rows += await _rows(runtime, ask, form, call)
        return Measured(device_kind(runtime, number), calibration, rows)
    finally:
        offload.close()


def _figures(number: int, rounds: int, nbytes: int) -> tuple[Runtime, Figures]:
    kernels = Kernels(Builder(number))
    runtime = cupy_runtime()
    figures = measure(runtime, number, kernels, find_batch_copy(), rounds=rounds, nbytes=nbytes)
    return runtime, figures


@asynccontextmanager
async def _moving(
    ask: _Ask, form: str, calibration: Calibration
) -> AsyncGenerator[Callable[[bool], Awaitable[float]]]:
    """A store (True) or a load of so many chunks, by these thresholds; a call returns seconds."""
    name = "native:nhd-b16" if form == "native" else "canonical"
    layout = KVLayout.single(LLAMA, NHD, tokens_per_block=BLOCK, form=name)
    payload = Payload.of(LLAMA, Part(0, (0, 32), (0, 8), name), _CHUNK)
    slab = Slab(ask.chunks * payload.nbytes)
    stager = DeviceStager(layout, slab=slab, devices=Devices(slab, calibration))
    try:
        if not await stager.ready(ask.number):
            raise UnsupportedError(f"CUDA device {ask.number} cannot be used; the log says why")
        await stager.pinned()
        kv = ask.lend(layout, ask.chunks * _CHUNK // BLOCK)
        copies = [
            HostCopy(payload, slab.view(at * payload.nbytes, payload.nbytes), at * _CHUNK, _CHUNK)
            for at in range(ask.chunks)
        ]

        async def call(gather: bool) -> float:
            started = time.perf_counter()
            await (stager.gather if gather else stager.scatter)(kv, copies)
            return time.perf_counter() - started

        yield call
    finally:
        await stager.aclose()
        slab.close()


async def _seconds(ask: _Ask, calibration: Calibration) -> float:
    """Of a store and a load by these thresholds: the least, for what disturbs only adds."""
    async with _moving(ask, "canonical", calibration) as call:
        taken = [await call(True) + await call(False) for _ in range(_WARM + ask.rounds)]
    return min(taken[_WARM:])


async def _rows(
    runtime: Runtime, ask: _Ask, form: str, call: Callable[[bool], Awaitable[float]]
) -> list[Row]:
    """``gpu.store.*`` and ``gpu.load.*`` of one form, interleaved with bare copies."""
    moved = ask.chunks * _CHUNK * NBYTES_PER_TOKEN
    bare_nbytes = min(moved, _BARE_NBYTES)
    found: list[Row] = []
    for verb, gather in (("store", True), ("load", False)):
        bare = partial(bare_copy, runtime, ask.number, bare_nbytes, to_host=gather)

        async def own_call(_: int, gather: bool = gather) -> float:
            return await call(gather)

        own, top = await alternate(
            own_call,
            partial(_scaled, bare, moved / bare_nbytes),
            rounds=ask.rounds,
            warm=_WARM,
        )
        found.append(Row(f"gpu.{verb}.{form}", moved / own, "B/s", moved / top))
    return found


def _torch_view(number: int, layout: KVLayout, blocks: int) -> KVView:
    return paged_view(layout, blocks, seed=1, device=f"cuda:{number}")


def _scaled(bare: Callable[[], float], scale: float) -> float:
    """Seconds of a bare copy of more bytes than are worth pinning for it."""
    return bare() * scale
