"""The scheduler's half: which prefix a request can have, what is stored of it, who must wait.

It runs in vLLM's scheduling loop and never waits: lookups are polled, copies are jobs on the
portal's loop. What a step computed is stored only after vLLM has accepted the step's output, and
only as far as vLLM counts it as computed: a step that ran on a failed load is not.

Longer than other files: what is loaded, stored and let go of is decided from the same few tables of
requests, in the order of vLLM's hooks, and read apart the rules would hide each other.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kvlayer import Cache, Portal
from kvlayer.errors import IdentityError, KVLayerError, UnsupportedError
from kvlayer.job import Job
from kvlayer.layout import HitRule
from kvlayer.lookup import Lookup
from kvlayer.tier.ranks import Ranks
from kvlayer_vllm.engine import KVCacheConfig, Request, VllmConfig
from kvlayer_vllm.groups import engine_groups, refuse_parallel
from kvlayer_vllm.hands import Hands, LocalHands, RemoteHands
from kvlayer_vllm.identity import namespace_of
from kvlayer_vllm.messages import Answers, Handshake, Step
from kvlayer_vllm.moves import Load, Save, slots_of
from kvlayer_vllm.scopes import Adapters, scope_of
from kvlayer_vllm.search import Search
from kvlayer_vllm.settings import Settings
from kvlayer_vllm.tracked import Tracked

__all__ = ["SchedulerHalf"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it


class SchedulerHalf:
    """Made with the engine's scheduler, usable once :meth:`open` has met the workers.

    Raises ``ConfigError`` and ``UnsupportedError``.
    """

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings
    ) -> None:
        self._vllm_config = vllm_config
        self._settings = settings
        transfer = vllm_config.kv_transfer_config
        self._loads = bool(transfer.is_kv_consumer)
        self._stores = bool(transfer.is_kv_producer)
        refuse_parallel(vllm_config)
        self._groups = engine_groups(vllm_config, kv_cache_config)
        self._block_sizes = [each.tokens_per_block for each in self._groups]
        self._has_windows = any(each.group.hit_rule is HitRule.TRAILING for each in self._groups)
        self._cache_config = settings.fitting(max(self._block_sizes))
        self._adapters = Adapters()
        self._block_table: Any = None
        self._portal: Portal | None = None
        self._hands: Hands = LocalHands([])
        self._tracked: dict[str, Tracked] = {}
        self._leaving: dict[str, Tracked] = {}
        """Finished, with blocks that are still read."""
        self._starting: list[Tracked] = []
        """To be loaded with the next step."""
        self._loading: dict[str, Tracked] = {}
        self._scheduled: Sequence[str] = ()
        self._is_asked = False
        """A request has been told to ask again."""
        if transfer.kv_load_failure_policy != "recompute":
            # vLLM reads it after this; its default would fail requests whose load failed.
            transfer.kv_load_failure_policy = "recompute"
            _log.info(
                "kv_load_failure_policy is 'recompute' from here on: a cache fails into a miss"
            )

    def open(self, workers: Mapping[int, Handshake]) -> None:
        """Open the cache for these workers, by their rank. Raises what ``Cache.open`` raises.

        ``UnsupportedError`` where there are none: each has said in its own log why it is off.
        """
        if not workers:
            raise UnsupportedError("no worker of the engine has introduced itself")
        ranks = [workers[number].rank for number in sorted(workers)]
        first = workers[min(workers)]
        namespace = namespace_of(
            self._vllm_config,
            [held.group for held in first.rank.layout.groups],
            self._cache_config,
            isa=first.rank.isa,
        )
        if first.caches is not None:
            self._hands = LocalHands(first.caches)
            self._portal = Portal.open(
                self._cache_config,
                first.rank.layout,
                namespace,
                make_stager=first.rank.make_stager(),
            )
        else:
            team = Ranks([rank.layout for rank in ranks])
            self._portal = Portal.open(self._cache_config, first.rank.layout, namespace, ranks=team)
            self._hands = RemoteHands(team)
        _log.info(
            "kvlayer is on: namespace %s, form %s, loads %s",
            namespace.digest[:12],
            first.rank.layout.groups[0].form,
            "async" if self._is_async else self._settings.loads,
        )

    def bind(self, block_table: Any) -> None:
        """``block_table.get_block_ids(request_id)`` is where a request's KV lies."""
        self._block_table = block_table

    @property
    def is_open(self) -> bool:
        """Whether the workers have introduced themselves."""
        return self._portal is not None

    @property
    def tracked(self) -> int:
        """Requests whose blocks may still be read or written."""
        return len(self._tracked) + len(self._leaving) + len(self._loading)

    @property
    def portal(self) -> Portal:
        """The cache. Raises ``UnsupportedError`` before :meth:`open`."""
        if self._portal is None:
            raise UnsupportedError("the engine has not introduced its workers")
        return self._portal

    @property
    def _is_async(self) -> bool:
        """Whether requests wait beside the batch: where no worker of this process can wait in a
        step, and where vLLM cannot be told which blocks failed (several KV groups)."""
        return (
            self._settings.loads == "async"
            or not self._hands.is_local
            or len(self._block_sizes) > 1
        )

    # -- a request arrives and is scheduled ------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """Start to look for its prefix."""
        tracked = self._tracked[request.request_id] = Tracked(request, self._search(request))
        if request.resumable:
            self._exclude(tracked, "a session whose prompt grows while it is computed")
        elif self._loads and not request.skip_reading_prefix_cache:
            self._poll(tracked)

    def _poll(self, tracked: Tracked) -> int | None:
        """Tokens of the request that lie in host memory; None while that is not known."""
        if tracked.search is None:
            return 0
        try:
            return tracked.search.poll()
        except IdentityError as exc:
            self._exclude(tracked, str(exc))
            return 0

    def _exclude(self, tracked: Tracked, why: str) -> None:
        """Nothing is loaded for a request, nor stored of it: no name would be its own."""
        _log.debug("request %s is computed and not stored: %s", tracked.request.request_id, why)
        if tracked.search is not None:
            tracked.search.release()
            tracked.search = None

    def _search(self, request: Request) -> Search:
        return Search(
            self.portal,
            lambda: array("i", request.all_token_ids[: request.num_tokens]),
            partial(scope_of, request, self._adapters),
            clock=time.monotonic,
            lease_seconds=self._cache_config.lease_seconds,
        )

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond ``computed`` that can be loaded, None while that is not known.

        One token is always left to compute: its logits are wanted.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not self._loads:
            return 0, False
        found = self._poll(tracked)
        if found is None:
            self._is_asked = True
            return None, False
        tracked.found = found
        more = min(found, request.num_tokens - 1) - computed
        return (more, self._is_async) if more > 0 else (0, False)

    def allocated(self, request: Request, block_ids: Sequence[Sequence[int]], more: int) -> None:
        """Blocks are there; ``more`` tokens are to be loaded into them (0: none)."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.search is None:
            return
        if not more:
            if tracked.load is None:
                tracked.search.release()
            return
        lookup = tracked.search.take()
        load = self._promised(tracked, block_ids, more, lookup)
        first = load.first
        # All that was found: the last token is computed again, into a block that is whole by then.
        held = min(len(ids) * size for ids, size in zip(block_ids, self._block_sizes, strict=True))
        stop = min(tracked.found, held)
        slots = [
            slots_of(ids, size, first, stop)
            for ids, size in zip(block_ids, self._block_sizes, strict=True)
        ]
        view = self._hands.view(slots, load)
        is_layerwise = self._settings.loads == "layerwise"
        load.prepare(
            lambda landed: self.portal.submit(
                Cache.retrieve,
                lookup.hit,
                view,
                first_token=first,
                on_layer=landed if is_layerwise else None,
            )
        )
        tracked.saved = stop

    def not_allocated(
        self, request: Request, block_ids: Sequence[Sequence[int]], more: int
    ) -> None:
        """:meth:`allocated` has failed: what was promised is going to be a load that failed."""
        tracked = self._tracked.get(request.request_id)
        if more and tracked is not None and tracked.load is None:
            self._promised(tracked, block_ids, more, None)

    def _promised(
        self,
        tracked: Tracked,
        block_ids: Sequence[Sequence[int]],
        more: int,
        lookup: Lookup | None,
    ) -> Load:
        """What vLLM relies on from here on: unless the load is prepared, it is one that failed."""
        promised = min(tracked.found, tracked.request.num_tokens - 1)
        load = Load(
            tracked.request.request_id,
            lookup,
            first=promised - more,
            promised=promised,
            blocks=tuple(block_ids[0]) if len(block_ids) == 1 else None,
            tokens_per_block=self._block_sizes[0],
        )
        tracked.load = load
        tracked.is_doubtful = True
        self._starting.append(tracked)
        return load

    # -- a step goes out -------------------------------------------------------------------------

    def step(self, scheduler_output: Any, step: Step) -> None:
        """Say in ``step`` what the workers are to do with it."""
        self._scheduled = tuple(scheduler_output.num_scheduled_tokens)
        step.is_idle = self._is_asked and not self._scheduled
        self._is_asked = False
        self._hands.fill(step)
        step.saves = self._overtaken(scheduler_output.preempted_req_ids or ())
        for save in step.saves:
            self._hands.revoke(save)
        step.must_wait = not self._is_async
        for tracked in self._starting:
            assert tracked.load is not None
            self._loading[tracked.load.request_id] = tracked
            if self._hands.is_local:
                step.loads.append(tracked.load)
            else:
                tracked.load.begin()
                step.is_idle = True
        self._starting = []
        if self._is_async:
            self._land(step)
        self._let_go(step)
        if not self._hands.is_local:
            step.saves = []  # these workers get orders

    def rest_of(self, step: Step) -> None:
        """:meth:`step` has failed: add what vLLM must hear, whatever is in ``step`` by now.

        Loads that no worker was told of are over; any block may be let go of in this step.
        """
        for tracked in self._starting:
            load = tracked.load
            assert load is not None
            self._loading[load.request_id] = tracked
            if load in step.loads:
                continue
            load.distrust()
            if not self._is_async:
                step.invalid |= load.invalid_blocks()
        self._starting = []
        step.must_wait = not self._is_async
        step.saves = [
            save
            for tracked in (*self._tracked.values(), *self._leaving.values())
            for save in tracked.running_saves()
        ]
        if not self._hands.is_local:
            for save in step.saves:
                self._hands.revoke(save)
            step.saves = []
        if self._is_async:
            self._land(step)
        self._let_go(step)

    def _let_go(self, step: Step) -> None:
        """Report the finished requests whose blocks nothing reads any more."""
        for request_id, tracked in list(self._leaving.items()):
            if not tracked.running_saves():
                del self._leaving[request_id]
                step.sent.add(request_id)

    def _overtaken(self, preempted: Sequence[str]) -> list[Save]:
        """Saves that are not over, of blocks that the engine has let go of."""
        if self._has_windows:  # blocks leave a window with any step
            who = [*self._tracked.values()]
        else:
            who = [self._tracked[each] for each in preempted if each in self._tracked]
        return [save for tracked in who for save in tracked.running_saves()]

    def _land(self, step: Step) -> None:
        """Report the loads that have ended."""
        for request_id, tracked in list(self._loading.items()):
            load = tracked.load
            assert load is not None
            if load in step.loads or not load.is_over:
                step.is_idle = step.is_idle or not self._scheduled
                continue
            if not load.is_whole:  # said first: what is not whole must never count as received
                if len(self._block_sizes) > 1:
                    step.failed.add(request_id)
                else:
                    step.invalid |= load.invalid_blocks()
            step.received.add(request_id)
            del self._loading[request_id]
            self._loaded(tracked, load)

    def _loaded(self, tracked: Tracked, load: Load) -> None:
        if not load.is_whole:
            _log.warning(
                "request %s: %d of %d tokens were loaded, the rest is computed",
                load.request_id,
                load.tokens,
                load.promised,
            )
            tracked.saved = load.tokens if len(self._block_sizes) == 1 else 0
        load.release()
        tracked.load = None

    # -- a step comes back -----------------------------------------------------------------------

    def heard(self, answers: Answers | None) -> None:
        """The step's output is accepted: store what is new of the requests it computed."""
        if answers is not None:
            self._hands.hear(answers)
        is_right = self._settled_loads()
        for request_id in self._scheduled:
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            tracked.is_doubtful = not is_right
            if is_right:
                self._store_new(tracked)
        self._scheduled = ()

    def _settled_loads(self) -> bool:
        """End the loads that the step waited for. Whether all of them were whole.

        If one was not, blocks that hold nothing yet may count as computed for any request that
        shares them: nothing of this step is stored.
        """
        if self._is_async:
            return True
        is_right = True
        for tracked in self._loading.values():
            load = tracked.load
            assert load is not None
            is_right = is_right and load.is_over and load.is_whole
            self._loaded(tracked, load)
        self._loading.clear()
        return is_right

    def _store_new(self, tracked: Tracked) -> None:
        computed = tracked.computed
        if not tracked.has_prompt and computed >= tracked.request.num_prompt_tokens:
            tracked.has_prompt = True
            self._store(tracked, computed, tail=True)
            return
        chunk = self._cache_config.tokens_per_chunk
        if computed // chunk > tracked.saved // chunk:
            self._store(tracked, computed // chunk * chunk, tail=False)

    def _store(
        self,
        tracked: Tracked,
        stop: int,
        *,
        tail: bool,
        block_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Store tokens up to ``stop`` beyond those that are saved."""
        if not self._stores or tracked.search is None or tracked.load is not None:
            return
        stop -= stop % self._cache_config.tail_tokens
        if stop <= tracked.saved:
            return
        try:
            scope = scope_of(tracked.request, self._adapters)
        except IdentityError as exc:
            self._exclude(tracked, str(exc))
            return
        if scope is None:
            return  # its adapter's digest is still being made
        chunk = self._cache_config.tokens_per_chunk
        first = tracked.saved // chunk * chunk
        ids = block_ids or self._block_table.get_block_ids(tracked.request.request_id)
        slots = [
            slots_of(each, size, first, stop)
            for each, size in zip(ids, self._block_sizes, strict=True)
        ]
        if min(map(len, slots)) < stop - first:
            return
        save = Save(tracked.request.request_id)
        tokens = array("i", tracked.request.all_token_ids[:stop])
        view = self._hands.view(slots, save)
        save.begin(self.portal, tokens, view, scope, first_token=first, tail=tail)
        tracked.saves.append(save)
        tracked.saved = stop

    def finished(self, request: Request, block_ids: Sequence[Sequence[int]]) -> bool:
        """The request is over: store the rest. Whether its blocks must stay for now."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return False
        try:
            self._store_rest(tracked, block_ids)
        except Exception:  # noqa: BLE001  # whatever it is: blocks that are still read must stay
            _log.exception("what request %s has computed is not stored", request.request_id)
        if tracked.search is not None:
            tracked.search.release()
        if self._is_async and tracked.is_doubtful:
            return False  # vLLM holds the blocks until it hears that the load has ended
        if not tracked.running_saves():
            return False
        self._leaving[request.request_id] = tracked
        return True

    def _store_rest(self, tracked: Tracked, block_ids: Sequence[Sequence[int]]) -> None:
        load = tracked.load
        if load is not None and not self._is_async and load.is_over and load.is_whole:
            self._loading.pop(load.request_id, None)
            self._loaded(tracked, load)
            tracked.is_doubtful = False
        if not tracked.is_doubtful:
            self._store(tracked, tracked.computed, tail=True, block_ids=block_ids)

    # -- the rest --------------------------------------------------------------------------------

    def reset(self) -> bool:
        """Forget everything of this namespace, in all tiers. Whether all of it went."""
        for tracked in (*self._tracked.values(), *self._leaving.values()):
            for save in tracked.running_saves():
                save.cancel()  # or it would be there again
        job: Job[int] = self.portal.submit(_clear)
        try:
            job.wait(self._cache_config.close_seconds)
        except KVLayerError:
            _log.exception("the cache was not cleared")
            return False
        return True

    def close(self) -> None:
        """Store what is under way and close the cache. Idempotent."""
        self._adapters.close()
        portal, self._portal = self._portal, None
        if portal is not None:
            portal.close()


async def _clear(cache: Cache) -> int:
    return await cache.control.clear()
