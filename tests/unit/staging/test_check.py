"""Views, copies and slots that do not fit the layout are refused before any byte moves."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvlayer.abc.stager import HostCopy
from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import (
    DENSE,
    FUSED_HND,
    HND,
    MLA_BLOCKS,
    NHD,
    NHD_PAIR,
    STATE_BLOCKS,
    AttentionKind,
    GroupLayout,
    HitRule,
    KVGroup,
    KVLayout,
    KVView,
)
from kvlayer.payload import Payload
from kvlayer.staging.torch_stager import TorchStager

BF16 = torch.bfloat16
GROUP = KVGroup(AttentionKind.MHA, (0, 1), "bfloat16", 4, 8)
MLA = KVGroup(AttentionKind.MLA, (0, 1), "bfloat16", 1, 8)
STATE = KVGroup(
    AttentionKind.STATE,
    (0, 1),
    "float32",
    state_nbytes=64,
    hit_rule=HitRule.TRAILING,
    window_tokens=1,
)
SLOTS = range(8)


def layout(axes: tuple[str, ...], group: KVGroup = GROUP, **changes: Any) -> KVLayout:
    return KVLayout((GroupLayout(group, axes, 4, **changes),))


def zeros(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **{"dtype": BF16, **options})


def nhd(**options: Any) -> torch.Tensor:
    return zeros(2, 6, 4, 4, 8, **options)


def test_a_view_that_fits_passes_in_every_kind_of_layout() -> None:
    fp8 = replace(GROUP, dtype="fp8_e4m3")
    uneven = replace(GROUP, v_head_size=2)
    good: list[tuple[KVLayout, Any]] = [
        (layout(NHD), nhd()),
        (layout(NHD, heads=(1, 3)), zeros(2, 6, 4, 2, 8)),
        (layout(NHD_PAIR), (zeros(6, 4, 4, 8), zeros(6, 4, 4, 8))),
        (layout(NHD_PAIR), [zeros(6, 4, 4, 8), zeros(6, 4, 4, 8)]),
        (layout(NHD_PAIR, uneven), (zeros(6, 4, 4, 8), zeros(6, 4, 4, 2))),
        (layout(FUSED_HND, uneven), zeros(6, 4, 4, 10)),
        (layout(HND, fp8), zeros(2, 6, 4, 4, 8, dtype=torch.float8_e4m3fn)),
        (layout(HND, fp8), zeros(2, 6, 4, 4, 8, dtype=torch.uint8)),
        (layout(DENSE), (zeros(4, 11, 8), zeros(4, 11, 8))),
        (layout(MLA_BLOCKS, MLA), zeros(6, 4, 8)),
        (layout(STATE_BLOCKS, STATE), zeros(5, 16, dtype=torch.float32)),
        (layout(STATE_BLOCKS, STATE), zeros(5, 32)),
        (layout(NHD, form="native:x"), nhd()),
        (layout(NHD), nhd().requires_grad_()),
    ]
    for declared, cache in good:
        stager = TorchStager(declared)
        for slots in (SLOTS, torch.arange(8), np.arange(8, dtype=np.int32), array("l", SLOTS)):
            stager.check(KVView.single([cache, cache], slots))


BAD_CACHES: list[tuple[str, tuple[str, ...], Callable[[], Any], str]] = [
    ("pair for a tensor", NHD, lambda: (nhd(), nhd()), "expected a torch tensor"),
    ("tensor for a pair", NHD_PAIR, lambda: zeros(6, 4, 4, 8), r"expected a \(K, V\) pair"),
    ("three tensors", NHD_PAIR, lambda: (zeros(6, 4, 4, 8),) * 3, "found a tuple of 3"),
    ("one tensor in a tuple", NHD_PAIR, lambda: (zeros(6, 4, 4, 8),), "found a tuple of 1"),
    ("numpy", NHD, lambda: np.zeros((2, 6, 4, 4, 8)), "found a ndarray"),
    ("numpy in a pair", NHD_PAIR, lambda: (np.zeros(4), np.zeros(4)), "pair of torch tensors"),
    ("rank", NHD, lambda: zeros(6, 4, 4, 8), r"axes \(kv, block, token, head, dim\)"),
    ("kv", NHD, lambda: zeros(1, 6, 4, 4, 8), "expected kv extent 2, found 1"),
    ("heads", NHD, lambda: zeros(2, 6, 4, 3, 8), "expected head extent 4, found 3"),
    ("dim", NHD, lambda: zeros(2, 6, 4, 4, 7), "expected dim extent 8, found 7"),
    ("block size", NHD, lambda: zeros(2, 6, 8, 4, 8), "expected token extent 4, found 8"),
    ("axes swapped", HND, lambda: zeros(2, 6, 8, 4, 4), "expected dim extent 8, found 4"),
    ("kvdim", FUSED_HND, lambda: zeros(6, 4, 4, 8), "expected kvdim extent 16, found 8"),
    ("dtype", NHD, lambda: nhd(dtype=torch.float16), "torch.bfloat16 .*found torch.float16"),
    ("bits of the right size", NHD, lambda: nhd(dtype=torch.int16), "found torch.int16"),
    ("strided rows", NHD, lambda: zeros(2, 6, 4, 4, 16)[..., ::2], "must be contiguous"),
    ("pair of two sizes", NHD_PAIR, lambda: (zeros(6, 4, 4, 8), zeros(5, 4, 4, 8)), "6 blocks"),
    ("device", NHD, lambda: nhd(device="meta"), "expected all tensors on cpu, found one on meta"),
]


@pytest.mark.parametrize(
    ("axes", "bad", "message"), [c[1:] for c in BAD_CACHES], ids=[c[0] for c in BAD_CACHES]
)
def test_a_cache_that_does_not_fit_is_refused_and_the_message_says_why(
    axes: tuple[str, ...], bad: Callable[[], Any], message: str
) -> None:
    pair = (zeros(6, 4, 4, 8), zeros(6, 4, 4, 8))
    good = {NHD: nhd(), NHD_PAIR: pair, FUSED_HND: zeros(6, 4, 4, 16)}
    first = good.get(axes, zeros(2, 6, 4, 4, 8))
    stager = TorchStager(layout(axes))
    with pytest.raises(LayoutError, match=message) as caught:
        stager.check(KVView.single([first, bad()], SLOTS))
    assert "layer 1" in str(caught.value)


@pytest.mark.parametrize(
    ("group", "axes", "shape", "message"),
    [
        (MLA, ("kv", "block", "token", "dim"), (2, 6, 4, 8), "has no V"),
        (MLA, ("block", "dim"), (6, 8), r"needs axes \(block, dim, token\)"),
        (GROUP, ("kv", "head", "dim"), (2, 4, 8), "neither a block nor a token axis"),
        (GROUP, ("kv", "block", "token", "dim"), (2, 6, 4, 8), "expected head extent 4, found 1"),
        (replace(GROUP, v_head_size=2), NHD, (2, 6, 4, 4, 8), "equal K and V head sizes"),
        (STATE, ("block", "dim"), (6, 32), "a state group cannot be block, dim"),
        (STATE, ("state",), (32,), r"needs axes \(block, state\)"),
        (STATE, STATE_BLOCKS, (6, 31), "expected state extent 32, found 31"),
    ],
)
def test_axes_that_cannot_describe_the_group_are_refused(
    group: KVGroup, axes: tuple[str, ...], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        TorchStager(layout(axes, group)).check(KVView.single([zeros(*shape)] * 2, SLOTS))


def test_a_native_block_must_be_one_run_of_bytes() -> None:
    stager = TorchStager(layout(HND, form="native:x"))
    with pytest.raises(LayoutError, match="contiguous blocks, but axis token") as caught:
        stager.check(KVView.single([nhd().transpose(2, 3)] * 2, SLOTS))
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("slots", "found"),
    [
        ([0, 1], "a list of 2"),
        (None, "a NoneType"),
        (torch.zeros(2, 2, dtype=torch.int64), "a 2-D tensor"),
        (torch.zeros(2), "torch.float32"),
        (np.zeros(2, dtype=np.int16), "format 'h'"),
        (np.zeros((2, 1), dtype=np.int64), "a 2-D buffer"),
        (np.zeros(2, dtype=np.uint32), "format 'I'"),
        (b"12345678", "format 'B'"),
    ],
)
def test_slots_of_another_kind_are_refused(slots: Any, found: str) -> None:
    stager = TorchStager(layout(NHD))
    with pytest.raises(LayoutError, match="1-D int32 or int64 buffer or a range") as caught:
        stager.check(KVView.single([nhd(), nhd()], slots))
    assert found in str(caught.value)


def test_counts_of_groups_layers_and_tokens_must_agree() -> None:
    one = layout(NHD)
    two = KVLayout((one.groups[0], layout(MLA_BLOCKS, MLA).groups[0]))
    mha, mla = [nhd(), nhd()], [zeros(6, 4, 8)] * 2
    for declared, view, message in (
        (one, KVView.single(mha[:1], SLOTS), "expected 2 layers"),
        (two, KVView((mha,), (SLOTS, SLOTS)), r"expected caches of 2 KV group\(s\), found 1"),
        (two, KVView((mha, mla), (SLOTS,)), r"expected slots of 2 KV group\(s\), found 1"),
        (two, KVView((mha, mla), (SLOTS, range(7))), "group 1 cover 7 tokens"),
        (two, KVView((mla, mha), (SLOTS, SLOTS)), "group 0 layer 0"),
    ):
        with pytest.raises(LayoutError, match=message):
            TorchStager(declared).check(view)
    TorchStager(two).check(KVView((mha, mla), (SLOTS, SLOTS)))


@pytest.mark.parametrize("ready", [0, 4096, "event", object()])
def test_what_is_no_event_is_refused_as_one(ready: Any) -> None:
    view = replace(KVView.single([nhd(), nhd()], SLOTS), ready=ready)
    with pytest.raises(LayoutError, match=r"expected ready to be a recorded event, found .*"):
        TorchStager(layout(NHD)).check(view)


def test_a_cache_that_was_reallocated_is_looked_at_again() -> None:
    stager = TorchStager(layout(NHD))
    cache = nhd()
    view = KVView.single([cache, cache], SLOTS)
    stager.check(view)
    cache.resize_(2, 6, 4, 8, 4)
    with pytest.raises(LayoutError, match="expected dim extent 8, found 4"):
        stager.check(view)


PAYLOAD = Payload.of(GROUP, Part(0, (0, 2), (0, 4)), 8)


def copy(**changes: Any) -> HostCopy:
    payload = changes.pop("payload", PAYLOAD)
    fields = {"host": memoryview(bytearray(payload.nbytes)), "first": 0, "tokens": 8, **changes}
    return HostCopy(payload, **fields)


def payload(part: Part, group: KVGroup = GROUP, tokens: int = 8) -> Payload:
    return Payload.of(group, part, tokens)


BAD_COPIES: list[tuple[str, HostCopy, str]] = [
    ("beyond the view", copy(first=1), "tokens 1..9 of a view that covers 8"),
    ("before the view", copy(first=-1), "cannot be negative"),
    ("beyond the payload", copy(tokens=8, skip=1), "8 tokens after 1 skipped"),
    ("short host", copy(host=memoryview(bytearray(64))), "found 64"),
    ("strided host", copy(host=memoryview(bytearray(1 << 16))[::2]), "contiguous bytes"),
    ("no such group", copy(payload=payload(Part(1, (0, 2), (0, 4)))), "the layout has 1 KV group"),
    ("native", copy(payload=payload(Part(0, (0, 2), (0, 4), "native:x"))), "form native:x"),
    (
        "another group",
        copy(payload=payload(Part(0, (0, 2), (0, 4)), replace(GROUP, head_size=16))),
        "another KV group",
    ),
]


@pytest.mark.asyncio
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize(
    ("bad", "message"), [c[1:] for c in BAD_COPIES], ids=[c[0] for c in BAD_COPIES]
)
async def test_one_bad_copy_refuses_the_call_before_any_byte_moves(
    bad: HostCopy, message: str, gather: bool
) -> None:
    stager = TorchStager(layout(NHD))
    good = copy(host=memoryview(bytearray(b"\x01" * PAYLOAD.nbytes)))
    kv = [nhd(), nhd()]
    call = stager.gather if gather else stager.scatter
    with pytest.raises(LayoutError, match=message):
        await call(KVView.single(kv, SLOTS), [good, bad])
    await stager.aclose()
    assert not any(t.any() for t in kv)
    assert bytes(good.host) == b"\x01" * PAYLOAD.nbytes


@pytest.mark.asyncio
async def test_native_parts_of_other_heads_are_refused() -> None:
    stager = TorchStager(layout(NHD, form="native:x"))
    bad = copy(payload=payload(Part(0, (0, 2), (0, 2), "native:x")))
    with pytest.raises(LayoutError, match="all or none"):
        await stager.scatter(KVView.single([nhd(), nhd()], SLOTS), [bad])
    await stager.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("slot", [24, 2**40, -2, -(2**40)])
@pytest.mark.parametrize("axes", [NHD, HND])
async def test_a_slot_outside_the_tensors_is_refused(
    slot: int, gather: bool, axes: tuple[str, ...]
) -> None:
    stager = TorchStager(layout(axes))
    view = KVView.single([nhd(), nhd()], array("q", [*range(7), slot]))
    with pytest.raises(LayoutError, match=rf"slot {slot} is outside 0\.\.24"):
        await (stager.gather if gather else stager.scatter)(view, [copy()])
    await stager.aclose()


@pytest.mark.asyncio
async def test_a_token_without_a_slot_cannot_be_gathered() -> None:
    stager = TorchStager(layout(NHD))
    view = KVView.single([nhd(), nhd()], array("q", [-1, -1, *range(2, 8)]))
    with pytest.raises(LayoutError, match="2 of 8 tokens to gather have no slot"):
        await stager.gather(view, [copy()])
    with pytest.raises(LayoutError, match="read-only"):
        await stager.gather(view, [copy(host=memoryview(bytes(PAYLOAD.nbytes)))])
    with pytest.raises(LayoutError, match="7 tokens after 0 skipped"):
        await stager.gather(view, [copy(tokens=7)])
    await stager.aclose()
