"""How many objects a lookup asks a shared tier about. Counted: every run says the same."""

from __future__ import annotations

from array import array

from kvlayer._steps import finish
from kvlayer.bench.measure import Row
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ChunkChain, Scope
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout
from kvlayer.tier.planner.planner import Planner

__all__ = ["question_rows"]

_TOKENS = 131_072
_NAMESPACE = "ab" * 32
_CHUNK = 256
_LINK = 32
_GROUP = KVGroup(AttentionKind.MHA, (0,), "bfloat16", 1, 1)
_LAYOUT = KVLayout.single(_GROUP, NHD, tokens_per_block=_CHUNK)


async def question_rows() -> list[Row]:
    """``questions.cold``: keys asked about for a prompt of 131,072 tokens that nobody holds.

    ``questions.warm``: where the tier holds all of it, and this process knows nothing.
    """
    return [
        Row("questions.cold", _asked(holds=False), "keys"),
        Row("questions.warm", _asked(holds=True), "keys"),
    ]


def _asked(*, holds: bool) -> int:
    planner = Planner(
        _NAMESPACE,
        _LAYOUT,
        tiers=("host", "shared"),
        capacity=1 << 20,
        policy=PrefixLRU,
        tokens_per_chunk=_CHUNK,
        tokens_per_tail=_LINK,
        clock=lambda: 0.0,
        wall_clock=lambda: 0.0,
    )
    chain = ChunkChain(
        array("i", range(_TOKENS)), Scope(), tokens_per_chunk=_CHUNK, tokens_per_tail=_LINK
    ).named_in(_NAMESPACE)
    search = planner.search(planner.match(chain), every=False)
    count = 0
    while asked := finish(planner.questions(search, 1 << 1, 0.0)):
        for tier, keys in asked:
            count += len(keys)
            if holds:
                planner.note([key for key in keys if key.tokens == _CHUNK], tier)
    return count
