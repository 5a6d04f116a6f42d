"""A bounded memory of what happened to objects, so that a miss can be explained. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from sys import intern
from typing import TypeAlias

from kvlayer.identity.keys import PUBLIC_ZONE, ChunkChain, Span
from kvlayer.results import Cause
from kvlayer.tier.planner.recent import Recent

__all__ = ["Journal", "Loss"]


@dataclass(frozen=True, slots=True)
class Loss:
    """Why an object stopped being there, where and when (Unix seconds)."""

    cause: Cause
    tier: str
    when: float
    detail: str


class Journal:
    """Losses by span, and for recent stores what else began the same way.

    A span is named by its namespace, end hash and tokens. What is known of one namespace is told to
    nobody who asks for another.

    Nobody learns of another's data here, not even that there is some. What is remembered of a store
    is told to the owner that stored, under the salts it was stored under; what nobody is known to
    have stored (another process did) to who holds its salt, and without one to who names no owner.
    One owner's stores change no answer to another.

    ``limit`` bounds each of its maps; tokens are kept for ``limit // 16`` chunks (1 KiB each for
    256 tokens), so the default stays under some 20 MiB.
    """

    def __init__(self, limit: int = 65536) -> None:
        self._losses: Recent[_Name, Loss] = Recent(limit)
        self._stored: Recent[_Name, None] = Recent(limit)
        """Spans that somebody has stored, lately."""
        self._owners: Recent[tuple[str, bytes, int, str], None] = Recent(limit)
        """The same, with who it was: a span may have any number of owners."""
        self._children: Recent[tuple[bytes, _View], bytes] = Recent(max(limit // 16, 1))
        self._unscoped: Recent[tuple[bytes, _View], tuple[bytes, str]] = Recent(limit)

    def lost(self, namespace: str, end_hash: bytes, tokens: int, loss: Loss) -> None:
        """An object of this span is gone."""
        self._losses[intern(namespace), end_hash, tokens] = loss

    def stored(self, chain: ChunkChain, spans: Sequence[Span], known: Iterable[Span] = ()) -> None:
        """These spans were stored; ``known`` ones were there already, and are the owner's too."""
        told = (*spans, *known)
        places = [span.start // chain.chunk_step for span in told]
        first, last = min(places, default=0), max(places, default=-1)
        prints, scope, owner = (
            chain.fingerprints(last + 1, first),
            describe(chain),
            chain.scope.owner,
        )
        for span in told:
            name = _name(chain, span)
            self._stored[name] = None
            self._owners[*name, owner] = None
            view = chain.namespace, owner, chain.zones_before(span.stop)
            self._children[chain.parent(span.start), view] = chain.token_bytes(span)
            index = span.start // chain.chunk_step - first
            if index < len(prints) and span.tokens == chain.chunk_step:
                self._unscoped[prints[index], view] = (span.hash, scope)
        for span in spans:
            self._losses.pop(_name(chain, span))

    def is_own(self, chain: ChunkChain, span: Span) -> bool:
        """Whether whoever asks about the prompt may be told of this span."""
        name, owner = _name(chain, span), chain.scope.owner
        if name not in self._stored:
            return not owner or chain.zone(span) != PUBLIC_ZONE
        return (*name, owner) in self._owners

    def loss(self, chain: ChunkChain, span: Span) -> Loss | None:
        """How the span was lost, as far as it is the asker's."""
        return self._losses.get(_name(chain, span)) if self.is_own(chain, span) else None

    def elsewhere(self, chain: ChunkChain, index: int) -> str | None:
        """Under which other scope its owner stored the tokens of chunk ``index``, in words."""
        prints = chain.fingerprints(index + 1, index)
        if not prints:
            return None
        for view in _views(chain):
            found = self._unscoped.get((prints[0], view))
            if found is not None and found[0] != chain.hashes[index]:
                return found[1]
        return None

    def divergence(self, chain: ChunkChain, start: int) -> int | None:
        """First token at which what its owner stored last from ``start`` on differs from it."""
        parent = chain.parent(start)
        theirs = next(
            (f for view in _views(chain) if (f := self._children.get((parent, view)))), b""
        )
        mine = chain.token_bytes(Span(start, min(start + chain.chunk_step, chain.num_tokens), b""))
        for at in range(0, min(len(mine), len(theirs)), 4):
            if mine[at : at + 4] != theirs[at : at + 4]:
                return start + at // 4
        return None


_Name: TypeAlias = tuple[str, bytes, int]
"""Which span: its namespace, end hash and tokens."""

_View: TypeAlias = tuple[str, str, tuple[str, ...]]
"""Who may be told: who asks for a namespace, an owner, and with zones whose salts must be
presented, in their order."""


def _name(chain: ChunkChain, span: Span) -> _Name:
    return chain.namespace, span.hash, span.tokens


def _views(chain: ChunkChain) -> list[_View]:
    """What whoever asks about a prompt may see: with all of its salts first, without any last."""
    zones = chain.zones_before(chain.num_tokens)
    return [
        (chain.namespace, chain.scope.owner, zones[:count]) for count in range(len(zones), -1, -1)
    ]


def describe(chain: ChunkChain) -> str:
    """A scope in words, without its secrets."""
    scope = chain.scope
    words = [f"salt of zone {s.zone[:8]} from token {s.first_token}" for s in scope.salts]
    if scope.adapter:
        words.append(f"adapter {scope.adapter.hex()[:8]}")
    words += [f"content {c.digest.hex()[:8]} at token {c.first_token}" for c in scope.contents]
    return ", ".join(words) or "no salt, adapter or content"
