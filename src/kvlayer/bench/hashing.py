"""How fast a prompt is named, beside a bare sha256 chain over the same bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kvlayer.bench.measure import Row, alternate, seconds_of
from kvlayer.bench.prompts import bare_chain, prompt
from kvlayer.identity.keys import ChunkChain, Scope

__all__ = ["hash_rows"]

_TOKENS = 32_768
_CHUNK = 256
_PUBLIC = Scope()


def _name(tokens: Sequence[int]) -> None:
    ChunkChain(tokens, _PUBLIC, tokens_per_chunk=_CHUNK, tokens_per_tail=_CHUNK // 8)


async def hash_rows(rounds: int) -> list[Row]:
    """``hash.int32``, ``hash.int64``, ``hash.list``: seconds to name 32,768 tokens."""
    ids = prompt(_TOKENS, seed=0)
    packed = ids.tobytes()
    kinds: dict[str, Sequence[int]] = {
        "hash.int32": ids,
        "hash.int64": array("q", ids),
        "hash.list": ids.tolist(),
    }
    rows: list[Row] = []
    for name, tokens in kinds.items():

        async def subject(_: int, tokens: Sequence[int] = tokens) -> float:
            return seconds_of(lambda: _name(tokens))

        own, top = await alternate(
            subject,
            lambda: seconds_of(lambda: bare_chain(packed, 4 * _CHUNK)),
            rounds=20 * rounds,
            warm=6,
        )
        rows.append(Row(name, own, "s", top))
    return rows
