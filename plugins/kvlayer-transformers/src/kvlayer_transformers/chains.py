"""The names of what a session has seen lately: a conversation that goes on is not named anew."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap

import numpy as np
import torch
from numpy.typing import NDArray

from kvlayer import Scope
from kvlayer.identity.chain import ChunkChain
from kvlayer.identity.keys import Tokens

__all__ = ["Chains"]

_MOST = 64  # prompts: a batch finds its own again
_MOST_TOKENS = 4_000_000  # some 25 MB
_FIRST_WINDOW = 64


class Chains:
    """Finds the prompt that a new one goes on from; only what follows is packed and hashed.

    Prompts are compared token by token with what the names were made of, so that names of other
    tokens are never taken, whoever wrote into a tensor meanwhile. Of prompts under equal scopes at
    most 64 and 4 million tokens are remembered; those that were used longest ago go first.
    """

    def __init__(self, name: Callable[[Tokens, Scope], ChunkChain]) -> None:
        """``name`` makes a chain from nothing: ``Cache.chain``."""
        self._name = name
        self._known: list[ChunkChain] = []
        """The most recent last."""

    def begin(self) -> None:
        """A request begins: what was named before the cache was rebound is named again.

        Nothing is hashed for that. A request that goes on keeps the names it began with.
        """
        self._known = [
            self._name(chain, chain.scope) if chain.is_stale else chain for chain in self._known
        ]

    def chain(self, ids: torch.Tensor, scope: Scope) -> ChunkChain:
        """The names of one prompt, int64 ``(tokens,)`` on the CPU. Raises ``TokensError``."""
        tokens: NDArray[np.int64] = ids.numpy()
        nearest, shared = None, 0
        for known in reversed(self._known):
            if known.scope == scope and (count := _leading(known.packed, tokens)) > shared:
                nearest, shared = known, count
                if count == min(known.num_tokens, len(tokens)):
                    break
        if nearest is None:
            return self._keep(self._name(_narrow(ids), scope))
        if shared in (len(tokens), nearest.num_tokens):
            self._known.remove(nearest)  # the longer of the two leads to either
        if shared == len(tokens):
            return self._keep(nearest).until(shared)
        return self._keep(nearest.until(shared).grown(_narrow(ids[shared:])))

    def _keep(self, chain: ChunkChain) -> ChunkChain:
        self._known.append(chain)
        while len(self._known) > _MOST or (
            len(self._known) > 1 and sum(c.num_tokens for c in self._known) > _MOST_TOKENS
        ):
            del self._known[0]
        return chain


def _leading(packed: bytes | mmap, tokens: NDArray[np.int64]) -> int:
    """How many tokens a prompt begins with that another is made of."""
    known = np.frombuffer(packed, "<u4")
    most = min(len(known), len(tokens))
    start, width = 0, _FIRST_WINDOW
    while start < most:
        stop = min(start + width, most)
        differ = known[start:stop] != tokens[start:stop]
        if differ.any():
            return start + int(differ.argmax())
        start, width = stop, 4 * width
    return most


def _narrow(ids: torch.Tensor) -> torch.Tensor:
    """Contiguous int32, which the core copies once; ids beyond are its to refuse."""
    fits = not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < 2**31
    return ids.to(torch.int32) if fits else ids
