"""Finding a prompt's usable prefix: awaited, polled, or answered in the caller's own thread."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import CancelledError
from enum import StrEnum
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Any, Self, TypeAlias

from kvlayer._steps import Steps, finish
from kvlayer._values import instance, waiting
from kvlayer.api.hit import PrefixHit
from kvlayer.api.open_cache import OpenCache
from kvlayer.errors import ArgumentError, PendingError, UnsupportedError
from kvlayer.events import LookupDone
from kvlayer.identity.keys import ChunkChain, Scope, Tokens
from kvlayer.identity.quality import EXACT
from kvlayer.results import Cause
from kvlayer.runtime.foreign import awaited
from kvlayer.runtime.job import Job
from kvlayer.runtime.turns import in_turns, soon, to_the_end
from kvlayer.tier.epochs import EpochOver
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import Planner

__all__ = ["Lookup", "LookupState", "Lookups", "released"]

_log = logging.getLogger(__name__)


class LookupState(StrEnum):
    """Where a lookup stands."""

    MISS = "miss"
    HIT = "hit"
    PENDING = "pending"
    """A tier is being asked: poll again."""


Search: TypeAlias = Job[None] | asyncio.Task[None]
"""What still looks for the answer."""


class Lookup:
    """A lookup to poll: a scheduler's step never waits for it. Release it, or use it in ``with``.

    What it found is leased from the moment it is there, until :meth:`release` or until the lease's
    deadline passes: a holder that dies leaks nothing. One from a ``Portal`` may be used in any
    thread, one from ``Cache.begin_lookup`` on the cache's loop.
    """

    __slots__ = ("_hit", "_is_released", "_lock", "_owner", "_pid", "_planner", "_search")

    def __init__(self, planner: Planner, owner: str, hit: PrefixHit | None = None) -> None:
        self._planner = planner
        self._owner = owner
        self._hit = hit
        self._search: Search | None = None
        self._is_released = False
        self._lock = Lock()
        self._pid = os.getpid()

    @property
    def state(self) -> LookupState:
        """Never blocks. A lookup that cannot be answered any more (closed, released) is a miss."""
        is_over = self._search is None or self._search.done()  # asked first: the hit comes before
        if self._hit is not None:
            return LookupState.HIT if self._hit.tokens else LookupState.MISS
        return LookupState.MISS if is_over else LookupState.PENDING

    @property
    def hit(self) -> PrefixHit:
        """What was found; 0 tokens for a miss. Raises ``PendingError`` while it is not known."""
        if self.state is LookupState.PENDING:
            raise PendingError(
                "the lookup is still pending", hint="poll lookup.state, or lookup.wait(seconds)"
            )
        return self._hit or PrefixHit(0, (), {}, self._owner)

    def wait(self, seconds: float | None = None) -> PrefixHit:
        """The hit, after at most ``seconds`` (None: no limit).

        Raises ``PendingError`` when the time is up (the search goes on), and ``UnsupportedError``
        on the loop that searches: ``await`` the lookup there.
        """
        seconds = waiting("seconds", seconds)
        if isinstance(self._search, Job):
            try:
                self._search.wait(seconds)
            except CancelledError:
                pass  # released or closed meanwhile: a miss
        elif self.state is LookupState.PENDING:
            raise UnsupportedError(
                "waiting here would block the loop that searches", hint="await the lookup"
            )
        return self.hit

    def __await__(self) -> Generator[Any, None, PrefixHit]:
        """The hit, on any loop. Cancelling the waiter leaves the search alone."""
        search = self._search
        if search is not None and not search.done():
            future = asyncio.wrap_future(search) if isinstance(search, Job) else search
            yield from asyncio.wait({future}).__await__()
        return self.hit

    def release(self) -> bool:
        """Let go of what was found, or stop looking. False when there was nothing to let go of.

        Idempotent. What another thread is loading of it stays until that has ended.
        """
        if os.getpid() != self._pid:
            return False  # the lease is the parent's
        with self._lock:
            self._is_released = True
            hit = self._hit
        if hit is not None:
            return hit.lease is not None and released(self._planner, hit.lease)
        if self._search is not None:
            self._search.cancel()
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def is_of(self, planner: Planner) -> bool:
        """Whether it is of the cache that has this planner."""
        return self._planner is planner

    def begin(self, search: Search) -> None:
        """Something looks for the answer. For the cache."""
        self._search = search

    def settle(self, hit: PrefixHit) -> None:
        """The answer is there. For the cache, on its loop."""
        with self._lock:
            if not self._is_released:
                self._hit = hit
                return
        if hit.lease is not None:
            released(self._planner, hit.lease)


Spawn: TypeAlias = Callable[[Callable[[], Coroutine[Any, Any, None]]], Search]
"""Starts work on the cache's loop."""
Tell: TypeAlias = Callable[[Callable[[], None]], None]
"""Has something called on the cache's loop."""


class Lookups:
    """How one cache looks prompts up; counts and reports every answer."""

    def __init__(
        self,
        parts: OpenCache,
        chain: Callable[[Tokens, Scope], ChunkChain],
        named: Callable[[Tokens, Scope], Awaitable[ChunkChain]],
    ) -> None:
        """``chain`` names a prompt in any thread, ``named`` on the loop, in turns."""
        self._parts = parts
        self._chain = chain
        self._named = named
        self._stack = parts.stack
        self._planner = parts.stack.planner
        self._emit = parts.emit
        self._clock = parts.clock
        self._lease_seconds = parts.config.lease_seconds

    async def find(
        self, tokens: Tokens, scope: Scope, *, presume: bool = True, patience: float = 0.0
    ) -> PrefixHit:
        """The longest usable prefix, leased. On the loop. Raises ``TokensError``."""
        started = self._clock()
        return await self._find(
            await self._named(tokens, scope), started, presume=presume, patience=patience
        )

    def begin(self, tokens: Tokens, scope: Scope, spawn: Spawn, tell: Tell) -> Lookup:
        """Answer now if the directory can, else start looking. In any thread."""
        started = self._clock()
        chain = self._chain(tokens, scope)
        hit = self._at_once(chain)
        if hit is None:
            pending = Lookup(self._planner, chain.scope.owner)
            pending.begin(spawn(partial(self._settle, pending, chain, started)))
            return pending
        self._count(chain, hit)
        if self._emit:
            tell(partial(self._report_at_once, chain, hit, self._clock() - started))
        return Lookup(self._planner, chain.scope.owner, hit)

    def begin_on_loop(
        self, tokens: Callable[[], Awaitable[Tokens]], scope: Scope, spawn: Spawn
    ) -> Lookup:
        """Start looking for what ``tokens()`` gives on the loop. In any thread."""
        pending = Lookup(self._planner, scope.owner)
        pending.begin(spawn(partial(self._settle_named, pending, tokens, scope, self._clock())))
        return pending

    def renew(self, lookup: Lookup) -> Lookup:
        """What the directory still has of an answer, leased anew. In any thread."""
        instance("lookup", lookup, Lookup, hint="what portal.lookup(...) returned")
        if not lookup.is_of(self._planner):
            raise ArgumentError(
                "this lookup is another cache's",
                hint="renew it with the portal whose lookup returned it",
            )
        hit = lookup.hit
        if hit.match is not None:
            match, lease = self._stack.finder.lease_known(
                hit.match.chain, hit.match.runs, owner=hit.owner, seconds=self._lease_seconds
            )
            hit = finish(self._hit(match, lease))
        return Lookup(self._planner, hit.owner, hit)

    async def _find(
        self, chain: ChunkChain, started: float, *, presume: bool = True, patience: float = 0.0
    ) -> PrefixHit:
        with self._emit.request("lookup", chain.scope.owner, chain.num_tokens):
            try:
                with self._stack.epochs.within(chain.epoch):
                    match, lease = await self._stack.finder.lease(
                        chain,
                        owner=chain.scope.owner,
                        seconds=self._lease_seconds,
                        presume=presume,
                        patience=patience,
                    )
            except EpochOver:
                self._stack.host.refused(Cause.REBOUND)
                match, lease = self._nothing(chain)
            is_found = False
            try:
                hit = await in_turns(self._hit(match, lease))
                is_found = True
            finally:
                if not is_found:
                    await to_the_end(self._planner.releasing(lease.number))
            self._count(chain, hit)
            if self._emit:
                self._report(chain, hit, self._clock() - started)
        return hit

    def _at_once(self, chain: ChunkChain) -> PrefixHit | None:
        leased = self._stack.finder.lease_at_once(
            chain, owner=chain.scope.owner, seconds=self._lease_seconds
        )
        return None if leased is None else finish(self._hit(*leased))

    async def _settle_named(
        self,
        lookup: Lookup,
        tokens: Callable[[], Awaitable[Tokens]],
        scope: Scope,
        started: float,
    ) -> None:
        try:
            chain = await self._named(await awaited(tokens), scope)
        except Exception:  # noqa: BLE001  # a cache fails only into a miss
            _log.exception("a prompt could not be named and is answered as a miss")
            chain = self._chain((), scope)
        await self._settle(lookup, chain, started)

    async def _settle(self, lookup: Lookup, chain: ChunkChain, started: float) -> None:
        try:
            hit = await self._find(chain, started)
        except Exception:  # noqa: BLE001  # a cache fails only into a miss
            _log.exception("a lookup failed and is answered as a miss")
            hit = finish(self._hit(*self._nothing(chain)))
        lookup.settle(hit)

    def _nothing(self, chain: ChunkChain) -> tuple[Match, Lease]:
        """A miss, leased like a hit."""
        match = Match(chain, [], [])
        owner = chain.scope.owner
        return match, self._planner.lease(match, owner=owner, seconds=self._lease_seconds)

    def _hit(self, match: Match, lease: Lease) -> Steps[PrefixHit]:
        by_tier = yield from self._planner.by_tier(match)
        own = self._parts.namespace.quality
        return PrefixHit(
            match.tokens,
            tuple(match.spans),
            by_tier,
            lease.owner,
            quality=own if match.quality == EXACT else match.quality,
            exact_tokens=match.exact_tokens if own == EXACT else 0,
            match=match,
            lease=lease,
        )

    def _count(self, chain: ChunkChain, hit: PrefixHit) -> None:
        self._parts.count_lookup(chain.num_tokens, hit.tokens)

    def _report_at_once(self, chain: ChunkChain, hit: PrefixHit, seconds: float) -> None:
        """A lookup that was answered in its caller's thread: on the loop it starts and ends."""
        with self._emit.request("lookup", hit.owner, chain.num_tokens):
            self._report(chain, hit, seconds)

    def _report(self, chain: ChunkChain, hit: PrefixHit, seconds: float) -> None:
        self._emit(
            LookupDone(
                owner=hit.owner,
                asked_tokens=chain.num_tokens,
                hit_tokens=hit.tokens,
                seconds=seconds,
                by_tier=hit.by_tier,
                quality=hit.quality,
            )
        )


def released(planner: Planner, lease: Lease) -> bool:
    """Give a lease back; on a loop, what is long is let go of in the loop's next turns."""
    is_released = planner.ended(lease.number)
    if planner.leases.is_ending:
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # in a thread of its own
            finish(planner.expiring())
        else:
            soon(planner.expiring())
    return is_released
