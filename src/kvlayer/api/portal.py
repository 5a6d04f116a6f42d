"""A cache on a loop of its own, for threads that have none: engines, notebooks, scripts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Self

from kvlayer._values import callee
from kvlayer.abc.backend import Backend
from kvlayer.abc.codec import Codec
from kvlayer.abc.stager import MakeStager
from kvlayer.api.assembly import make_stager
from kvlayer.api.cache import Cache
from kvlayer.api.lookup import Lookup
from kvlayer.config.model import CacheConfig
from kvlayer.config.registry import BACKENDS, CODECS, Registry
from kvlayer.events import Sink
from kvlayer.identity.keys import Scope, Tokens
from kvlayer.identity.namespace import Namespace
from kvlayer.layout import KVLayout
from kvlayer.runtime.job import Job
from kvlayer.runtime.loop_thread import LoopThread
from kvlayer.tier.ranks.rank_team import RankTeam

__all__ = ["Portal"]

_PUBLIC = Scope()


class Portal(LoopThread[Cache]):
    """Runs a cache's coroutines from other threads. Made by :meth:`open`; thread-safe.

    Work is a coroutine function whose first argument is the cache::

        async def load(cache, tokens, kv):
            async with cache.lookup(tokens) as hit:
                return await cache.retrieve(hit, kv)

        report = portal.call(load, tokens, kv)
        job = portal.submit(load, tokens, kv)  # poll job.done(), job.wait(0.05), job.cancel()

    :meth:`lookup` needs no hop where memory has the answer. For a prompt of many thousand tokens
    that is a millisecond of the caller's; :meth:`lookup_on_loop` leaves it to the loop.
    """

    @classmethod
    def open(
        cls,
        config: CacheConfig,
        layout: KVLayout,
        namespace: Namespace | None = None,
        *,
        sinks: Iterable[Sink] = (),
        backends: Registry[type[Backend]] = BACKENDS,
        codecs: Registry[type[Codec]] = CODECS,
        ranks: RankTeam | None = None,
        make_stager: MakeStager = make_stager,
    ) -> Self:
        """Open a cache (see ``Cache.open``) on a new thread. Raises what ``Cache.open`` raises.

        Leave its ``with`` block or call :meth:`close`: work still running then is cancelled and
        has ended when that returns. A block left by an exception does not flush.
        """
        opener = partial(
            Cache.open,
            config,
            layout,
            namespace,
            sinks=sinks,
            backends=backends,
            codecs=codecs,
            ranks=ranks,
            make_stager=make_stager,
        )
        return cls.start(opener)

    def _part(self) -> None:
        self.subject.parts.part_from_ranks()  # what waits for them would not end by itself

    @property
    def cache(self) -> Cache:
        """The cache. Its methods belong to the portal's loop."""
        return self.subject

    def lookup(self, tokens: Tokens, *, scope: Scope = _PUBLIC) -> Lookup:
        """Look a prompt up without blocking. Release what it returns: see :class:`Lookup`.

        Answered in this thread where the directory alone can say; else a tier is asked on the
        loop, and the lookup is pending until then. Raises ``TokensError``, ``ClosedError`` and
        ``ForkedError``.
        """
        self.check_open()
        return self.subject.lookups.begin(tokens, scope, self._spawn, self._tell)

    def lookup_on_loop(
        self, tokens: Callable[[], Awaitable[Tokens]], *, scope: Scope = _PUBLIC
    ) -> Lookup:
        """:meth:`lookup` for prompts so long that naming them would hold the caller.

        Pending when this returns: ``tokens()`` is awaited on the loop, and what it gives is named
        and looked up there. Where that raises it is logged, and the lookup a miss. Raises
        ``ClosedError`` and ``ForkedError``.
        """
        self.check_open()
        callee("tokens", tokens)
        return self.subject.lookups.begin_on_loop(tokens, scope, self._spawn)

    def renew(self, lookup: Lookup) -> Lookup:
        """Lease again what a lookup has found, as far as it is there: its lease runs out.

        In this thread: nothing is named and no tier is asked, so the answer is never pending. The
        old lookup stays as it is; release it. Raises ``PendingError`` while that is pending,
        ``ClosedError`` and ``ForkedError``.
        """
        self.check_open()
        return self.subject.lookups.renew(lookup)

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> Job[None]:
        return self.submit(lambda _: work())

    def _tell(self, entry: Callable[[], None]) -> None:
        self.post([entry])
