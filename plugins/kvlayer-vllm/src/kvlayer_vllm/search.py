"""Finding a request's prefix without waiting: looked up, brought into host memory, promised."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial

from kvlayer import Cache, Portal, RetrieveReport, Scope
from kvlayer.api.hit import PrefixHit
from kvlayer.api.lookup import Lookup, LookupState
from kvlayer.identity.chain import ChunkChain
from kvlayer.runtime.job import Job
from kvlayer_vllm.token_ids import Name, TokenIds

__all__ = ["Search"]

_LONG = 8192  # tokens: to name more takes the scheduler half a millisecond
_SCOPE_SECONDS = 5.0  # by then a request is computed: who names its adapter may hang on a disk


class Search:
    """One search. The scheduler polls it and never waits.

    What lies in lower tiers is brought up before it is promised, so that a tier that fails or is
    late costs a shorter prefix, and never a step.
    """

    def __init__(
        self,
        portal: Portal,
        ids: TokenIds,
        count: Callable[[], int],
        scope: Callable[[], Scope | None],
        *,
        clock: Callable[[], float],
        lease_seconds: float,
        on_found: Callable[[PrefixHit], None] | None = None,
    ) -> None:
        """Looks for the first ``count()`` of ``ids``.

        ``on_found`` is told what was found, before any of it is moved.
        """
        self._portal = portal
        self._ids = ids
        self._count = count
        self._scope = scope
        self._clock = clock
        self._patience = lease_seconds / 2
        """A hit that is older is leased anew: its lease must outlive the load."""
        self._on_found = on_found
        self._is_told = False
        self._lookup: Lookup | None = None
        self._since = 0.0
        self._asked: float | None = None
        self._promotion: Job[RetrieveReport] | None = None
        self._was_promoted = False

    def poll(self) -> int | None:
        """Tokens that lie in host memory, leased; None while that is not known.

        What was known once stays known, however seldom it is asked for: a request that must ask
        again loses its turn.
        """
        if self._lookup is not None and self._is_stale():
            self._renew(self._lookup)
        if self._lookup is None:
            if self._asked is None:
                self._asked = self._clock()
            scope = self._scope()
            if scope is None:
                return None if self._clock() - self._asked < _SCOPE_SECONDS else 0
            self._since = self._clock()
            self._lookup = self._begin(scope)
            self._is_told = False
        if self._lookup.state is LookupState.PENDING:
            return None
        hit = self._lookup.hit
        if self._on_found is not None and hit.tokens and not self._is_told:
            self._is_told = True
            self._on_found(hit)
        return self._brought_up(hit)

    def _brought_up(self, hit: PrefixHit) -> int | None:
        """Tokens of a hit in host memory, once what lies below has come up; None until then."""
        in_memory = next(iter(hit.by_tier.values()), 0)
        if in_memory == hit.tokens:
            return hit.tokens
        if self._was_promoted:
            return 0  # it did not come up, or is gone again
        if self._promotion is None:
            self._promotion = self._portal.submit(Cache.promote, hit)
        if not self._promotion.done():
            return None
        try:
            return self._promotion.result().tokens
        except CancelledError:
            return 0  # the portal closes

    def _begin(self, scope: Scope) -> Lookup:
        count, name = self._count(), self._portal.cache.chain
        if count <= _LONG:
            chain = self._ids.chain(name, self._ids.upto(count), scope)
            return self._portal.lookup(chain, scope=scope)
        return self._portal.lookup_on_loop(partial(self._named, name, count, scope), scope=scope)

    async def _named(self, name: Name, count: int, scope: Scope) -> ChunkChain:
        tokens = await self._ids.upto_in_slices(count)
        return await self._ids.chain_in_slices(name, tokens, scope)

    def _renew(self, lookup: Lookup) -> None:
        self._since = self._clock()
        self._lookup = self._portal.renew(lookup)
        lookup.release()
        self._was_promoted = self._was_promoted or self._promotion is not None
        self._promotion = None

    def take(self) -> Lookup:
        """Hand what was found over to a load, which releases it."""
        assert self._lookup is not None
        taken = self._lookup
        self._lookup, self._promotion, self._was_promoted = None, None, False
        return taken

    def release(self) -> None:
        """Let go of what was found, and stop looking."""
        if self._promotion is not None:
            self._promotion.cancel()
            self._promotion = None
        self._was_promoted = False
        if self._lookup is not None:
            self._lookup.release()
            self._lookup = None

    def _is_stale(self) -> bool:
        is_known = self._lookup is not None and self._lookup.state is not LookupState.PENDING
        is_moving = self._promotion is not None and not self._promotion.done()
        return is_known and not is_moving and self._clock() - self._since > self._patience
