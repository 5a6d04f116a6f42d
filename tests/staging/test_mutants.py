"""Bugs planted in the kernels: each is noticed by a check, which the kernel without it passes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from checks import CHECKS

CASES = 60


class Mutant(NamedTuple):
    """``old``, which a source holds once, is replaced by ``new``; ``check`` must notice."""

    name: str
    check: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "missing barrier before a tile is overwritten",
        "gather",
        "__syncthreads();  // nobody reads the last tile any more",
        "",
    ),
    Mutant(
        "missing barrier before a tile is read",
        "scatter",
        "__syncthreads();  // everybody sees this one",
        "",
    ),
    Mutant(
        "barrier that only some threads reach",
        "gather",
        "__syncthreads();  // everybody sees this one",
        "if (threadIdx.x < 1u << work.tile_log2) __syncthreads();",
    ),
    Mutant(
        "wrong stride: a block's in place of a row's",
        "gather",
        "entry.y * plane.cache_row",
        "entry.y * plane.cache_block",
    ),
    Mutant(
        "wrong stride: the head's of the cache in staging memory",
        "scatter",
        "place.stage + head * plane.stage_head + at",
        "place.stage + head * plane.cache_head + at",
    ),
    Mutant(
        "swapped K and V in staging memory",
        "gather",
        "c = kv_table<uint4>(from + 32)",
        "c = kv_table<uint4>(work.planes + (u64)(number ^ (work.num_planes % 2 == 0)) * 64 + 32)",
    ),
    Mutant(
        "off by one: the last tile of a plane is left out",
        "scatter",
        "(num_rows + (1u << tile_log2) - 1) >> tile_log2",
        "num_rows > 1u << tile_log2 ? num_rows >> tile_log2 : 1",
    ),
    Mutant(
        "off by one: one row too many",
        "gather",
        "if (number >= work.num_rows) return place;",
        "if (number > work.num_rows) return place;",
    ),
    Mutant(
        "missing bounds check: a vector beyond the row's end",
        "scatter",
        "place.cache == 0 || at + sizeof(Vector) > plane.row_nbytes",
        "place.cache == 0",
    ),
    Mutant(
        "off by one: the last vector of a row is left out",
        "gather",
        "at + sizeof(Vector) > plane.row_nbytes) continue",
        "at + sizeof(Vector) >= plane.row_nbytes) continue",
    ),
    Mutant(
        "wrong vector width: 16 bytes where 8 divide the address",
        "gather",
        "case 8: copy_tile<uint2, GATHER>",
        "case 8: copy_tile<uint4, GATHER>",
    ),
    Mutant(
        "a tail that is never copied",
        "gather",
        "if (plane.row_nbytes % width != 0)",
        "if (plane.row_nbytes % width == width)",
    ),
    Mutant(
        "wrong lane mask: lanes counted from the wrong bits",
        "scatter",
        "return threadIdx.x & ((1u << lanes_log2) - 1);",
        "return threadIdx.x & (1u << lanes_log2);",
    ),
    Mutant(
        "items beyond the tile taken for its first ones",
        "gather",
        "if (item >= items) continue;",
        "if (item > items + groups) continue;",
    ),
    Mutant(
        "grid stride that skips tiles",
        "scatter",
        "number += gridDim.x) {\n        const Plane plane = load_tile(work, number, tile);\n"
        "        switch",
        "number += gridDim.x + 1) {\n        const Plane plane = load_tile(work, number, tile);\n"
        "        switch",
    ),
    Mutant(
        "rows of the first piece for all pieces",
        "gather",
        "kv_table<u64>(work.bases + place.piece * sizeof(u64))",
        "kv_table<u64>(work.bases)",
    ),
    Mutant(
        "gather and scatter the wrong way round",
        "gather",
        "kv_load<Vector>(GATHER ? cache : stage)",
        "kv_load<Vector>(GATHER ? stage : cache)",
    ),
    Mutant(
        "rotation in the other direction",
        "rotate",
        "__fmaf_rn(-y, sine[i], x * cosine[i])",
        "__fmaf_rn(y, sine[i], x * cosine[i])",
    ),
    Mutant(
        "angles that have lost the last bits of a float32",
        "rotate",
        "load_table<COUNT>(at, cosine);",
        "load_table<COUNT>(at, cosine);\n"
        "        for (float& c : cosine) c = __uint_as_float(__float_as_uint(c) & ~15u);",
    ),
    Mutant(
        "an argument that is wider than the plan's",
        "quantize",
        "KV_KERNEL NAME(KV_TABLES, KV_COUNTS, u32 tokens)",
        "KV_KERNEL NAME(KV_TABLES, KV_COUNTS, u64 tokens)",
    ),
    Mutant(
        "the second half turned with the first half already turned",
        "rotate",
        "y = __fmaf_rn(x, sine[i], y * cosine[i]);\n        x = turned;",
        "x = turned;\n        y = __fmaf_rn(x, sine[i], y * cosine[i]);",
    ),
    Mutant(
        "the turn of another piece kept",
        "rotate",
        "if (of_piece == piece && from == first) return;",
        "if (from == first) return;",
    ),
    Mutant(
        "partial rotation: what is not rotated taken from the wrong place",
        "rotate",
        "if (element >= first) element += 2 * pairs;",
        "if (element > first) element += 2 * pairs;",
    ),
    Mutant(
        "the other half one vector too far",
        "rotate",
        "high = low + (u64)pairs * Float::NBYTES;",
        "high = low + (u64)(pairs + COUNT) * Float::NBYTES;",
    ),
    Mutant(
        "a shuffle that some lanes have left",
        "quantize",
        "for (u32 apart = lanes >> 1;",
        "if (!held) continue;\n        for (u32 apart = lanes >> 1;",
    ),
    Mutant(
        "wrong lane mask: the largest of half the lanes",
        "quantize",
        "for (u32 apart = lanes >> 1;",
        "for (u32 apart = lanes >> 2;",
    ),
    Mutant(
        "shuffles across rows",
        "quantize",
        "for (u32 apart = lanes >> 1;",
        "for (u32 apart = 16;",
    ),
    Mutant(
        "a mask without its upper lanes",
        "quantize",
        "WHOLE_WARP = 0xffffffffu",
        "WHOLE_WARP = 0x0000ffffu",
    ),
    Mutant(
        "NaN taken for the largest of its row",
        "quantize",
        "largest = fmaxf(largest, fabsf(x[i]))",
        "largest = fabsf(x[i]) <= largest ? largest : fabsf(x[i])",
    ),
    Mutant(
        "rounded toward zero",
        "quantize",
        "__float2int_rn(x[i] * inverse)",
        "(int)(x[i] * inverse)",
    ),
    Mutant(
        "a row of zeros divided by",
        "quantize",
        "const bool tiny = largest < SMALLEST;",
        "const bool tiny = false;",
    ),
    Mutant(
        "scales of all heads in the first head's place",
        "quantize",
        "((u64)head * tokens + place.row) * sizeof(float)",
        "((u64)place.row) * sizeof(float)",
    ),
    Mutant(
        "bytes without their sign",
        "dequantize",
        "(float)(signed char)",
        "(float)(unsigned char)",
    ),
    Mutant(
        "rows without a slot written all the same",
        "dequantize",
        "        if (place.cache == 0) continue;\n        const float scale",
        "        const float scale",
    ),
]


@pytest.fixture(scope="module")
def green(emulator):
    """Run a check on the kernels as they are, once."""
    passed: set[str] = set()

    def run(check: str) -> None:
        if check not in passed:
            for seed in range(CASES):
                CHECKS[check](emulator, np.random.default_rng(seed))
            passed.add(check)

    return run


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_noticed(edited, green, mutant, figures):
    green(mutant.check)

    planted: list[bool] = []

    def plant(source: str) -> str:
        assert source.count(mutant.old) < 2, f"more than one place: {mutant.old}"
        planted.append(mutant.old in source)
        return source.replace(mutant.old, mutant.new)

    emulator, check = edited(plant), CHECKS[mutant.check]
    noticed = None
    for seed in range(CASES):
        try:
            check(emulator, np.random.default_rng(seed))
        except AssertionError as error:  # EmulatorError is one
            noticed = f"{type(error).__name__}: {error}".splitlines()[0][:90]
            break
    assert any(planted), f"no such place: {mutant.old}"
    assert noticed is not None, "nobody noticed"
    figures(f"mutants.{mutant.name}", case=seed, by=noticed)
