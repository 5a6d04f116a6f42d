"""How fast a prompt is named, beside a bare sha256 chain over the same bytes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from hashlib import sha256

from kvlayer.bench.measure import Row, alternate, seconds_of
from kvlayer.keys import ChunkChain, Scope

__all__ = ["hash_rows"]

_TOKENS = 32_768
_CHUNK = 256
_PUBLIC = Scope()


def _name(tokens: Sequence[int]) -> None:
    ChunkChain(tokens, _PUBLIC, tokens_per_chunk=_CHUNK, tokens_per_tail=_CHUNK // 8)


def _bare_chain(packed: bytes) -> None:
    parent = b""
    for start in range(0, len(packed), 4 * _CHUNK):
        state = sha256(parent)
        state.update(packed[start : start + 4 * _CHUNK])
        parent = state.digest()


async def hash_rows(rounds: int) -> list[Row]:
    """``hash.int32``, ``hash.int64``, ``hash.list`` in tokens/s."""
    rng = random.Random(0)  # noqa: S311  # tokens, not keys
    ids = [rng.randrange(128_000) for _ in range(_TOKENS)]
    packed = array("I", ids).tobytes()
    kinds: dict[str, Sequence[int]] = {
        "hash.int32": array("i", ids),
        "hash.int64": array("q", ids),
        "hash.list": ids,
    }
    rows: list[Row] = []
    for name, tokens in kinds.items():

        async def subject(_: int, tokens: Sequence[int] = tokens) -> float:
            return seconds_of(lambda: _name(tokens))

        own, top = await alternate(
            subject, lambda: seconds_of(lambda: _bare_chain(packed)), rounds=10 * rounds, warm=3
        )
        rows.append(Row(name, _TOKENS / own, "tokens/s", _TOKENS / top))
    return rows
