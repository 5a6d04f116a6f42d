"""Every KV tensor that vLLM's GPU backends declare, moved by kvlayer and compared byte by byte.

The oracle reads the tensors by vLLM's own definition (``view[block, head, token]`` is a row), and
the whole allocation is compared: what lies between the rows stays as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import fake_cupy
import numpy as np
import pytest
import torch
from gpu_engine import DeviceTensor, memory_of
from gpu_scenarios import SMALL, NoTorch
from gpu_sim import Gpu
from shaped_groups import Held, held
from shaped_specs import KINDS, Kind, Tensors

from kvlayer import KVView
from kvlayer.abc.stager import HostCopy, Stager
from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import AttentionKind
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer.staging.torch_stager import TorchStager

TAKEN, PUT = (5, 0, 3), (2, 7, 4)
"""Blocks in the order of a prompt, and those they are loaded into."""
NO_WORDS = {"DeepSeek V4 sparse, 4 tokens an entry"}
SCATTERED = {"BHLNC", "LHBNC"}
"""Layouts in which the heads of a block lie apart: there is no whole block to keep."""


@pytest.mark.parametrize("stage", ["torch", "device"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_that_a_backend_declares_is_moved_to_the_byte(kind: Kind, stage: str) -> None:
    said = {
        (layout.name, form): verdict(kind, layout, form == "native", STAGES[stage])
        for layout in kind.layouts()
        for form in ("canonical", "native")
        if form == "native" or kind.has_rows
    }
    assert said == {(layout, form): expected(kind, layout, form) for layout, form in said}
    assert said


def test_there_are_33_kinds_and_more_than_150_combinations() -> None:
    assert len(KINDS) == len({kind.name for kind in KINDS}) == 33
    assert sum(len(kind.layouts()) for kind in KINDS) > 150


def expected(kind: Kind, layout: str, form: str) -> str:
    if layout in kind.refused:
        return "vLLM refuses"
    if kind.name in NO_WORDS:
        return "no words"
    heads = getattr(kind.spec(), "num_kv_heads", 1)
    if form == "native" and layout in SCATTERED and heads > 1:
        return "no whole block"
    return "moved"


def verdict(kind: Kind, layout: Any, is_native: bool, stage: Stage) -> str:
    try:
        tensors = Tensors(kind, layout)
    except (AssertionError, ValueError) as exc:
        said = str(exc)
        return "vLLM refuses" if kind.refused.get(layout.name, said + ".") in said else said
    found = held(kind, tensors, is_native=is_native)
    if found is None:
        return "no words"
    try:
        asyncio.run(moved(found, tensors, kind.has_rows and not is_native, stage))
    except LayoutError as exc:
        return "no whole block" if "a native form needs contiguous" in str(exc) else str(exc)
    return "moved"


async def moved(found: Held, tensors: Tensors, by_rows: bool, stage: Stage) -> None:
    """Gather a prompt's tokens and scatter them elsewhere; everything else stays."""
    size = found.tokens_per_block
    # Rows land at other places of their blocks; whole blocks only where nothing else makes sense.
    first, elsewhere, count = (3, 7, 2 * size) if by_rows else (0, 0, 3 * size)
    if found.group.kind is AttentionKind.STATE:
        count = size  # one state, after its last token
    taken, put = slots(TAKEN, size)[first:][:count], slots(PUT, size)[elsewhere:][:count]
    before = tensors.raw.clone()
    async with stage(found, tensors) as (stager, copy, view):
        lent = copy(count)
        await stager.gather(view(taken), [lent])
        assert torch.equal(tensors.raw, before), "a store wrote to the engine's memory"
        assert_canonical(found, tensors, taken, lent)
        await stager.scatter(view(put), [lent])
    wanted = before.clone()
    for old, new in zip(tensors.views_of(before), tensors.views_of(wanted), strict=True):
        if found.group.kind is AttentionKind.STATE:
            new[PUT[0]] = old[TAKEN[0]]
            continue
        new[put // size, :, put % size] = old[taken // size, :, taken % size]
    assert torch.equal(tensors.raw, wanted), "the wrong bytes, or bytes of others"


def assert_canonical(found: Held, tensors: Tensors, taken: Any, lent: HostCopy) -> None:
    """K of all heads and tokens, then V: what every engine reads, whatever this one's layout."""
    layout = found.layout.groups[0]
    if layout.form != "canonical" or layout.axes != ("block", "head", "token", "kvdim"):
        return
    size, width = found.tokens_per_block, found.group.head_size
    payload = lent.payload
    for number, view in enumerate(found.views):
        rows = view[taken // size, :, taken % size].transpose(0, 1)
        planes = [rows[..., :width], rows[..., width:]]
        flat = torch.cat([each.contiguous().reshape(-1).view(torch.uint8) for each in planes])
        start = number * payload.layer_nbytes
        assert bytes(lent.host[start : start + payload.layer_nbytes]) == flat.numpy().tobytes()


def slots(blocks: tuple[int, ...], size: int) -> Any:
    return np.concatenate([np.arange(size) + block * size for block in blocks]).astype(np.int64)


# -- what moves the bytes --------------------------------------------------------------------------

Stage = Callable[[Held, Tensors], Any]
Ready = tuple[Stager, Callable[[int], HostCopy], Callable[[Any], KVView]]


def part_of(found: Held, tokens: int) -> Payload:
    layout = found.layout.groups[0]
    heads = layout.head_range if found.group.kind is AttentionKind.MHA else None
    part = Part(0, layout.layer_range, heads, layout.form)
    return Payload.of(found.group, part, tokens)


@asynccontextmanager
async def by_torch(found: Held, tensors: Tensors) -> AsyncGenerator[Ready]:
    stager = TorchStager(found.layout, threads=1)

    def copy(tokens: int) -> HostCopy:
        payload = part_of(found, tokens)
        return HostCopy(payload, memoryview(bytearray(payload.nbytes)), 0, tokens)

    try:
        yield stager, copy, lambda where: KVView.single(found.views, where)
    finally:
        await stager.aclose()


@asynccontextmanager
async def by_device(found: Held, tensors: Tensors) -> AsyncGenerator[Ready]:
    """The pipeline of a CUDA device, on a simulated one that does nothing before it must."""
    gpu = Gpu("lazy")
    with fake_cupy.install(gpu):
        slab = Slab(4 << 20)
        stager = DeviceStager(
            found.layout,
            threads=1,
            devices=Devices(slab, SMALL, piece_nbytes=64 << 10),
            torch_stager=NoTorch(),
        )
        assert await stager.ready()
        assert await stager.pinned() == slab.nbytes
        gpu.lend(*memory_of(tensors.raw))
        views = [view.as_subclass(DeviceTensor) for view in found.views]
        stream = gpu.new_stream()

        def copy(tokens: int) -> HostCopy:
            payload = part_of(found, tokens)
            return HostCopy(payload, slab.view(0, payload.nbytes), 0, tokens)

        try:
            yield stager, copy, lambda where: KVView.single(views, where, stream=stream)
        finally:
            await stager.aclose()
            gpu.drain()
        assert gpu.faults == []


STAGES: dict[str, Stage] = {"torch": by_torch, "device": by_device}
