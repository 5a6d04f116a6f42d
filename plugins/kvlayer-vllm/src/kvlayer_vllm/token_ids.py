"""A request's token ids as the cache takes them: converted and named once, in slices if many.

The engine keeps them as a list, of which a thousand take 25 microseconds to convert.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvlayer import Scope
from kvlayer.identity.chain import ChunkChain
from kvlayer.identity.keys import Tokens

__all__ = ["TokenIds"]

_SLICE = 4096
"""Tokens that are converted while nobody else runs."""
_NAMED_AT_ONCE = 65_536
"""Tokens that are named while nobody else runs: about a millisecond."""

Name: TypeAlias = Callable[[Tokens, Scope], ChunkChain]
"""``Cache.chain``."""


class TokenIds:
    """Grows with ``source``. In any thread; what it gives is read only.

    A source that is cut is converted anew. ``is_rewritten``: all of it is, each time; vLLM discards
    what a session's turn has sampled last, and goes on from there.
    """

    def __init__(self, source: Sequence[int], *, is_rewritten: bool = False) -> None:
        self._source = source
        self._is_rewritten = is_rewritten
        self._known = array("i")
        self._chain: ChunkChain | None = None

    def upto(self, stop: int) -> array[int]:
        """The first ``stop`` tokens, or all where there are fewer."""
        known, length = self._known, len(self._source)
        if length < len(known) or self._is_rewritten:
            known = self._known = known[:0]  # cut, and what follows may be anything
        if len(known) < min(stop, length):  # another array: those that were given are in use
            known = known + array("i", self._source[len(known) : stop])
            self._known = known
        return known if len(known) <= stop else known[:stop]

    async def upto_in_slices(self, stop: int) -> array[int]:
        """:meth:`upto` on a loop that has other things to do as well."""
        for count in range(_SLICE, stop, _SLICE):
            self.upto(count)
            await asyncio.sleep(0)
        return self.upto(stop)

    def chain(self, name: Name, tokens: array[int], scope: Scope) -> ChunkChain:
        """The names of ``tokens``; only what follows those that were named before is hashed.

        ``tokens`` are from :meth:`upto`. What was named is compared with them, so that names are
        never those of another text. Raises ``TokensError``.
        """
        known, count = self._chain, 0
        if known is not None and known.scope == scope:
            count = min(known.num_tokens, len(tokens))
            if known.packed[: 4 * count] != tokens[:count].tobytes():
                count = 0
        if known is None or not count:
            self._chain = chain = name(tokens, scope)
        elif count == len(tokens):
            chain = known.until(count)
        else:
            self._chain = chain = known.grown(tokens[count:])
        return chain

    async def chain_in_slices(self, name: Name, tokens: array[int], scope: Scope) -> ChunkChain:
        """:meth:`chain` on a loop that has other things to do as well."""
        known = self._chain
        named = known.num_tokens if known is not None and known.scope == scope else 0
        for count in range(named + _NAMED_AT_ONCE, len(tokens), _NAMED_AT_ONCE):
            self.chain(name, tokens[:count], scope)
            await asyncio.sleep(0)
        return self.chain(name, tokens, scope)
