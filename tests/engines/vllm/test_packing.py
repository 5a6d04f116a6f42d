"""Blocks as vLLM's CPU attention packs them, against vLLM's own write op."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from vllm_processor import needs

from kvlayer import AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.abc.stager import HostCopy
from kvlayer.errors import LayoutError, UnsupportedError
from kvlayer.identity.keys import Part
from kvlayer.layout import FUSED_HND
from kvlayer.payload import Payload
from kvlayer_vllm.packed_stager import PackedStager
from kvlayer_vllm.packing import pack_k, pack_v, unpack_k, unpack_v

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
CASES = [
    ("amx", torch.bfloat16, 32, 64),
    ("amx", torch.bfloat16, 128, 128),
    ("vec", torch.bfloat16, 32, 64),
    ("vec", torch.float16, 64, 32),
    ("vec", torch.float32, 32, 64),
    ("vec", torch.float32, 128, 96),
    ("vec16", torch.float32, 32, 80),
    ("vec16", torch.bfloat16, 32, 80),
]
# What the engine's own op has to write; packing and unpacking alone run anywhere.
WRITTEN = [
    pytest.param("amx", torch.bfloat16, marks=needs("amx")),
    ("vec", torch.bfloat16),
    ("vec", torch.float32),
]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Any:
    """Random bits without NaNs, which the engine's op may rewrite."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)


def written(k: Any, v: Any, slots: Any, cache: Any, isa: str) -> None:
    """Write keys and values ``(token, head, dim)`` as the engine does."""
    from vllm import _custom_ops

    blocks, heads, tokens, _ = cache.shape
    k_cache, v_cache = cache.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(
        k, v, k_cache, v_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )


@pytest.mark.parametrize(
    ("isa", "dtype", "tokens", "dim"),
    [pytest.param(*case, marks=needs(case[0])) for case in CASES],
)
def test_packing_is_what_the_engine_writes(
    isa: str, dtype: torch.dtype, tokens: int, dim: int
) -> None:
    heads = 3
    k, v = (values((tokens, heads, dim), dtype, seed) for seed in (1, 2))
    cache = torch.zeros((4, heads, tokens, 2 * dim), dtype=dtype)
    written(k, v, torch.arange(tokens) + 2 * tokens, cache, isa)
    flat = cache[2].reshape(heads, 2, tokens * dim)
    assert torch.equal(pack_k(k.transpose(0, 1), isa), flat[:, 0])
    assert torch.equal(pack_v(v.transpose(0, 1), isa), flat[:, 1])
    assert torch.equal(unpack_k(flat[:, 0], isa, tokens), k.transpose(0, 1))
    assert torch.equal(unpack_v(flat[:, 1], isa, tokens), v.transpose(0, 1))
    assert not torch.equal(flat[:, 0], k.transpose(0, 1).reshape(heads, -1))  # it is packed


@pytest.mark.parametrize(("isa", "dtype"), [("amx", torch.bfloat16), ("vec", torch.float32)])
def test_packing_keeps_every_bit_pattern(isa: str, dtype: torch.dtype) -> None:
    bits = BITS[dtype]
    info = torch.iinfo(bits)
    raw = torch.randint(info.min, info.max, (2, 32, 64), dtype=bits).view(dtype)
    for pack, unpack in ((pack_k, unpack_k), (pack_v, unpack_v)):
        assert torch.equal(unpack(pack(raw, isa), isa, 32).view(bits), raw.view(bits))


class Rank:
    """Packed tensors, and the same keys and values in rows."""

    def __init__(self, isa: str, dtype: torch.dtype, *, heads: tuple[int, int] = (0, 4)) -> None:
        self.isa, self.dtype, self.size, self.dim, self.layers = isa, dtype, 32, 64, 2
        self.heads = heads
        self.group = KVGroup(AttentionKind.MHA, (0, 1), NAMES[dtype], 4, self.dim)
        self.layout = KVLayout.single(self.group, FUSED_HND, tokens_per_block=32, heads=heads)
        count = heads[1] - heads[0]
        self.caches = [
            torch.zeros((16, count, self.size, 2 * self.dim), dtype=dtype) for _ in range(2)
        ]

    def fill(self, slots: Any, rows: Any) -> None:
        """``rows[layer][K|V]`` is (token, all heads, dim)."""
        lo, hi = self.heads
        for cache, (k, v) in zip(self.caches, rows, strict=True):
            written(k[:, lo:hi].contiguous(), v[:, lo:hi].contiguous(), slots, cache, self.isa)

    def view(self, slots: Any) -> KVView:
        return KVView.single(self.caches, slots)

    def stager(self) -> PackedStager:
        return PackedStager(self.layout, [self.isa])


def rows_of(tokens: int, dtype: torch.dtype) -> list[tuple[Any, Any]]:
    shape = (tokens, 4, 64)
    return [(values(shape, dtype, 2 * i), values(shape, dtype, 2 * i + 1)) for i in range(2)]


def copy_of(rank: Rank, tokens: int, first: int, *, skip: int = 0, heads: Any = None) -> HostCopy:
    part = Part(0, (0, 2), heads or rank.heads)
    payload = Payload.of(rank.group, part, tokens)
    return HostCopy(payload, memoryview(bytearray(payload.nbytes)), first, tokens - skip, skip)


@pytest.mark.parametrize(("isa", "dtype"), WRITTEN)
def test_a_payload_is_canonical_whatever_the_packing(isa: str, dtype: torch.dtype) -> None:
    """Chunks begin and end inside blocks, blocks are anywhere."""
    rank, other = Rank(isa, dtype), Rank(isa, dtype)
    slots = (torch.tensor([9, 2, 14, 5])[:, None] * 32 + torch.arange(32)).reshape(-1)[:104]
    rows = rows_of(104, dtype)
    rank.fill(slots, rows)
    copies = [copy_of(rank, 40, 0), copy_of(rank, 40, 40), copy_of(rank, 24, 80)]

    async def there_and_back() -> None:
        stager = rank.stager()
        await stager.gather(rank.view(slots), copies)
        await stager.scatter(other.view(slots), copies)
        await stager.aclose()

    asyncio.run(there_and_back())
    for copy in copies:
        payload = copy.payload
        for layer, (k, v) in enumerate(rows):
            at = payload.layer_offset(layer)
            flat = torch.frombuffer(
                copy.host, dtype=dtype, count=payload.layer_nbytes // k.element_size(), offset=at
            ).view(2, 4, payload.tokens, 64)
            part = slice(copy.first, copy.first + payload.tokens)
            assert torch.equal(flat[0], k[part].transpose(0, 1))
            assert torch.equal(flat[1], v[part].transpose(0, 1))
    for cache, same in zip(rank.caches, other.caches, strict=True):
        held = torch.tensor([9, 2, 14])
        assert torch.equal(cache[held], same[held])
    again = Rank(isa, dtype)
    again.fill(slots, rows)
    assert all(map(torch.equal, again.caches, other.caches))


@pytest.mark.parametrize(("isa", "dtype"), WRITTEN)
def test_what_is_scattered_into_part_of_a_block_leaves_the_rest_alone(
    isa: str, dtype: torch.dtype
) -> None:
    rank = Rank(isa, dtype)
    slots = torch.arange(64)
    old = rows_of(64, dtype)
    new = [(-k, -v) for k, v in old]
    rank.fill(slots, old)
    source = Rank(isa, dtype)
    source.fill(slots, new)
    copy = copy_of(rank, 64, 0)
    late = HostCopy(copy.payload, copy.host, 0, 40, 10)

    async def part() -> None:
        stager = rank.stager()
        await stager.gather(source.view(slots), [copy])
        holes = slots[10:50].clone()
        holes[:3] = -1
        await stager.scatter(rank.view(holes), [late])
        await stager.aclose()

    asyncio.run(part())
    expected = Rank(isa, dtype)
    expected.fill(slots, old)
    expected.fill(slots[13:50], [(k[13:50], v[13:50]) for k, v in new])
    assert all(map(torch.equal, rank.caches, expected.caches))


def test_ranks_with_half_the_heads_read_what_one_with_all_has_stored() -> None:
    whole = Rank("vec", torch.float32)
    slots = torch.arange(64)
    rows = rows_of(64, torch.float32)
    whole.fill(slots, rows)
    copy = copy_of(whole, 64, 0)
    halves = [Rank("vec", torch.float32, heads=heads) for heads in ((0, 2), (2, 4))]

    async def share() -> None:
        stager = whole.stager()
        await stager.gather(whole.view(slots), [copy])
        for half in halves:
            await half.stager().scatter(half.view(slots), [copy])

    asyncio.run(share())
    for half in halves:
        expected = Rank("vec", torch.float32, heads=half.heads)
        expected.fill(slots, rows)
        assert all(map(torch.equal, half.caches, expected.caches))


def test_slots_out_of_order_and_unknown_packings_are_refused() -> None:
    rank = Rank("amx", torch.bfloat16)
    with pytest.raises(LayoutError, match="each block in order"):
        asyncio.run(
            rank.stager().scatter(rank.view(torch.arange(32).flip(0)), [copy_of(rank, 32, 0)])
        )
    with pytest.raises(LayoutError, match="have no slot"):
        asyncio.run(rank.stager().gather(rank.view(torch.full((32,), -1)), [copy_of(rank, 32, 0)]))
    with pytest.raises(UnsupportedError, match="'neon'"):
        PackedStager(rank.layout, ["neon"])
