"""Every KV tensor that vLLM's GPU backends declare, moved by kvlayer and compared byte by byte.

What is moved are the adapter's own groups, layouts and views. The oracle reads the tensors by
vLLM's definition (``view[block, head, token]`` is a row), and the whole allocation is compared:
what lies between the rows stays as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import fake_cupy
import numpy as np
import pytest
import torch
from gpu_engine import DeviceTensor, memory_of
from gpu_scenarios import SMALL, NoTorch
from gpu_sim import Gpu
from shaped_groups import Held, held
from shaped_specs import KINDS, Kind, Tensors, full_spec

from kvlayer import KVView
from kvlayer.abc.stager import HostCopy, Stager
from kvlayer.errors import UnsupportedError
from kvlayer.identity.keys import Part
from kvlayer.layout import FUSED_HND, AttentionKind
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.staging.cuda.devices import Devices
from kvlayer.staging.cuda.stager import DeviceStager
from kvlayer.staging.torch_stager import TorchStager
from kvlayer_vllm.device_order import EngineStream
from kvlayer_vllm.hands import LocalHands
from kvlayer_vllm.lent_tensors import LentTensors
from kvlayer_vllm.moves import Save
from kvlayer_vllm.specs import Content

TAKEN, PUT = (5, 0, 3), (2, 7, 4)
"""Blocks in the order of a prompt, and those they are loaded into."""
MANY = "several tokens in one entry"
PAGED = "only whole blocks mean something"
APART = "a native form needs contiguous blocks"
SCATTERED = {"BHLNC", "LHBNC"}
"""Layouts in which the heads of a block lie apart: there is no whole block to keep."""


@pytest.mark.parametrize("stage", ["torch", "device"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_that_a_backend_declares_is_moved_to_the_byte(kind: Kind, stage: str) -> None:
    said = {
        (layout.name, form): verdict(kind, layout, form, stage)
        for layout in kind.layouts()
        for form in ("canonical", "native")
    }
    assert said == {(layout, form): expected(kind, layout, form) for layout, form in said}
    assert said


def test_there_are_33_kinds_and_more_than_150_combinations() -> None:
    assert len(KINDS) == len({kind.name for kind in KINDS}) == 33
    assert sum(len(kind.layouts()) for kind in KINDS) > 150


def expected(kind: Kind, layout: str, form: str) -> str:
    if layout in kind.refused:
        return "vLLM refuses"
    spec = kind.spec()
    if type(spec).__name__ == "MambaSpec":
        return "moved"
    if spec.tokens_per_state != 1:
        return MANY
    if form == "canonical" and not kind.has_rows:
        return PAGED
    is_apart = layout in SCATTERED and spec.num_kv_heads > 1
    return APART if form == "native" and is_apart else "moved"


def verdict(kind: Kind, layout: Any, form: str, stage: str) -> str:
    try:
        tensors = Tensors(kind, layout)
    except (AssertionError, ValueError) as exc:
        said = str(exc)
        return "vLLM refuses" if kind.refused.get(layout.name, said + ".") in said else said
    try:
        found = held(kind, tensors, form, tensor=CLASSES[stage])
    except UnsupportedError as exc:
        return next((why for why in (MANY, PAGED, APART) if why in str(exc)), str(exc))
    asyncio.run(moved(found, tensors, kind.has_rows and form == "canonical", STAGES[stage]))
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
        kernel = old.shape[2]  # a block as kernels see it may be a part of the scheduler's
        new[put // kernel, :, put % kernel] = old[taken // kernel, :, taken % kernel]
    assert torch.equal(tensors.raw, wanted), "the wrong bytes, or bytes of others"


def assert_canonical(found: Held, tensors: Tensors, taken: Any, lent: HostCopy) -> None:
    """K of all heads and tokens, then V: what every engine reads, whatever this one's layout."""
    if found.layout.groups[0].form != "canonical":
        return
    payload = lent.payload
    for number, view in enumerate(tensors.views):
        flat = torch.cat([bytes_of(plane) for plane in planes_of(tensors.spec, view, taken)])
        start = number * payload.layer_nbytes
        said = bytes(lent.host[start : start + payload.layer_nbytes])
        # Not in the assertion: in CI pytest would show all that differs, which takes minutes.
        is_read = said == flat.numpy().tobytes()
        assert is_read, "not what every engine reads"


def planes_of(spec: Any, view: torch.Tensor, where: Any) -> list[torch.Tensor]:
    """K and V of these slots, each ``[head, token, dim]``, by vLLM's definition alone."""
    kernel = view.shape[2]
    rows = view[where // kernel, :, where % kernel]  # [token, head or slot, content]
    if "MLA" in type(spec).__name__:
        return [rows.transpose(0, 1)]
    if spec.num_head_slots is not None:
        return [rows[:, kv].unflatten(-1, (spec.num_kv_heads, -1)).transpose(0, 1) for kv in (0, 1)]
    width = rows.shape[-1] // 2 if spec.state_content_bytes else spec.head_size
    return [each.transpose(0, 1) for each in (rows[..., :width], rows[..., width:])]


def bytes_of(plane: torch.Tensor) -> torch.Tensor:
    return plane.contiguous().reshape(-1).view(torch.uint8)


# -- engines of other kinds read it ----------------------------------------------------------------

HEADS = [
    "FLASH_ATTN bf16",
    "TRITON_ATTN bf16",
    "FLASHINFER bf16",
    "FLEX_ATTENTION bf16",
    "B12X bf16",
    "HPC_ATTN",
    "a hybrid's padded page",
]
LATENTS = [
    "TRITON_MLA bf16",
    "CUTLASS_MLA bf16",
    "FLASHMLA bf16",
    "FLASH_ATTN_MLA bf16",
    "FLASHINFER_MLA bf16",
    "FLASHMLA_SPARSE bf16",
    "FLASHINFER_MLA_SPARSE bf16",
]


@pytest.mark.parametrize("family", [HEADS, LATENTS], ids=["heads", "latents"])
def test_what_one_backend_has_stored_every_other_reads(family: list[str]) -> None:
    """A ring: each kind in each of its layouts reads what the one before has written."""
    ring = [
        (kind, layout)
        for kind in KINDS
        if kind.name in family
        for layout in kind.layouts()
        if layout.name not in kind.refused
    ]
    assert len(ring) > 20
    for writer, reader in zip(ring, [*ring[1:], ring[0]], strict=True):
        asyncio.run(crossed(writer, reader))


async def crossed(writer: tuple[Kind, Any], reader: tuple[Kind, Any]) -> None:
    tokens, lent, planes = 90, [], []
    for (kind, layout), blocks in ((writer, (5, 0, 3, 7, 1, 6)), (reader, (2, 4, 6, 0, 7, 1))):
        tensors = Tensors(kind, layout)
        found = held(kind, tensors, "auto")
        assert found.layout.groups[0].form == "canonical"
        where = slots(blocks, found.tokens_per_block)[3:][:tokens]
        async with by_torch(found, tensors) as (stager, copy, view):
            if not lent:
                lent.append(copy(tokens))
                await stager.gather(view(where), lent)
            else:
                await stager.scatter(view(where), lent)
        planes.append(
            [
                bytes_of(each)
                for view in tensors.views
                for each in planes_of(tensors.spec, view, where)
            ]
        )
    assert all(map(torch.equal, *planes)), f"{writer} -> {reader}"


# -- what must be found ----------------------------------------------------------------------------

SQUARE = Kind("as many heads as tokens", "FLASH_ATTN", lambda: full_spec("auto", num_kv_heads=16))


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLHNC"])
def test_heads_taken_for_tokens_are_found(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are 16 of each the shapes fit, and only the bytes tell."""
    chosen = next(each for each in SQUARE.layouts() if each.name == layout)
    assert verdict(SQUARE, chosen, "canonical", "torch") == "moved"
    swapped = ("block", "token", "head", "kvdim")
    assert sorted(swapped) == sorted(FUSED_HND)
    monkeypatch.setattr(Content, "axes", property(lambda _: swapped))
    with pytest.raises(AssertionError, match="not what every engine reads"):
        verdict(SQUARE, chosen, "canonical", "torch")


@pytest.mark.parametrize("name", ["FLASH_ATTN bf16", "B12X bf16", "TRITON_ATTN fp8_per_token_head"])
@pytest.mark.parametrize("is_compared", [True, False])
def test_keys_taken_for_values_are_found(
    name: str, is_compared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what is stored; and where nobody looks at that, in what is loaded from it."""
    kind = next(each for each in KINDS if each.name == name)
    tensors = Tensors(kind, kind.layouts()[0])
    gather = TorchStager.gather

    async def swapped(stager: TorchStager, view: KVView, copies: list[HostCopy]) -> None:
        await gather(stager, view, copies)
        for each in copies:
            layers = np.frombuffer(each.host, np.uint8)
            layers = layers[: 3 * each.payload.layer_nbytes].reshape(3, 2, -1)
            layers[:] = layers[:, ::-1].copy()

    monkeypatch.setattr(TorchStager, "gather", swapped)
    if not is_compared:
        monkeypatch.setitem(globals(), "assert_canonical", lambda *_: None)
    message = "not what every engine reads" if is_compared else "the wrong bytes"
    with pytest.raises(AssertionError, match=message):
        asyncio.run(moved(held(kind, tensors, "canonical"), tensors, True, by_torch))


def test_a_wider_key_taken_for_the_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = next(each for each in KINDS if each.name == "FLASH_ATTN_DIFFKV")
    tensors = Tensors(kind, kind.layouts()[0])
    found = held(kind, tensors, "canonical")
    wrong = replace(found.group, head_size=128, v_head_size=192)
    (lying,) = found.layout.groups
    rank = replace(found.rank, layout=replace(found.layout, groups=(replace(lying, group=wrong),)))
    with pytest.raises(AssertionError, match="not what every engine reads"):
        asyncio.run(moved(replace(found, rank=rank), tensors, True, by_torch))


def test_a_block_of_the_schedulers_is_not_taken_for_one_of_the_kernels() -> None:
    kind = next(each for each in KINDS if each.name == "FLASHINFER block 256, kernel 64")
    tensors = Tensors(kind, kind.layouts()[0])
    found = held(kind, tensors, "native")
    (lying,) = found.layout.groups
    assert (found.tokens_per_block, lying.tokens_per_block) == (256, 64)
    assert lying.form.endswith("-64")
    odd = Kind("48", "", lambda: full_spec("auto", block_size=48), named="FLASHINFER")
    tensors.spec = odd.spec()
    with pytest.raises(UnsupportedError, match="blocks that divide the scheduler's 48 tokens"):
        held(odd, tensors, "native")


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
    hands = LocalHands(LentTensors([found.views], EngineStream("cpu")), (0,))

    def copy(tokens: int) -> HostCopy:
        payload = part_of(found, tokens)
        return HostCopy(payload, memoryview(bytearray(payload.nbytes)), 0, tokens)

    try:
        yield stager, copy, lambda where: hands.view([where], NOBODY)
    finally:
        await stager.aclose()


@asynccontextmanager
async def by_device(found: Held, tensors: Tensors) -> AsyncGenerator[Ready]:
    """The pipeline of a CUDA device, on a simulated one that does nothing before it must."""
    gpu = Gpu("lazy")
    hands = LocalHands(LentTensors([found.views], EngineStream("cpu")), (0,))
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
        assert all(view.device.type == "cuda" for view in found.views)
        stream = gpu.new_stream()

        def copy(tokens: int) -> HostCopy:
            payload = part_of(found, tokens)
            return HostCopy(payload, slab.view(0, payload.nbytes), 0, tokens)

        try:
            yield stager, copy, lambda where: replace(hands.view([where], NOBODY), stream=stream)
        finally:
            await stager.aclose()
            gpu.drain()
        assert gpu.faults == []


STAGES: dict[str, Stage] = {"torch": by_torch, "device": by_device}
CLASSES: dict[str, Any] = {"torch": torch.Tensor, "device": DeviceTensor}
NOBODY = Save("nobody")
"""Whose view it is: these views are nobody's."""
