"""Layouts an engine may have, and a prompt's copies in them, by chance."""

from __future__ import annotations

import random

from kvlayer.abc.stager import HostCopy
from kvlayer.identity.keys import Part
from kvlayer.layout import (
    FUSED_HND,
    HND,
    MLA_BLOCKS,
    NHD,
    NHD_BLOCK_FIRST,
    NHD_PAIR,
    STATE_BLOCKS,
    AttentionKind,
    GroupLayout,
    KVGroup,
    KVLayout,
)
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload

__all__ = ["random_copies", "random_layout"]


def random_layout(rng: random.Random) -> KVLayout:
    """One or two groups an engine may have, and a rank that holds all of them or some."""
    groups: list[GroupLayout] = []
    per_block = rng.choice([2, 4, 8])
    for first in range(rng.randint(1, 2)):
        kind = rng.choice([AttentionKind.MHA] * 4 + [AttentionKind.MLA, AttentionKind.STATE])
        layers = tuple(range(first * 10, first * 10 + rng.randint(1, 4)))
        dtype = rng.choice(["bfloat16", "float16", "float32", "fp8_e4m3", "int8"])
        if kind is AttentionKind.STATE:
            group = KVGroup(kind, layers, dtype, state_nbytes=rng.choice([48, 400]))
            groups.append(GroupLayout(group, STATE_BLOCKS, per_block))
            continue
        if kind is AttentionKind.MLA:
            group = KVGroup(kind, layers, dtype, head_size=rng.choice([12, 20]))
            groups.append(GroupLayout(group, MLA_BLOCKS, per_block))
            continue
        heads = rng.choice([1, 2, 4])
        axes = rng.choice([NHD, NHD_BLOCK_FIRST, NHD_PAIR, HND, FUSED_HND])
        odd = rng.choice([None, 6]) if axes in (NHD_PAIR, FUSED_HND) else None
        group = KVGroup(kind, layers, dtype, heads, rng.choice([3, 4, 8, 16]), odd)
        share = rng.choice([None, (0, 1), (heads - 1, heads)])
        form = rng.choice(["canonical", "canonical", "native:x"])
        groups.append(GroupLayout(group, axes, per_block, None, share, form))
    return KVLayout(tuple(groups))


def random_copies(rng: random.Random, layout: KVLayout, slab: Slab, tokens: int) -> list[HostCopy]:
    """A prompt in chunks of 16 tokens, some in two parts of its layers; the last one is a tail."""
    copies: list[HostCopy] = []
    at = 0
    for index, held in enumerate(layout.groups):
        heads = held.head_range if held.group.kind is AttentionKind.MHA else None
        for first in range(0, tokens, 16):
            count = min(16, tokens - first)
            low, high = held.layer_range
            middle = rng.choice([low, low, rng.randrange(low, high)])
            for layers in filter(len, (range(low, middle), range(middle, high))):
                part = Part(index, (layers.start, layers.stop), heads, held.form)
                payload = Payload.of(held.group, part, count)
                copies.append(HostCopy(payload, slab.view(at, payload.nbytes), first, count))
                at += payload.nbytes
    rng.shuffle(copies)
    return copies
