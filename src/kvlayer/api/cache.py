"""The cache: store, lookup, retrieve and prefetch KV by token. Start reading here."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from kvlayer._steps import FEW, Steps, used_up
from kvlayer._values import callee, flag, function, instance, number, text, waiting, whole
from kvlayer.abc.backend import Backend
from kvlayer.abc.codec import Codec
from kvlayer.abc.stager import Landed, MakeStager
from kvlayer.api import assembly
from kvlayer.api.control import Control
from kvlayer.api.hit import PrefixHit
from kvlayer.api.lookup import Lookup, Lookups
from kvlayer.api.naming import Names
from kvlayer.api.prefetch import Prefetch
from kvlayer.api.rebinding import rebind
from kvlayer.config.model import CacheConfig
from kvlayer.config.registry import BACKENDS, CODECS, Registry
from kvlayer.errors import (
    ClosedError,
    ForkedError,
    LayoutError,
    UnsupportedError,
)
from kvlayer.events import PrefetchDone, RetrieveDone, Sink, StoreDone
from kvlayer.identity.keys import ChunkChain, Scope, Span, Tokens, TokenSource
from kvlayer.identity.namespace import Namespace
from kvlayer.identity.quality import EXACT
from kvlayer.layout import KVLayout, KVView
from kvlayer.patience import Patience
from kvlayer.results import Cause, Failure, RetrieveReport, StoreReport
from kvlayer.runtime.turns import after_a_turn, in_turns, to_the_end
from kvlayer.tier.planner.lease import Lease, lease_seconds
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import REBOUND
from kvlayer.tier.planner.sources import Sources
from kvlayer.tier.ranks.rank_team import RankTeam
from kvlayer.tier.stack import Window
from kvlayer.tier.storing import Stored

__all__ = ["Cache"]

PUBLIC = Scope()

_HIT = "what `async with cache.lookup(...)` yields"
_LONGEST_PREFILL = 1e9  # seconds
_LONGEST_WAIT = 1e6
_SLICE = 24  # spans remembered in one turn of the loop: some 10 us each
_LARGEST_PREFILL = 10**12  # tokens


class Cache:
    """KV of one model, for one engine rank, on one event loop.

    Made by :meth:`open`. Every method belongs to the loop it was opened on; engine threads use
    :class:`kvlayer.Portal`. What is passed to a call, tokens or a view, is not to change until that
    has returned: a long prompt is read in slices. Nothing here raises because a tier, a disk or a
    peer failed: that is a shorter prefix and a cause. Misuse raises: a wrong view, wrong tokens,
    use after close.
    """

    def __init__(self, parts: assembly.OpenCache) -> None:
        self._parts = parts
        self._stack = parts.stack
        self._planner = parts.stack.planner
        self._names = Names(parts, self._begin)
        self._lookups = Lookups(parts, self._names.of, self._names.named)
        self._emit = parts.emit
        self._clock = parts.clock
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.config = parts.config
        self.control = Control(self)
        self._unclosed = weakref.finalize(self, _say_lost, parts, self._pid)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: CacheConfig,
        layout: KVLayout,
        namespace: Namespace | None = None,
        *,
        sinks: Iterable[Sink] = (),
        backends: Registry[type[Backend]] = BACKENDS,
        codecs: Registry[type[Codec]] = CODECS,
        ranks: RankTeam | None = None,
        make_stager: MakeStager = assembly.make_stager,
    ) -> AsyncGenerator[Cache]:
        """Open the tiers of ``config`` for an engine whose KV lies as ``layout`` says.

        ``namespace`` is what identifies the KV; without one it is made from ``config.model`` and
        the layout, which reads the model's files once to digest them. ``sinks`` are told of every
        operation. ``backends`` says where URL schemes are found: the installed ones by default;
        ``BACKENDS.extended({"mine": MyBackend})`` adds one that is not installed. ``codecs`` is the
        same for the codecs that tiers name.

        With ``ranks`` the tensors are in other processes: ``layout`` is that of all ranks together,
        views are ``RemoteView``, and what a rank failed to move is in the reports. ``make_stager``
        is for an engine whose memory no layout describes: called with the layout, the slab and a
        number of threads, it returns what gathers and scatters there.

        On a clean exit everything stored reaches the lower tiers first (at most
        ``config.close_seconds``); on an exception only what is being written ends.

        Raises ``ConfigError``, ``IdentityError``, ``CapacityError``, ``PluginError`` or
        ``BackendError`` when the cache cannot be built; then nothing stays open.
        """
        parts = await assembly.build(
            config,
            layout,
            namespace,
            sinks,
            backends,
            codecs=codecs,
            ranks=ranks,
            make_stager=make_stager,
        )
        cache = cls(parts)
        clean = False
        try:
            yield cache
            clean = True
        finally:
            cache._closed = True
            await _to_the_end(parts, flush=clean)
            cache._unclosed.detach()  # not before: the process may end meanwhile

    # -- the four verbs --------------------------------------------------------------------------

    async def store(
        self,
        tokens: Tokens,
        kv: KVView,
        *,
        scope: Scope = PUBLIC,
        first_token: int = 0,
        tail: bool = True,
        on_gathered: Callable[[], None] | None = None,
        patience: Patience | float | None = None,
        quality: str = EXACT,
    ) -> StoreReport:
        """Store the KV of a prompt as far as ``kv`` covers it; what is there already is skipped.
        What only a tier has that is down for now counts as missing.

        ``tokens`` are all tokens from the prompt's start; entry 0 of ``kv``'s slots is token
        ``first_token``, and chunks that start before it are left alone (a growing conversation
        names them again but need not hold them). ``tail`` also stores the partial chunk at the
        end: do so once, when the prompt is complete. Who keeps a conversation's
        :meth:`chain` and lets it grow passes that as ``tokens``: only what is new is hashed then.

        Returns when the bytes have left the engine's memory and, for tiers with ``write =
        "through"``, have been committed there or failed to. ``on_gathered`` is called on the loop
        once the view is not needed any more, which is earlier there; not when this raises.

        Where host memory is full of what lower tiers have still to get, this waits while they make
        progress, so a prompt longer than host memory is stored whole. ``patience`` bounds that: in
        seconds, or a :class:`Patience` that an engine ends when it wants its blocks back. With 0
        nothing waits: what is not written makes room, counted as ``dropped_writes``. What another
        store is gathering is waited for, and stored by this one where the other fails.

        ``quality`` is that of the hit which the KV was computed after (``PrefixHit.quality``), or
        what made it an approximation itself. It is stored in that quality's namespace: only
        requests that accept it are served it. What is there as exact KV is skipped.

        Cancelling it releases the view and leaves every object whole or absent. Raises
        ``LayoutError`` and ``TokensError``. From an id of 2^30 or more on a prompt has no names:
        what comes before it is stored, the rest is reported as failed (``Cause.NO_NAME``).
        """
        started = self.check_loop()
        window = self._window(kv, first_token)
        flag("tail", tail)
        function("on_gathered", on_gathered)
        text("quality", quality, hint="PrefixHit.quality says it, and 'exact' is the default")
        chain = await self._names.to_store(tokens, scope, window, quality)
        with self._emit.request("store", chain.scope.owner, chain.num_tokens):
            stored = await self._stack.store(
                chain,
                kv,
                window,
                tail=tail,
                on_gathered=on_gathered,
                patience=Patience.of(patience),
            )
            stored.failed += _nameless(chain, window.start)
            report = stored.report()
            if stored.spans or stored.skipped:
                await self._remember(chain, stored)
            if self._emit:
                owner, seconds = chain.scope.owner, self._clock() - started
                self._emit(_store_done(owner, report, stored.nbytes, seconds))
        return report

    @asynccontextmanager
    async def lookup(
        self, tokens: Tokens, *, scope: Scope = PUBLIC, presume: bool = True, patience: float = 0.0
    ) -> AsyncGenerator[PrefixHit]:
        """The longest usable prefix, pinned until the block ends (or ``lease_seconds`` pass).

        A tier that may hold more than is known here is asked about a few chunks of a long prompt:
        those between two that are there are presumed to be there, too. Where one is not,
        :meth:`retrieve` loads what comes before it, and names it in its report. With ``presume``
        False the tier is asked about every chunk, so a hit holds what was seen and nothing else.

        Where another request is storing the chunk that comes next, this waits for it, at most
        ``patience`` seconds in all (0: not at all), and for nothing else. Nothing is pinned
        meanwhile. If that store fails, the hit ends before the chunk.

        Exact KV is looked for first. Where the scope accepts qualities, the longest hit is taken
        that is exact, or exact and then of one of them; of equally long ones the exact one, then
        that which is listed first. See :class:`PrefixHit`.

        Raises ``TokensError``.
        """
        self.check_loop()
        flag("presume", presume)
        patience = number("patience", patience, most=_LONGEST_WAIT)
        hit = await self._lookups.find(tokens, scope, presume=presume, patience=patience)
        assert hit.lease is not None
        try:
            yield hit
        finally:
            releasing = self._planner.releasing(hit.lease.number)
            # What was done with a long hit has just taken its turn.
            await to_the_end(releasing if len(hit.spans) <= FEW else after_a_turn(releasing))

    def begin_lookup(self, tokens: Tokens, *, scope: Scope = PUBLIC) -> Lookup:
        """Start a lookup to poll, for a callback that must not await. See :class:`Lookup`.

        Where the directory alone can answer it is answered when this returns, unless the prompt is
        longer than 256 chunks: that is looked up in turns with others. Raises ``TokensError``.
        """
        self.check_loop()
        prompt = self._names.begun(tokens, scope)
        count = prompt.num_tokens if isinstance(prompt, ChunkChain) else len(prompt) // 4
        if count > FEW * self.namespace.tokens_per_chunk:
            named = partial(self._names.finished, prompt, scope)
            return self._lookups.begin_on_loop(named, scope, self._spawn)
        chain = prompt if isinstance(prompt, ChunkChain) else self._names.packed(prompt, scope)
        return self._lookups.begin(chain, scope, self._spawn, _call)

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        return self._parts.spawn(work())

    async def retrieve(
        self,
        hit: PrefixHit,
        kv: KVView,
        *,
        first_token: int = 0,
        deadline: float | None = None,
        on_layer: Landed | None = None,
    ) -> RetrieveReport:
        """Load a hit into the engine's memory, as far as ``kv`` covers it.

        Entry 0 of ``kv``'s slots is token ``first_token``; what lies before it the engine has.
        Loads ``min(hit.tokens, first_token + kv.num_tokens)`` tokens; whatever fails ends the
        prefix there and is named in the report. A view that ends inside a native block, or where
        a window or state is not kept, gets what ends before that. Bytes are verified before they
        are scattered.

        Loading is abandoned ``deadline`` seconds from now, when a tier missed its own deadline, or
        when it has taken as long as recomputing would (see :meth:`report_prefill`): whichever
        comes first.

        ``on_layer`` is called on the loop as soon as a layer holds all that is going to be loaded,
        in the model's order, so that attention over it need not wait for the others. It is not
        called where the engine's memory is filled all at once, nor after a failure.

        The view may be written beyond ``report.tokens``, never outside its slots. Cancelling
        returns once the view is untouched. Raises ``LayoutError``.
        """
        started = self.check_loop()
        window = self._window(kv, first_token)
        deadline = waiting("deadline", deadline)
        function("on_layer", on_layer)
        instance("hit", hit, PrefixHit, hint=_HIT)
        with self._emit.request("retrieve", hit.owner, hit.tokens):
            usable, lease = self._granted(hit)
            sources = Sources(self._planner.tiers)

            def claimed(match: Match) -> Steps[None]:
                nonlocal usable
                usable = match
                if self._emit:
                    yield from sources.taking(match)

            report = await self._stack.retrieve(
                usable,
                kv,
                window,
                deadline=deadline,
                landed=on_layer,
                lease=lease,
                on_claimed=claimed,
            )
            asked = min(hit.tokens, window.stop)
            if usable.tokens < asked and not report.failed:
                report = RetrieveReport(report.tokens, (_gone(hit, usable),))
            if self._emit:
                by_tier, nbytes = await in_turns(sources.served(window.start, report.tokens))
                self._emit(
                    RetrieveDone(
                        owner=hit.owner,
                        asked_tokens=asked,
                        tokens=report.tokens,
                        failed=report.failed,
                        nbytes=sum(nbytes.values()),
                        seconds=self._clock() - started,
                        by_tier=by_tier,
                        nbytes_by_tier=nbytes,
                    )
                )
        return report

    def prefetch(
        self, tokens: Tokens, *, scope: Scope = PUBLIC, deadline: float | None = None
    ) -> Prefetch:
        """Start bringing a prompt's usable prefix into host memory and hold it there.

        The prefix stays pinned for ``deadline`` seconds (default ``lease_seconds``), whether or
        not anyone asks for it. The tokens are not to change before it is done. Raises
        ``TokensError``; for a long prompt only the awaited :class:`Prefetch` does so.
        """
        started = self.check_loop()
        source = self._names.source(tokens, scope)
        seconds = self.config.lease_seconds if deadline is None else lease_seconds(deadline)
        return Prefetch(self._parts.spawn(self._promote(source, scope, seconds, started)))

    async def _promote(
        self, prompt: ChunkChain | TokenSource, scope: Scope, seconds: float, started: float
    ) -> RetrieveReport:
        chain = await self._names.finished(prompt, scope)
        owner = chain.scope.owner
        with self._emit.request("prefetch", owner, chain.num_tokens):
            _, report = await self._stack.hold(chain, owner=owner, seconds=seconds)
            self._prefetched(owner, chain.num_tokens, report, started)
        return report

    def _prefetched(self, owner: str, asked: int, report: RetrieveReport, started: float) -> None:
        if self._emit:
            seconds = self._clock() - started
            done = PrefetchDone(
                owner=owner,
                asked_tokens=asked,
                tokens=report.tokens,
                failed=report.failed,
                seconds=seconds,
            )
            self._emit(done)

    async def promote(self, hit: PrefixHit, *, deadline: float | None = None) -> RetrieveReport:
        """Bring a hit into host memory: for an engine that makes room only for what is certain.

        The report's tokens are there then, for as long as the hit is leased, and ``retrieve``
        copies them without a tier in between. Abandoned as :meth:`retrieve` is: ``deadline``
        seconds from now, when a tier missed its own, and when it has taken as long as recomputing
        would. Raises ``LayoutError`` for a hit of another cache.
        """
        started = self.check_loop()
        deadline = waiting("deadline", deadline)
        instance("hit", hit, PrefixHit, hint=_HIT)
        with self._emit.request("prefetch", hit.owner, hit.tokens):
            match, lease = self._granted(hit)
            match, _ = await in_turns(self._planner.claiming(match, lease, match.tokens))
            try:
                report = await self._stack.promote(match, deadline=deadline)
                await in_turns(self._planner.keeping(lease, match))
            finally:
                await to_the_end(self._planner.unpinning([*match.path()]))
            if match.chain.is_stale and hit.spans and not report.failed:
                report = RetrieveReport(0, (_gone(hit, match),))
            self._prefetched(hit.owner, hit.tokens, report, started)
        return report

    def report_prefill(self, tokens: int, seconds: float) -> None:
        """The engine has just computed the KV of ``tokens`` tokens in ``seconds``.

        From then on hits end where loading the rest would take longer than computing it. Nothing
        is assumed before the first report, unless ``prefill_tokens_per_second`` is configured.
        """
        self._begin()
        computed = whole("tokens", tokens, most=_LARGEST_PREFILL)
        took = number("seconds", seconds, most=_LONGEST_PREFILL)
        self._stack.prefill.observe(computed, took)

    async def flush(self) -> None:
        """Wait until everything stored so far has reached the lower tiers, or failed to.

        A tier with ``write = "demote"`` is written when objects leave host memory: of that it waits
        for what is on its way.
        """
        self.check_loop()
        await self._stack.flush()

    async def recovered(self) -> None:
        """Wait until what the lower tiers already held has been listed.

        Lookups need not wait: they ask a tier for what is not listed yet. Only objects that were
        cut into other parts than this rank's are found through the listing alone.
        """
        self.check_loop()
        await self._stack.recovered()

    async def rebind(
        self, namespace: Namespace, update: Callable[[], Awaitable[object]] | None = None
    ) -> None:
        """From now on the engine computes KV of another namespace: its weights are updated, say.

        ``update()`` is awaited while nothing moves: once nothing reads or writes the engine's
        memory any more for a request that began before, and before anything begins anew. Whoever
        leaves it out changes weights and memory after this has returned and before the next
        request. Until this returns whatever begins stores nothing and is a miss.

        - A store that is under way has kept what it had gathered, under the old namespace, and
          reports the rest as failed (``Cause.REBOUND``). What lies in host memory is still written
          to the tiers, under its own name.
        - A lookup that is under way is a miss. A hit that was found before is not served:
          ``retrieve`` and ``promote`` report ``Cause.REBOUND``. Prefetches are given up.
        - A :meth:`chain` that was made before stores and serves nothing any more; ``chain(chain)``
          names it anew. So a request that keeps its chain cannot straddle this unnoticed.

        The same namespace as before begins another epoch all the same. What is stored stays: it
        is served when the cache is bound to its namespace again, and before that to whoever asks
        for it (``chain(tokens, namespace=old)``). Where each rank has a cache of its own, each is
        rebound; where one plans for all ranks, they have nothing to do.

        Several at once all await their ``update``; the cache is bound to the namespace of the last
        that began, and stores and serves nothing before the last of them has ended. So one that is
        called inside another's ``update`` returns before that.

        Waits for what the ranks or the device are copying, without a deadline: memory that somebody
        may still read is not to be changed. Where this is cancelled, or ``update`` raises, the
        cache stores and serves nothing until it is rebound.

        Raises ``IdentityError``, and leaves everything as it is, for a namespace of another layout
        or other chunk sizes, which needs another cache, and for one of unknown weights where a tier
        is shared; ``ArgumentError``; what ``update`` raises.
        """
        self.check_loop()
        if update is not None:
            callee("update", update)
        await rebind(self._parts, namespace, update)

    @property
    def namespace(self) -> Namespace:
        """What the engine computes now; see :meth:`rebind`."""
        return self._parts.namespace

    # -- shared with control and Portal ----------------------------------------------------------

    @property
    def lookups(self) -> Lookups:
        """How prompts are looked up; for ``Portal``, in any thread."""
        self._begin()
        return self._lookups

    @property
    def stack(self) -> assembly.Stack:
        """The tiers; for the control API."""
        self._begin()
        return self._stack

    @property
    def parts(self) -> assembly.OpenCache:
        """What the cache was built from; for the control API."""
        self._begin()
        return self._parts

    async def _remember(self, chain: ChunkChain, stored: Stored) -> None:
        """Keep for ``explain`` what was stored, in slices; all of it if this is cancelled, too.

        What is remembered of ``stored`` is used up.
        """
        await to_the_end(self._remembering(chain, stored))

    def _remembering(self, chain: ChunkChain, stored: Stored) -> Steps[None]:
        new, known = stored.spans, [*stored.skipped]
        stored.skipped.clear()
        last = max((spans[-1].stop for spans in (new, known) if spans), default=0)
        yield from chain.fingerprinting(last // chain.chunk_step)
        for some in used_up(new, _SLICE):
            self._planner.remember(chain, some)
            yield
        for some in used_up(known, _SLICE):
            self._planner.remember(chain, (), some)
            yield

    def chain(
        self, tokens: Tokens, scope: Scope = PUBLIC, *, namespace: Namespace | None = None
    ) -> ChunkChain:
        """The names of a prompt under this cache's chunk size: pass them wherever tokens are taken.

        ``chain.grown(tokens)`` names a longer prompt and hashes only what is new. A chain is of the
        epoch in which it was made: after :meth:`rebind` nothing is stored or served by it. One that
        is given is named again in the current epoch, which hashes nothing, if it is of this cache's
        sizes and of ``scope``, which may be left out; another owner is taken over.

        With ``namespace`` the chain is looked up in that one, which may be an earlier epoch's;
        nothing is stored by it. In any thread: it only computes.

        Raises ``TokensError``, and ``IdentityError`` for a chain that is of neither or that another
        cache has made for other KV, and for a namespace of another layout or other chunk sizes.
        ``ArgumentError`` for a scope that is none.
        """
        return self._names.chain(tokens, scope, namespace)

    async def named(self, tokens: Tokens, scope: Scope = PUBLIC) -> ChunkChain:
        """The chain of a prompt, on the loop: others get their turn while a long one is hashed.

        A chain that is given keeps its epoch.
        """
        return await self._names.named(tokens, scope)

    def check_loop(self) -> float:
        """The time, on the cache's own loop. For the control API.

        Raises ``UnsupportedError`` on another loop or none: what is awaited there would never be
        told of its end. ``ClosedError`` and ``ForkedError`` come first.
        """
        now = self._begin()
        try:
            is_here = asyncio.get_running_loop() is self._loop
        except RuntimeError:  # there is none
            is_here = False
        if not is_here:
            raise UnsupportedError(
                "the cache was opened on another event loop, or this thread runs none",
                hint="call it where it was opened; kvlayer.Portal serves other threads and loops",
            )
        return now

    def _begin(self) -> float:
        if self._closed:
            raise ClosedError("the cache is closed", hint="use it inside `async with Cache.open`")
        if os.getpid() != self._pid:
            raise ForkedError(
                f"the cache was opened in process {self._pid} and used in {os.getpid()}",
                hint="open a cache in each process, after the fork",
            )
        return self._clock()

    def _granted(self, hit: PrefixHit) -> tuple[Match, Lease]:
        """What this cache's lookup found, and the lease that holds it, or did."""
        if hit.match is None or hit.lease is None or not self._planner.granted(hit.lease):
            raise LayoutError(
                "this hit did not come from a lookup of this cache",
                hint="use a hit with the cache whose lookup yielded it",
            )
        return hit.match, hit.lease

    def _window(self, kv: KVView, first_token: int) -> Window:
        """The tokens that a view covers, once it is known to be one."""
        instance("kv", kv, KVView, hint="KVView.single(caches, slots)", error=LayoutError)
        self._stack.device.check(kv)
        start = whole("first_token", first_token, error=LayoutError)
        return Window(start, start + kv.num_tokens)


def _say_lost(parts: assembly.OpenCache, pid: int) -> None:
    """A cache was left without being closed: the process ends, or nobody has it any more."""
    if os.getpid() == pid:
        parts.say_lost("the process ended, or forgot its cache,")


def _call(entry: Callable[[], None]) -> None:
    entry()


async def _to_the_end(parts: assembly.OpenCache, *, flush: bool) -> None:
    """Close everything. Being cancelled only ends the wait for the lower tiers, then raises."""
    closing = asyncio.ensure_future(parts.aclose(flush=flush))
    cancelled: asyncio.CancelledError | None = None
    while not closing.done():
        try:
            await asyncio.wait({closing})
        except asyncio.CancelledError as exc:
            cancelled = exc
            parts.stop_flushing()
    if cancelled is not None and (closing.cancelled() or closing.exception() is None):
        raise cancelled
    closing.result()


def _gone(hit: PrefixHit, match: Match) -> Failure:
    """Why what is left of a hit is shorter than it was."""
    lost = next(span for span in hit.spans if span.stop > match.tokens)
    if match.chain.is_stale:
        return Failure(lost, Cause.REBOUND, detail=REBOUND)
    return Failure(lost, Cause.VANISHED, detail="gone since the lookup's lease ran out")


def _store_done(owner: str, report: StoreReport, nbytes: int, seconds: float) -> StoreDone:
    return StoreDone(
        owner=owner,
        stored=report.stored,
        skipped=report.skipped,
        dropped=report.dropped,
        failed=report.failed,
        nbytes=nbytes,
        seconds=seconds,
    )


def _nameless(chain: ChunkChain, start: int) -> list[Failure]:
    """What of a prompt cannot be stored from token ``start`` on, since nothing names it."""
    first = max(start, chain.named_tokens)
    if chain.unnamed is None or first >= chain.num_tokens:
        return []
    detail = f"token {chain.unnamed} has an id of 2^30 or more, which is never named"
    return [Failure(Span(first, chain.num_tokens, b""), Cause.NO_NAME, detail=detail)]
