"""How a cache names prompts: of which epoch a chain is, and whose chains it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvlayer._values import instance
from kvlayer.api.open_cache import OpenCache
from kvlayer.api.rebinding import check
from kvlayer.errors import IdentityError, LayoutError
from kvlayer.identity.epoch import Epoch
from kvlayer.identity.keys import (
    ChunkChain,
    Scope,
    Tokens,
    TokenSource,
    token_bytes,
    token_source,
)
from kvlayer.identity.namespace import Namespace
from kvlayer.identity.quality import EXACT, accepted, of_quality
from kvlayer.runtime.turns import in_turns
from kvlayer.tier.stack import Window

__all__ = ["Names"]

_PUBLIC = Scope()
_SCOPE = 'a tenant\'s is Scope.private("...")'
_STEP = 4096  # tokens packed and hashed in one turn of the loop: a quarter of a millisecond


class Names:
    """Makes the chains of one cache. In any thread, but for what is awaited."""

    def __init__(self, parts: OpenCache, begin: Callable[[], object]) -> None:
        """``begin`` raises where the cache cannot be used any more."""
        self._parts = parts
        self._epochs = parts.stack.epochs
        self._begin = begin

    def chain(self, tokens: Tokens, scope: Scope, namespace: Namespace | None) -> ChunkChain:
        """See ``Cache.chain``."""
        chain = self.of(tokens, scope)
        if namespace is not None:
            check(namespace, self._parts)
            accepts = accepted(namespace, chain.scope.accepts)
            return chain.bound(self._epochs.current, namespace.digest, accepts)
        current = self._epochs.current
        is_current = chain.epoch is current and chain.namespace == current.namespace
        return chain if is_current else self._bound(chain, current)

    def of(self, tokens: Tokens, scope: Scope) -> ChunkChain:
        """The names of a prompt; of the epoch they have, if they have one."""
        begun = self.begun(tokens, scope)
        return self.packed(begun, scope) if isinstance(begun, bytes) else begun

    async def named(self, tokens: Tokens, scope: Scope) -> ChunkChain:
        """:meth:`of` on the loop: others get their turn while a long prompt is packed and hashed.

        It is not to be changed meanwhile.
        """
        return await self.finished(self.source(tokens, scope), scope)

    def begun(self, tokens: Tokens, scope: Scope) -> ChunkChain | bytes:
        """A chain that was given, or tokens packed: what a buffer holds later changes nothing."""
        source = self.source(tokens, scope)
        return source if isinstance(source, (ChunkChain, bytes)) else token_bytes(source)

    def source(self, tokens: Tokens, scope: Scope) -> ChunkChain | bytes | TokenSource:
        """:meth:`begun`, but what a long prompt is to be packed from: that takes its turns."""
        instance("scope", scope, Scope, hint=_SCOPE)
        if isinstance(tokens, ChunkChain):
            return self._own(tokens, scope)
        source = token_source(tokens)
        return token_bytes(source) if len(source) <= _STEP else source

    async def to_store(
        self, tokens: Tokens, scope: Scope, window: Window, quality: str
    ) -> ChunkChain:
        """The names under which what a view covers is stored, up to its end."""
        source = self.source(tokens, scope)
        count = _count(source)
        if isinstance(source, ChunkChain) and source.epoch is not None:
            if source.namespace != source.epoch.namespace:
                raise IdentityError(
                    "the chain is of a namespace that is only read",
                    hint="store under what the engine computes now: cache.chain(tokens)",
                )
        elif isinstance(source, bytes):
            source = source[: 4 * window.stop]
        elif not isinstance(source, ChunkChain) and window.stop < count:
            source = source[: window.stop]
        if window.stop > count:
            raise LayoutError(
                f"the view covers tokens {window.start}..{window.stop}, but there are only "
                f"{count} tokens",
                hint="pass all tokens from the prompt's start, and first_token for the view's",
            )
        chain = (await self.finished(source, scope)).until(window.stop)
        if quality == EXACT:
            return chain
        return chain.named_in(of_quality(self._parts.namespace, quality))

    async def finished(self, begun: ChunkChain | bytes | TokenSource, scope: Scope) -> ChunkChain:
        """The chain of what :meth:`begun` has taken over, or of a :meth:`source`.

        In the epoch that is current when this begins.
        """
        if isinstance(begun, ChunkChain):
            return begun
        if isinstance(begun, bytes) and len(begun) <= 4 * _STEP:
            return self.packed(begun, scope)
        epoch = self._epochs.current
        steps = ChunkChain.in_steps(
            begun,
            scope,
            tokens_per_chunk=self._parts.namespace.tokens_per_chunk,
            tokens_per_tail=self._parts.namespace.tokens_per_tail,
            tokens_per_step=_STEP,
        )
        if isinstance(begun, bytes):
            await asyncio.sleep(0)  # packing it has taken a turn
        chain = await in_turns(steps)
        self._begin()  # it may have been closed meanwhile
        return self._bound(chain, epoch)

    def packed(self, packed: bytes, scope: Scope) -> ChunkChain:
        """The chain of packed tokens, at once."""
        epoch = self._epochs.current
        chain = ChunkChain.from_bytes(
            packed,
            scope,
            tokens_per_chunk=self._parts.namespace.tokens_per_chunk,
            tokens_per_tail=self._parts.namespace.tokens_per_tail,
        )
        return self._bound(chain, epoch)

    def _bound(self, chain: ChunkChain, epoch: Epoch) -> ChunkChain:
        """A chain in an epoch of this cache, with what its scope accepts."""
        names = chain.scope.accepts
        return chain.bound(epoch, accepts=accepted(self._parts.namespace, names) if names else ())

    def _own(self, chain: ChunkChain, scope: Scope) -> ChunkChain:
        sizes = self._parts.namespace.tokens_per_chunk, self._parts.namespace.tokens_per_tail
        if (chain.chunk_step, chain.tail_step) != sizes:
            raise IdentityError(
                f"the chain's chunks and links are of {chain.chunk_step} and {chain.tail_step} "
                f"tokens, this cache's of {sizes[0]} and {sizes[1]}",
                hint="make it with Cache.chain",
            )
        if chain.epoch is None or chain.epoch.owner is not self._epochs:
            current = self._epochs.current
            if chain.namespace not in ("", current.namespace):
                raise IdentityError(
                    f"the chain was made for KV of namespace {chain.namespace[:12]}, this cache's "
                    f"is {current.namespace[:12]}",
                    hint="make it with this cache's chain(tokens)",
                )
            chain = self._bound(chain, current)
        if scope in (_PUBLIC, chain.scope):
            return chain
        if scope.extras() != chain.scope.extras():
            raise IdentityError(
                "the chain was made under other salts, contents or another adapter",
                hint="leave the scope out: the chain has it",
            )
        if not {*scope.accepts} <= {*chain.scope.accepts}:
            raise IdentityError(
                "the scope accepts qualities that the chain's does not",
                hint="make the chain under that scope: cache.chain(tokens, scope)",
            )
        return chain.under(scope)


def _count(begun: ChunkChain | bytes | TokenSource) -> int:
    """How many tokens a prompt has."""
    if isinstance(begun, ChunkChain):
        return begun.num_tokens
    return len(begun) // 4 if isinstance(begun, bytes) else len(begun)
