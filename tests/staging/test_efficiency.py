"""How much of what a warp moves was asked for, at the shapes of real models: counted, not timed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import NAMED, Case, launch, random_floats
from emulator import Efficiency, Emulator, Memory

from kvlayer.identity.keys import Part
from kvlayer.layout import AttentionKind, GroupLayout, KVGroup
from kvlayer.payload import Payload
from kvlayer.staging.kernels.int8 import dequantize_plan, int8_layer_nbytes, quantize_plan
from kvlayer.staging.kernels.plan import gather_plan, scatter_plan
from kvlayer.staging.kernels.rotation import Rotation, rotate_plans

SIZE, TOKENS, LAYERS = 16, 128, (0, 1)
LLAMA = KVGroup(AttentionKind.MHA, LAYERS, "bfloat16", num_kv_heads=4, head_size=128)
GROUPS = {
    "128 x bf16": LLAMA,
    "64 x bf16": replace(LLAMA, head_size=64),
    "80 x f16": replace(LLAMA, dtype="float16", head_size=80),
    "128 x fp8": replace(LLAMA, dtype="fp8_e4m3"),
    "64 x fp8": replace(LLAMA, dtype="fp8_e4m3", head_size=64),
    "128 x f32": replace(LLAMA, dtype="float32"),
    "mla 576 x bf16": KVGroup(AttentionKind.MLA, LAYERS, "bfloat16", head_size=576),
    "mla 656 x fp8": KVGroup(AttentionKind.MLA, LAYERS, "fp8_e4m3", head_size=656),
}
FLOATS = [name for name, group in GROUPS.items() if not group.dtype.startswith("fp8")]
# A half of 80 bytes ends inside a sector, which the other half's access touches again. Devices
# merge such accesses; here each instruction counts alone.
CUT = {("80 x f16", "neox")}


def case_of(group: KVGroup, layout: str) -> Case:
    axes, order = NAMED[layout]
    rng = np.random.default_rng(0)
    size = 1 if layout == "dense" else SIZE
    blocks = 2 * TOKENS // size
    ids = np.arange(blocks) if size == 1 else rng.permutation(blocks)
    slots = (ids[:, None] * size + np.arange(size)).reshape(-1)[:TOKENS]
    heads = (0, group.num_kv_heads) if group.kind is AttentionKind.MHA else None
    payload = Payload.of(group, Part(0, (0, 2), heads), TOKENS)
    grouped = GroupLayout(group, axes, tokens_per_block=size)
    return Case(grouped, blocks, order, 0, 0, slots.tolist(), payload, [(0, TOKENS, 0)], rng)


def efficiency(emulator: Emulator, case: Case, planner, *, gather: bool, **more) -> Efficiency:
    """Of all accesses of a launch: rows, scales and tables."""
    caches = [Memory(emulator, nbytes) for nbytes in case.nbytes()]
    for cache in caches:
        cache.array[:] = random_floats(case.rng, cache.nbytes, "bfloat16")
    stage = Memory(emulator, case.payload.nbytes + 4 * TOKENS * 16 * 2, fill=0)
    arrays = [cache.array for cache in caches]
    host = np.zeros(case.payload.nbytes, np.uint8)
    moves = case.moves(arrays, [host], gather=gather)
    with emulator.sectors() as found:
        launch(emulator, case, moves, [stage.address], case.view(arrays), planner, **more)
    for memory in (*caches, stage):
        memory.close()
    return Efficiency(*(sum(each) for each in zip(*found.values(), strict=True)))


def layouts_of(group: KVGroup) -> list[str]:
    if group.kind is AttentionKind.MLA:
        return ["mla", "mla page first"]
    return [name for name in NAMED if not name.startswith(("mla", "state"))]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("gather", [True, False], ids=["gather", "scatter"])
def test_copies_use_at_least_95_percent_of_every_sector(emulator, name, gather, figures):
    for layout in layouts_of(GROUPS[name]):
        planner = gather_plan if gather else scatter_plan
        found = efficiency(emulator, case_of(GROUPS[name], layout), planner, gather=gather)
        figures(f"sectors.{planner.__name__}.{name}.{layout}", ratio=round(found.ratio, 3))
        assert found.nbytes > 2 * TOKENS * 64
        assert found.ratio >= 0.95, (layout, found)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kernel", ["neox", "gptj", "quantize", "dequantize"])
def test_kernels_that_transform_use_at_least_90_percent(emulator, name, kernel, figures):
    group = GROUPS[name]
    for layout in layouts_of(group):
        case = case_of(group, layout)
        more = {"payload": case.payload}
        if kernel in {"neox", "gptj"}:
            size = 64 if group.kind is AttentionKind.MLA else group.head_size
            frequencies = tuple(1e4 ** (-np.arange(size // 2) / (size // 2)))
            more["rotation"] = Rotation(kernel, frequencies, group.head_size - size)
            planner, more["shifts"] = rotate_plans, [100]
        else:
            planner = quantize_plan if kernel == "quantize" else dequantize_plan
            layer = int8_layer_nbytes(case.payload)
            more["at"] = lambda number, _, layer=layer: number * layer
        found = efficiency(emulator, case, planner, gather=kernel == "quantize", **more)
        figures(f"sectors.{kernel}.{name}.{layout}", ratio=round(found.ratio, 3))
        assert found.ratio >= (0.89 if (name, kernel) in CUT else 0.9), (layout, found)


def test_rows_that_straddle_sectors_are_seen_to_waste_them(emulator):
    """The counter counts: rows of 40 bytes, at no multiple of 32, cannot reach what others do."""
    group = replace(LLAMA, head_size=20)
    found = efficiency(emulator, case_of(group, "vllm nhd"), gather_plan, gather=True)
    assert found.ratio < 0.95
