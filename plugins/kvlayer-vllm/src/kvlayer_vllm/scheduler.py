"""The scheduler's half: which prefix a request can have, what is stored of it, what is held.

It runs in vLLM's scheduling loop and never waits: lookups are polled, copies are jobs on the
portal's loop. What a step computed is stored only after vLLM has taken the step's output, however
many others are under way (``steps_under_way``), and only as far as vLLM counts it as computed: a
step that ran on a failed load is not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from kvlayer import Cache, Portal
from kvlayer.api.hit import PrefixHit
from kvlayer.errors import ClosedError, ForkedError, IdentityError, UnsupportedError
from kvlayer.events import Sink
from kvlayer_vllm.block_events import BlockEvents
from kvlayer_vllm.device_order import EngineStream
from kvlayer_vllm.engine import (
    KVCacheConfig,
    KVCacheManager,
    Request,
    SchedulerOutput,
    VllmConfig,
    tokens_per_hash,
)
from kvlayer_vllm.groups import block_sizes, engine_groups, refuse_parallel, state_sizes
from kvlayer_vllm.hands import LocalHands, WorkerLink
from kvlayer_vllm.held_blocks import HeldBlocks
from kvlayer_vllm.introductions import Introduction, announced
from kvlayer_vllm.kept_states import KeptStates
from kvlayer_vllm.lent_tensors import LentTensors
from kvlayer_vllm.messages import Answers, Step
from kvlayer_vllm.opened import Opened
from kvlayer_vllm.prefill_pace import PrefillPace
from kvlayer_vllm.promises import PendingLoads
from kvlayer_vllm.ranks import is_beside_scheduler
from kvlayer_vllm.scopes import Digests, scope_of
from kvlayer_vllm.search import Search
from kvlayer_vllm.settings import Settings
from kvlayer_vllm.siblings import may_load, recompute_failed_loads, warn_of_single_groups
from kvlayer_vllm.stats import Figures, StatsSink
from kvlayer_vllm.steps_under_way import StepsUnderWay
from kvlayer_vllm.stores import Stores
from kvlayer_vllm.token_ids import TokenIds
from kvlayer_vllm.tracked import Tracked
from kvlayer_vllm.wishes import Wishes

__all__ = ["SchedulerHalf"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it


class SchedulerHalf:
    """Made with the engine's scheduler, usable once :meth:`open` has met the workers.

    Raises ``ConfigError`` and ``UnsupportedError``.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._vllm_config = vllm_config
        self._settings = settings
        self._may_load = may_load(vllm_config)
        self._may_store = bool(vllm_config.kv_transfer_config.is_kv_producer)
        refuse_parallel(vllm_config)
        self._groups = engine_groups(vllm_config, kv_cache_config)
        self._block_sizes = block_sizes(self._groups)
        self._tables = [each.table for each in self._groups]
        self._cache_config = settings.cache
        self._digests = Digests()
        self._block_table: KVCacheManager = None
        events = vllm_config.kv_events_config
        self._events: BlockEvents | None = None
        if events is not None and events.enable_kv_cache_events:
            self._events = BlockEvents(self._groups)
        self._stats = StatsSink(clock)
        self._portal: Portal | None = None
        self._promises: PendingLoads
        self._hands: WorkerLink = LocalHands(LentTensors([], EngineStream("cpu")), ())
        self._tracked: dict[str, Tracked] = {}
        self._held = HeldBlocks(settings.held_share)
        self._kept = KeptStates(state_sizes(self._groups), self._stats.store_cut)
        self._steps = StepsUnderWay(clock)
        self._pace = PrefillPace(self._computed, least=settings.cache.tokens_per_chunk, clock=clock)
        self._is_asked = False
        """A request has been told to ask again."""
        recompute_failed_loads(vllm_config)
        warn_of_single_groups(vllm_config, kv_cache_config)

    def beside(self) -> Mapping[int, Introduction] | None:
        """The worker of this process, where it is on; None where the workers are elsewhere."""
        if not is_beside_scheduler(self._vllm_config):
            return None
        worker = announced(self._vllm_config)
        said = None if worker is None else worker.introduction
        return {} if said is None else {0: said}

    def open(self, workers: Mapping[int, Introduction]) -> None:
        """Open the cache for these workers, by their rank. Raises what :meth:`Opened.of` raises."""
        sinks: list[Sink] = [self._stats] if self._events is None else [self._stats, self._events]
        opened = Opened.of(self._vllm_config, self._settings, workers, self._tables, sinks)
        self._cache_config, portal, self._hands, said = opened
        self._portal = portal
        self._promises = PendingLoads(
            portal,
            self._hands,
            self._block_sizes,
            self._settings.loads,
            states=self._kept.tables,
        )
        self._stores = Stores(
            portal,
            self._hands,
            self._block_sizes,
            self._cache_config,
            digests=self._digests,
            events=self._events,
            held=self._held,
            kept=self._kept,
            on_cut=self._stats.store_cut,
        )
        loads = "async" if self._promises.is_async else self._settings.loads
        _log.info("kvlayer is on: %s, loads %s", said, loads)

    def bind(self, block_table: KVCacheManager) -> None:
        """``block_table`` is vLLM's ``KVCacheManager``: where KV lies, and whose the blocks are."""
        self._block_table = block_table
        self._held.bind(block_table.block_pool)
        self._kept.bind(block_table.block_pool)
        if self._events is not None:
            self._events.tokens_per_hash = tokens_per_hash(block_table)

    @property
    def is_open(self) -> bool:
        """Whether the workers have introduced themselves."""
        return self._portal is not None

    @property
    def tracked(self) -> int:
        """Requests that are not over, stores that read blocks, and loads that vLLM awaits."""
        return len(self._tracked) + len(self._held) + len(self._promises)

    @property
    def portal(self) -> Portal:
        """The cache. Raises ``UnsupportedError`` before :meth:`open`."""
        if self._portal is None:
            raise UnsupportedError("the engine has not introduced its workers")
        return self._portal

    # -- a request arrives and is scheduled ------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """Start to look for its prefix."""
        self._replaced_by(request)
        ids = TokenIds(request.all_token_ids, is_rewritten=request.resumable)
        has_states = bool(self._kept.tables)
        tracked = Tracked(request, ids, None, Wishes.of(request), has_states=has_states)
        tracked.search = self._search(tracked)
        self._tracked[request.request_id] = tracked
        if self._is_asked_for(tracked) and tracked.wishes.most_loaded is None:
            self._poll(tracked)

    def _replaced_by(self, request: Request) -> None:
        """Requests with an adapter that this one replaces in place are computed from now on."""
        lora = request.lora_request
        if lora is None or not lora.load_inplace:
            return
        self._digests.replaced(lora.lora_int_id, lora.lora_path)
        for tracked in self._tracked.values():
            other = tracked.request.lora_request
            named = None if other is None else (other.lora_int_id, other.lora_path)
            if named == (lora.lora_int_id, lora.lora_path):
                tracked.exclude("its adapter is replaced in place")

    def _is_asked_for(self, tracked: Tracked) -> bool:
        """Whether anything is loaded for it."""
        is_wished = tracked.wishes.most_loaded != 0
        return self._may_load and is_wished and not tracked.request.skip_reading_prefix_cache

    def _poll(self, tracked: Tracked) -> int | None:
        """Tokens of the request that lie in host memory; None while that is not known."""
        if tracked.search is None or tracked.has_failed:
            return 0
        try:
            return tracked.search.poll()
        except IdentityError as exc:
            tracked.exclude(str(exc))
            return 0

    def _search(self, tracked: Tracked) -> Search:
        request = tracked.request
        return Search(
            self.portal,
            tracked.ids,
            tracked.wanted,
            partial(scope_of, request, self._digests, tracked.wishes),
            clock=self._clock,
            lease_seconds=self._cache_config.lease_seconds,
            on_found=None if self._events is None else partial(self._found, self._events, request),
        )

    def _found(self, events: BlockEvents, request: Request, hit: PrefixHit) -> None:
        self.portal.submit(events.learn, request, hit.spans)

    def matched(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond ``computed`` that can be loaded, None while that is not known.

        One token is always left to compute: its logits are wanted.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None or not self._is_asked_for(tracked):
            return 0, False
        tracked.looks_from(computed)
        found = self._poll(tracked)
        if found is None:
            self._is_asked = True
            return None, False
        tracked.local, tracked.found = computed, found
        more = min(found, request.num_tokens - 1) - computed
        return (more, self._promises.is_async) if more > 0 else (0, False)

    def allocated(self, request: Request, block_ids: Sequence[Sequence[int]], more: int) -> None:
        """Blocks are there; ``more`` tokens are to be loaded into them (0: none)."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.search is None:
            return
        if more:
            self._promises.make(tracked, block_ids, more)
        elif tracked.load is None:
            tracked.search.release()

    def not_allocated(
        self, request: Request, block_ids: Sequence[Sequence[int]], more: int
    ) -> None:
        """:meth:`allocated` has failed: what was promised is going to be a load that failed."""
        tracked = self._tracked.get(request.request_id)
        if more and tracked is not None:
            self._promises.make_failed(tracked, block_ids, more)

    # -- a step goes out -------------------------------------------------------------------------

    def step(self, scheduler_output: SchedulerOutput, step: Step) -> None:
        """Say in ``step`` what the workers are to do with it."""
        self._held.let_go()
        record = self._steps.begin(step)
        for request_id in scheduler_output.preempted_req_ids or ():
            if request_id in self._tracked:
                self._start_over(self._tracked[request_id])
        self._keep_states(scheduler_output)
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            if request_id in self._tracked:
                record.add(self._tracked[request_id], count)
        step.is_idle = not record.computes and (self._is_asked or bool(self._held))
        self._is_asked = False
        self._hands.fill(step)
        self._promises.send(step, record)
        self._promises.land(step, record)
        if step.is_idle and self._hands.is_local:
            step.land = partial(self._promises.land, step, record)

    def _start_over(self, tracked: Tracked) -> None:
        tracked.start_over()
        self._kept.dropped(tracked)

    def _keep_states(self, scheduler_output: SchedulerOutput) -> None:
        """Hold the states that this step computes at boundaries."""
        if not self._kept.tables or not self._may_store:
            return
        told = scheduler_output.kv_connector_block_state
        for request_id, offers in told.boundary_state_offloads.items():
            tracked = self._tracked.get(request_id)
            if tracked is None or tracked.search is None:
                continue
            most = tracked.wishes.most_stored
            wanted = [each for each in offers if most is None or each[2] <= most]
            self._kept.offered(tracked, wanted, self._held.room - self._kept.blocks)

    def rest_of(self, step: Step) -> None:
        """:meth:`step` has failed: add what vLLM must hear, whatever is in ``step`` by now.

        Any request may lose its blocks in this step, so that nothing computed before it counts.
        """
        record = self._steps.begin(step)
        for tracked in self._tracked.values():
            self._start_over(tracked)
        self._promises.send_failed(step, record)
        self._promises.land(step, record)

    # -- a step comes back -----------------------------------------------------------------------

    def heard(self, answers: Answers | None) -> None:
        """The step's output is taken: store what is new of the requests it computed.

        A step without an answer is heard of with the next one that has.
        """
        if answers is None:
            return
        self._hands.hear(answers)
        if answers.refusals and (self._may_load or self._may_store):
            self._may_load = self._may_store = False
            _log.warning("kvlayer is off: %s", "; ".join(answers.refusals.values()))
        self._held.let_go()
        grown: dict[Tracked, None] = {}
        records = self._steps.heard(answers.step)
        self._pace.heard(records)
        for record in records:
            for tracked in record.computes:
                record.has_written(tracked)
            if record.is_right:
                grown |= dict.fromkeys(record.computes)
            self._promises.settle(record)
        failed: Exception | None = None
        for tracked in grown:
            if not self._may_store or self._tracked.get(tracked.request.request_id) is not tracked:
                continue
            try:
                self._stores.new(tracked, self._block_table)
            except Exception as exc:  # noqa: BLE001  # whatever it is, it is this request's alone
                tracked.exclude(f"storing it failed: {exc}")
                failed = failed or exc
        if failed is not None:
            raise failed

    def _computed(self, tokens: int, seconds: float) -> None:
        """Tell the cache how fast the engine computes prompts. Waits for nothing."""
        if self._settings.report_prefill:
            told = partial(_report_prefill, self.portal.cache, tokens, seconds)
            with suppress(ClosedError, ForkedError):  # nobody is going to load any more
                self.portal.post([told])

    def finished(self, request: Request, block_ids: Sequence[Sequence[int]]) -> None:
        """The request is over: store the rest. Its blocks need not stay."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return
        try:
            self._steps.taken_of(tracked)
            self._promises.settle_early(tracked)
            if self._may_store and not tracked.is_awaited:
                self._stores.rest(tracked, block_ids)
        finally:
            self._kept.dropped(tracked)
            if tracked.search is not None:
                tracked.search.release()

    # -- blocks ----------------------------------------------------------------------------------

    def holds_blocks(self) -> bool:
        """Whether vLLM must step on, with nothing to compute, until it has its blocks back."""
        self._held.let_go()
        return bool(self._held)

    def will_free(self) -> bool:
        """Whether vLLM gets blocks back without preempting a request for them."""
        return self._held.will_free() or self._kept.give_up()

    def before_reset(self) -> None:
        """vLLM is about to reset its prefix cache, which it does not while a block is held.

        Blocks are let go of once they are read: waits as long as copying takes. What workers in
        other processes read is let go of with the steps under way. What vLLM has not been told yet
        of loads counts as failed: it may be about to give up the memory that they have filled.
        """
        if self.is_open:
            self._promises.distrust()
        self._kept.give_up()
        if self._hands.is_local:
            self._held.wait()
        self._held.let_go()

    # -- the rest --------------------------------------------------------------------------------

    def figures(self) -> Figures | None:
        """What has happened since the last call, for vLLM's statistics."""
        return self._stats.take(
            self.portal.cache, held_blocks=self._held.blocks + self._kept.blocks
        )

    def take_events(self) -> list[Any]:
        """What has happened to blocks in kvlayer's tiers since the last call; none unless asked."""
        return [] if self._events is None else self._events.take()

    def reset(self) -> bool:
        """Forget everything of this namespace, in all tiers. Whether all of it went.

        The model's weights may be others from now on. Requests that have computed something are
        neither stored nor given anything from now on; the others are looked up anew.
        """
        for tracked in self._tracked.values():
            self._start_over(tracked)
            if tracked.load is not None or tracked.request.num_computed_tokens:
                tracked.exclude("the cache was reset while it was computed")
            elif tracked.search is not None:
                tracked.search.release()
        self._digests.start_over()
        for tracked in self._tracked.values():  # one that has not run yet will replace all the same
            self._replaced_by(tracked.request)
        is_empty = self._stores.forget()
        self._held.let_go()
        return is_empty

    def close(self) -> None:
        """Store what is under way and close the cache. Idempotent."""
        self._digests.close()
        portal, self._portal = self._portal, None
        if portal is not None:
            portal.close()


def _report_prefill(cache: Cache, tokens: int, seconds: float) -> None:
    """On the cache's loop."""
    with suppress(ClosedError, ForkedError):
        cache.report_prefill(tokens, seconds)
