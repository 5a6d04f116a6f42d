"""A bounded memory of what happened to objects, so that a miss can be explained. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvlayer.keys import ChunkChain, Span
from kvlayer.results import Cause

__all__ = ["Journal", "Loss"]

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Loss:
    """Why an object stopped being there, where and when (Unix seconds)."""

    cause: Cause
    tier: str
    when: float
    detail: str


class _Recent(Generic[K, V]):
    """A mapping that keeps the ``limit`` entries set last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __setitem__(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def get(self, key: K) -> V | None:
        return self._entries.get(key)

    def pop(self, key: K) -> None:
        self._entries.pop(key, None)


class Journal:
    """Losses by chunk hash, and for recent stores what else began the same way.

    ``limit`` bounds each of its maps; tokens are kept for ``limit // 16`` chunks (1 KiB each for
    256 tokens), so the default stays under some 10 MiB.
    """

    def __init__(self, limit: int = 65536) -> None:
        self._losses: _Recent[bytes, Loss] = _Recent(limit)
        self._children: _Recent[bytes, tuple[bytes, bytes]] = _Recent(max(limit // 16, 1))
        self._unscoped: _Recent[bytes, tuple[bytes, str]] = _Recent(limit)

    def lost(self, chunk_hash: bytes, loss: Loss) -> None:
        """An object of this chunk is gone."""
        self._losses[chunk_hash] = loss

    def stored(self, chain: ChunkChain, spans: list[Span], plain: list[bytes] | None) -> None:
        """These spans were stored. ``plain``: hashes the full chunks have without any scope."""
        for span in spans:
            self._losses.pop(span.hash)
            index = span.start // chain.chunk_step
            self._children[chain.parent(index)] = (span.hash, chain.token_bytes(span))
            if plain is None:
                self._unscoped[span.hash] = (span.hash, "no salt, adapter or content")
            elif index < len(plain):
                self._unscoped[plain[index]] = (span.hash, describe(chain))

    def loss(self, chunk_hash: bytes) -> Loss | None:
        return self._losses.get(chunk_hash)

    def elsewhere(self, plain: bytes, chunk_hash: bytes) -> str | None:
        """Under which other scope the same tokens were stored lately, in words."""
        found = self._unscoped.get(plain)
        return None if found is None or found[0] == chunk_hash else found[1]

    def divergence(self, chain: ChunkChain, index: int) -> int | None:
        """First token at which the last stored sibling of chunk ``index`` differs from it."""
        found = self._children.get(chain.parent(index))
        if found is None:
            return None
        start = index * chain.chunk_step
        mine = chain.token_bytes(Span(start, min(start + chain.chunk_step, chain.num_tokens), b""))
        theirs = found[1]
        for at in range(0, min(len(mine), len(theirs)), 4):
            if mine[at : at + 4] != theirs[at : at + 4]:
                return start + at // 4
        return None


def describe(chain: ChunkChain) -> str:
    """A scope in words, without its secrets."""
    scope = chain.scope
    words = [f"salt of zone {s.zone[:8]} from token {s.first_token}" for s in scope.salts]
    if scope.adapter:
        words.append(f"adapter {scope.adapter.hex()[:8]}")
    words += [f"content {c.digest.hex()[:8]} at token {c.first_token}" for c in scope.contents]
    return ", ".join(words) or "no salt, adapter or content"
