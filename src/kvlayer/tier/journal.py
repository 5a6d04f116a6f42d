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
    """Losses by end hash and tokens, and for recent stores what else began the same way.

    ``limit`` bounds each of its maps; tokens are kept for ``limit // 16`` chunks (1 KiB each for
    256 tokens), so the default stays under some 10 MiB.
    """

    def __init__(self, limit: int = 65536) -> None:
        self._losses: _Recent[tuple[bytes, int], Loss] = _Recent(limit)
        self._children: _Recent[bytes, tuple[bytes, bytes]] = _Recent(max(limit // 16, 1))
        self._unscoped: _Recent[bytes, tuple[bytes, str]] = _Recent(limit)

    def lost(self, end_hash: bytes, tokens: int, loss: Loss) -> None:
        """An object of this span is gone."""
        self._losses[end_hash, tokens] = loss

    def stored(self, chain: ChunkChain, spans: list[Span]) -> None:
        """These spans were stored."""
        prints, scope = chain.fingerprints(), describe(chain)
        for span in spans:
            self._losses.pop((span.hash, span.tokens))
            self._children[chain.parent(span.start)] = (span.hash, chain.token_bytes(span))
            index = span.start // chain.chunk_step
            if index < len(prints) and span.tokens == chain.chunk_step:
                self._unscoped[prints[index]] = (span.hash, scope)

    def loss(self, span: Span) -> Loss | None:
        return self._losses.get((span.hash, span.tokens))

    def elsewhere(self, chain: ChunkChain, index: int) -> str | None:
        """Under which other scope the tokens of chunk ``index`` were stored lately, in words."""
        prints = chain.fingerprints()
        found = self._unscoped.get(prints[index]) if index < len(prints) else None
        return None if found is None or found[0] == chain.hashes[index] else found[1]

    def divergence(self, chain: ChunkChain, start: int) -> int | None:
        """First token at which what was stored last from ``start`` on differs from this prompt."""
        found = self._children.get(chain.parent(start))
        if found is None:
            return None
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
