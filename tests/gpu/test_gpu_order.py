"""What a view promises of order on a device: behind the engine, by layers, nothing left over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvlayer.abc.stager import HostCopy
from kvlayer.bench.host import LLAMA
from kvlayer.identity.keys import Part
from kvlayer.layout import NHD, KVLayout, KVView, LoadedLayers
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.staging.cuda.calibration import Calibration
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.runtime import cupy_runtime
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer.staging.sample import paged_view

pytestmark = pytest.mark.asyncio

CHUNK, BLOCK, CHUNKS = 256, 16, 12
LAYOUT = KVLayout.single(LLAMA, NHD, tokens_per_block=BLOCK)
PAYLOAD = Payload.of(LLAMA, Part(0, (0, 32), (0, 8), "canonical"), CHUNK)
LATE = 400_000_000  # clock cycles: some 200 ms, an age beside a copy's microseconds


@pytest.fixture
def slab() -> Iterator[Slab]:
    slab = Slab(CHUNKS * PAYLOAD.nbytes)
    yield slab
    slab.close()


@asynccontextmanager
async def opened(slab: Slab, device: int, **thresholds: Any) -> AsyncGenerator[DeviceStager]:
    stager = DeviceStager(LAYOUT, slab=slab, devices=Devices(slab, Calibration(**thresholds)))
    try:
        assert await stager.ready(device), "the log says why not"
        await stager.pinned()
        yield stager
    finally:
        await stager.aclose()


def memory(device: int, seed: int) -> KVView:
    view = paged_view(LAYOUT, CHUNKS * CHUNK // BLOCK, seed=seed, device=f"cuda:{device}")
    torch.cuda.synchronize()
    return view


def copies_of(slab: Slab) -> list[HostCopy]:
    n = PAYLOAD.nbytes
    return [HostCopy(PAYLOAD, slab.view(at * n, n), at * CHUNK, CHUNK) for at in range(CHUNKS)]


def bits(view: KVView) -> list[torch.Tensor]:
    return [cache.view(torch.int16).clone() for cache in view.caches[0]]


async def test_a_store_holds_what_the_engine_has_queued_before_it(slab: Slab, device: int) -> None:
    async with opened(slab, device) as stager:
        view, engine = memory(device, 1), torch.cuda.Stream()
        with torch.cuda.stream(engine):
            torch.cuda._sleep(LATE)
            for cache in view.caches[0]:
                cache.fill_(1.5)
        await stager.gather(replace(view, stream=engine.cuda_stream), copies_of(slab))
        wanted = torch.full((1,), 1.5, dtype=torch.bfloat16).view(torch.int16).item()
        held = torch.frombuffer(slab.view(0, slab.nbytes), dtype=torch.int16)
        assert bool((held == wanted).all())


async def test_without_the_engines_stream_a_store_would_be_too_early(
    slab: Slab, device: int
) -> None:
    """That the test above can fail: a view which names another stream gets the bytes before."""
    async with opened(slab, device) as stager:
        view, engine, other = memory(device, 1), torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(engine):
            torch.cuda._sleep(LATE)
            for cache in view.caches[0]:
                cache.fill_(1.5)
        await stager.gather(replace(view, stream=other.cuda_stream), copies_of(slab))
        held = torch.frombuffer(slab.view(0, slab.nbytes), dtype=torch.int16)
        wanted = torch.full((1,), 1.5, dtype=torch.bfloat16).view(torch.int16).item()
        assert bool((held != wanted).any())
        torch.cuda.synchronize()


@pytest.mark.parametrize("direct_nbytes", [1, 1 << 30], ids=["straight", "ring"])
async def test_an_engine_that_waits_for_layers_may_compute_them(
    direct_nbytes: int, slab: Slab, device: int
) -> None:
    """Each layer group is read on the engine's stream behind its event, before the call returns."""
    async with opened(
        slab, device, direct_nbytes=direct_nbytes, group_slots=2, slot_nbytes=8 << 20
    ) as stager:
        view, engine, runtime = memory(device, 2), torch.cuda.Stream(), cupy_runtime()
        copies, wanted = copies_of(slab), bits(view)
        await stager.gather(view, copies)
        for cache in view.caches[0]:
            cache.zero_()
        torch.cuda.synchronize()
        read: dict[int, torch.Tensor] = {}

        def loaded(layers: LoadedLayers) -> None:
            runtime.streamWaitEvent(engine.cuda_stream, layers.event)
            with torch.cuda.stream(engine):
                for layer in range(*layers.layers):
                    read[layer] = view.caches[0][layer].view(torch.int16).clone()

        await stager.scatter(replace(view, stream=engine.cuda_stream, loaded=loaded), copies)
        torch.cuda.synchronize()
        assert sorted(read) == list(range(32))
        for layer, found in read.items():
            assert torch.equal(found, wanted[layer]), f"layer {layer} was read too early"


async def test_the_engines_next_kernel_overwrites_what_was_stored_and_nothing_of_the_store(
    slab: Slab, device: int
) -> None:
    async with opened(slab, device) as stager:
        view, copies = memory(device, 3), copies_of(slab)
        wanted = bits(view)
        for _ in range(20):
            await stager.gather(view, copies)
            for cache in view.caches[0]:
                cache.zero_()  # at once: the call has let go of the view
            torch.cuda.synchronize()
            await stager.scatter(view, copies)
            assert all(map(torch.equal, bits(view), wanted))


@pytest.mark.parametrize("gather", [True, False], ids=["store", "load"])
async def test_a_cancelled_call_leaves_no_copy_under_way(
    gather: bool, slab: Slab, device: int
) -> None:
    """Whoever owns the memory may write it as soon as the call has ended."""
    async with opened(slab, device) as stager:
        view, copies = memory(device, 4), copies_of(slab)
        await stager.gather(view, copies)
        host = torch.frombuffer(slab.view(0, slab.nbytes), dtype=torch.int16)
        target = [host] if gather else [cache.view(torch.int16) for cache in view.caches[0]]
        cut = 0
        for turn in range(20):
            call = asyncio.ensure_future(
                (stager.gather if gather else stager.scatter)(view, copies)
            )
            for _ in range(turn):
                await asyncio.sleep(0)
            call.cancel()
            cut += (await asyncio.gather(call, return_exceptions=True))[0] is not None
            for each in target:
                each.fill_(turn)
            torch.cuda.synchronize()
            assert all(bool((each == turn).all()) for each in target)
        assert cut, "no call was cancelled before it had ended"


async def test_calls_side_by_side_do_not_mix(slab: Slab, device: int) -> None:
    """Stores and loads of several views on streams of their own share ring, streams and pins."""
    async with opened(slab, device, slot_nbytes=4 << 20) as stager:
        views = [memory(device, seed) for seed in range(3)]
        streams = [torch.cuda.Stream() for _ in views]
        wanted = [bits(view) for view in views]
        shares = [copies_of(slab)[k::3] for k in range(3)]
        lent = [
            replace(view, stream=stream.cuda_stream)
            for view, stream in zip(views, streams, strict=True)
        ]
        for _ in range(5):
            await asyncio.gather(*map(stager.gather, lent, shares))
            for view, stream in zip(views, streams, strict=True):
                with torch.cuda.stream(stream):
                    for cache in view.caches[0]:
                        cache.zero_()
            await asyncio.gather(*map(stager.scatter, lent, shares))
            for k, (view, before) in enumerate(zip(views, wanted, strict=True)):
                moved = torch.zeros(CHUNKS * CHUNK, dtype=torch.bool)
                for at in range(k, CHUNKS, 3):
                    moved[at * CHUNK : (at + 1) * CHUNK] = True
                slots = view.slots[0]
                for now, was in zip(bits(view), before, strict=True):
                    rows = now.reshape(2, -1, 8 * 128), was.reshape(2, -1, 8 * 128)
                    theirs = slots[moved].to(now.device)
                    assert torch.equal(rows[0][:, theirs], rows[1][:, theirs])
                    assert not rows[0][:, slots[~moved].to(now.device)].any()
            for view, before in zip(views, wanted, strict=True):
                for cache, was in zip(view.caches[0], before, strict=True):
                    cache.copy_(was.view(torch.bfloat16))
            torch.cuda.synchronize()
