"""``KVLayerConnector``: what vLLM loads. Hands each hook to the half that this process has.

A hook of kvlayer's that raises is logged and answered as a miss; a version or a model that cannot
be served turns the connector off, with one line that says why, and the engine serves on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from kvlayer.errors import UnsupportedError
from kvlayer_vllm.engine import (
    KVCacheBlocks,
    KVCacheConfig,
    KVCacheManager,
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorOutput,
    KVConnectorPromMetrics,
    KVConnectorRole,
    KVConnectorStats,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    KVTransferConfig,
    Request,
    SchedulerOutput,
    SupportsHMA,
    VllmConfig,
    before_reset,
    check_loads,
    check_version,
    engine_version,
    host_source,
    register,
)
from kvlayer_vllm.introductions import Introduction, announce, withdraw
from kvlayer_vllm.messages import Answers, Step
from kvlayer_vllm.scheduler import SchedulerHalf
from kvlayer_vllm.settings import Settings
from kvlayer_vllm.stats import Figures, PromMetrics
from kvlayer_vllm.worker import WorkerHalf

__all__ = ["KVLayerConnector"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it

T = TypeVar("T")


class KVLayerConnector(KVConnectorBase_V1, SupportsHMA):
    """kvlayer as a connector of vLLM's, in its scheduler and in each of its workers."""

    _cache_hit_source = host_source()

    def __init__(self, vllm_config: VllmConfig, role: Any, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.troubles = 0
        """Hooks that raised and were answered as a miss."""
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._early: dict[str, Request] | None = None
        """Requests that wait until workers elsewhere have introduced themselves; None: not so."""
        settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        if role == KVConnectorRole.WORKER:
            announce(self, vllm_config)
        try:
            check_version(engine_version())
            check_loads(engine_version(), settings.loads)
            if role == KVConnectorRole.SCHEDULER:
                self._scheduler = SchedulerHalf(vllm_config, kv_cache_config, settings)
            else:
                self._worker = WorkerHalf(vllm_config, kv_cache_config, settings)
        except UnsupportedError as exc:
            self._turn_off(exc)

    @property
    def is_on(self) -> bool:
        """Whether anything is loaded or stored."""
        return self._scheduler is not None or self._worker is not None

    @property
    def introduction(self) -> Introduction | None:
        """What a worker tells the scheduler; None while it is off, or has no tensors."""
        return None if self._worker is None else self._worker.introduction

    @property
    def scheduler(self) -> SchedulerHalf | None:
        """The scheduler's half, in the scheduler's process; None while the connector is off."""
        return self._scheduler

    @property
    def _half(self) -> SchedulerHalf | None:
        """The scheduler's half while its cache is open."""
        half = self._scheduler
        return half if half is not None and half.is_open else None

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: what is not stored is computed again

    def _turn_off(self, why: Exception) -> None:
        self._close()
        self._scheduler = self._worker = self._early = None
        _log.warning("kvlayer is off: %s", why)

    def _safely(self, otherwise: T, hook: Callable[..., T], *args: Any) -> T:
        return self._rescued(lambda: otherwise, hook, *args)

    def _rescued(self, rescue: Callable[[], T], hook: Callable[..., T], *args: Any) -> T:
        """The hook, or where it raises ``rescue``, which makes of it a miss that vLLM hears of.

        What ``rescue`` raises is the engine's: going on could mean answering from wrong KV.
        """
        try:
            return hook(*args)
        # Whatever it is: a cache fails into a miss, and this is where it would reach the engine.
        except Exception:  # noqa: BLE001
            self.troubles += 1
            if self.troubles == 1:
                _log.exception("a hook of kvlayer failed and is answered as a miss (told once)")
            return rescue()

    # -- scheduler -------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        """What workers of another connector say of themselves; ours do otherwise."""

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        self._kv_cache_manager = kv_cache_manager
        if self._scheduler is not None:
            self._safely(None, self._scheduler.bind, kv_cache_manager)
            self._safely(None, before_reset, kv_cache_manager, self._before_reset)
            workers = self._scheduler.beside()
            if workers is None:
                self._early = {}
            else:
                self._meet(workers)

    def _meet(self, workers: Mapping[int, Introduction]) -> None:
        """The workers are known: open the cache. Raises what ``Cache.open`` raises."""
        assert self._scheduler is not None
        early, self._early = self._early or {}, None
        try:
            self._scheduler.open(workers)
        except UnsupportedError as exc:
            self._turn_off(exc)
            return
        for request in early.values():
            self._safely(None, self._scheduler.arrived, request)

    def _meet_late(self, workers: Mapping[int, Introduction]) -> None:
        """:meth:`_meet` in an engine that serves by now: what is raised turns the connector off."""
        try:
            self._meet(workers)
        except Exception as exc:  # noqa: BLE001  # whatever it is: no cache is worth an engine
            self._turn_off(exc)

    def _before_reset(self) -> None:
        if (half := self._half) is not None:
            self._safely(None, half.before_reset)

    def has_pending_block_frees(self) -> bool:
        return (half := self._half) is not None and self._safely(False, half.will_free)

    def has_pending_push_work(self) -> bool:
        if self._early is not None:
            return True  # a step in which the workers introduce themselves
        return (half := self._half) is not None and self._safely(False, half.holds_blocks)

    def on_new_request(self, request: Request) -> None:
        if self._early is not None:
            self._early[request.request_id] = request
        elif (half := self._half) is not None:
            self._safely(None, half.arrived, request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        nothing: tuple[int | None, bool] = (0, False)
        if self._early is not None:
            return None, False  # a step later: nothing is stored of whom nobody knew
        if (half := self._half) is None:
            return nothing
        return self._safely(nothing, half.matched, request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if (half := self._half) is None:
            return
        # What was promised must be loaded or reported.
        told = request, blocks.get_block_ids(), num_external_tokens
        self._rescued(partial(half.not_allocated, *told), half.allocated, *told)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        step = Step(asks=self._early is not None)
        if (half := self._half) is not None:
            self._rescued(partial(half.rest_of, step), half.step, scheduler_output, step)
        return step

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        said = connector_output.kv_connector_worker_meta
        answers = said if isinstance(said, Answers) else None
        if self._early is not None:
            self._meet_late({} if answers is None else answers.introductions)
        elif (half := self._half) is not None:
            self._safely(None, half.heard, answers)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._early is not None:
            self._early.pop(request.request_id, None)
        elif (half := self._half) is not None:
            self._safely(None, half.finished, request, block_ids)
        return False, None  # what is still read of it is held by reference

    def take_events(self) -> Iterable[Any]:
        nothing: list[Any] = []
        return nothing if (half := self._half) is None else self._safely(nothing, half.take_events)

    def reset_cache(self) -> bool | None:
        return None if (half := self._half) is None else self._safely(False, half.reset)

    # -- worker ----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        if self._worker is not None:
            try:
                self._worker.registered(kv_caches)
            except UnsupportedError as exc:
                self._turn_off(exc)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        """It does: see :meth:`unregister_kv_caches`. From vLLM 0.33 on."""
        return True

    def unregister_kv_caches(self) -> None:
        """The engine goes to sleep. What this raises is the engine's: its memory is still read."""
        if self._worker is not None:
            self._worker.unregistered()

    def restore_kv_caches(self) -> None:
        if self._worker is not None:
            self._worker.restored()

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self._worker is not None:
            step = _step(kv_connector_metadata)
            self._rescued(partial(self._worker.give_up, step), self._worker.before_step, step)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            step = _step(self._get_connector_metadata())
            self._rescued(partial(self._worker.give_up, step), self._worker.load, step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            step = _step(self._get_connector_metadata())
            self._rescued(partial(self._worker.give_up, step), self._worker.layer, layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Stored once the step has ended and its output was accepted."""

    def wait_for_save(self) -> None:
        """Stored once the step has ended and its output was accepted."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        step = _step(self._get_connector_metadata())
        return KVConnectorTransferResults(
            finished_recving=set(step.received),
            failed_recving=set(step.failed),
        )

    def get_block_ids_with_load_errors(self) -> set[int]:
        if self._worker is None:
            return set()
        step = _step(self._get_connector_metadata())
        rescue = partial(self._worker.all_blocks, step)
        return self._rescued(rescue, self._worker.invalid_blocks, step)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        step = _step(self._get_connector_metadata())
        if self._worker is None:  # off, which the scheduler must hear once
            return Answers(step.number) if step.asks else None
        return self._rescued(partial(Answers, step.number), self._worker.answers, step)

    # -- where vLLM logs and is scraped ----------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return Figures(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """The families for vLLM's registry, in the process that is scraped; None while off.

        Never raises: there is no engine to answer a miss, and none may fail to start for a figure.
        """
        try:
            check_version(engine_version())
            return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        except UnsupportedError:
            return None  # the connector says that it is off
        except Exception:  # noqa: BLE001  # metrics are never worth an engine
            _log.exception("kvlayer's metrics are not shown")
            return None

    # -- both ------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What the cache has counted since the last step; it is beside the scheduler."""
        nothing: KVConnectorStats | None = None
        return nothing if (half := self._half) is None else self._safely(nothing, half.figures)

    def shutdown(self) -> None:
        withdraw(self)
        self._close()

    def _close(self) -> None:
        if self._scheduler is not None:
            self._safely(None, self._scheduler.close)
        if self._worker is not None:
            self._safely(None, self._worker.close)


def _step(metadata: KVConnectorMetadata) -> Step:
    assert isinstance(metadata, Step)
    return metadata


register()  # a MultiConnector looks for figures by the name of their connector, however it found it
