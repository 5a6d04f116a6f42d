"""``KVLayerTier``: kvlayer's tiers behind the host memory of vLLM's own offload.

vLLM moves KV between its blocks and its host memory, and says which chunks of that to store and to
load. This stores and loads them, verified and bounded, in vLLM's memory, on a loop of its own. No
hook of it waits but those that vLLM means to wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from functools import partial
from threading import Condition
from typing import Any, ClassVar, NamedTuple, TypeAlias

from kvlayer import CacheConfig
from kvlayer.api.lower_tiers import outlives
from kvlayer.api.object_store import ObjectStore
from kvlayer.config.registry import BACKENDS, open_backend
from kvlayer.errors import ClosedError, ForkedError, UnsupportedError
from kvlayer.runtime.job import Job
from kvlayer.runtime.loop_thread import LoopThread
from kvlayer.telemetry.log import LogSink
from kvlayer_vllm.engine_offload import (
    JobResult,
    Locality,
    LookupResult,
    Medium,
    OffloadingSpec,
    ReqContext,
    RequestOffloadingContext,
    SecondaryTierManager,
    TransferJob,
    check_root,
    check_tier_version,
    has_adapter,
    hash_root,
    offloading_engine,
    tell_adapters,
)
from kvlayer_vllm.tier.naming import name_of, namespace_for
from kvlayer_vllm.tier.verdicts import Verdicts

__all__ = ["KVLayerTier"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it

_AT_ONCE = 32  # chunks of a job that are under way together


class KVLayerTier(SecondaryTierManager):
    """``{"type": "KVLayerTier", "module_path": "kvlayer_vllm.tier", "tiers": [...]}``.

    Its options are the fields of ``kvlayer.CacheConfig``, of which ``tiers`` are all that it keeps
    chunks in, nearest first; ``config`` names a TOML file with the rest. Where something cannot be
    served it is off, with one line in the log: vLLM goes on as if it held nothing.

    A request with a LoRA adapter is neither stored nor served: vLLM names an adapter by what it is
    called and where it lies, which says nothing of what is in it.
    """

    medium: ClassVar[Any] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        config: str | None = None,
        locality: str | None = None,
        **fields: Any,
    ) -> None:
        """Opens the tiers. Raises ``ConfigError``, ``IdentityError``, and what opening raises."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if locality is not None:
            self.locality = Locality(locality)
        self._verdicts = Verdicts(self._ask)
        self._changed = Condition()
        """Guards what follows."""
        self._running = 0
        """Jobs whose memory is in use."""
        self._ended: list[tuple[_Task, Moved]] = []
        """Jobs that vLLM has not heard of yet."""
        self._has_adapters = False
        self._root: str | None = None
        """Where vLLM's hashes are said to begin."""
        self._is_checked = False
        self._away: set[str] = set()
        """Requests that are neither stored nor served."""
        self._portal: LoopThread[ObjectStore] | None = None
        try:
            self._portal = self._opened(offloading_spec, CacheConfig.load(config, **fields))
        except UnsupportedError as exc:
            _log.warning("kvlayer's tier is off: %s", exc)
        self._rows = primary_kv_view.cast("B")  # last: what raises must not keep a view of it

    def _opened(self, spec: OffloadingSpec, config: CacheConfig) -> LoopThread[ObjectStore]:
        check_tier_version()
        vllm_config, kv_cache_config = offloading_engine()
        if vllm_config.lora_config is not None:
            tell_adapters()
            self._has_adapters = True
        self._root = hash_root(str(vllm_config.cache_config.prefix_caching_hash_algo))
        namespace = namespace_for(
            spec,
            vllm_config,
            kv_cache_config,
            config,
            nbytes=self.block_size_bytes,
            root=self._root,
            is_shared=_is_shared(config),
        )
        sinks = [LogSink(_log)]
        opener = partial(ObjectStore.open, config, namespace, sinks=sinks, backends=BACKENDS)
        opened = LoopThread[ObjectStore].start(opener, name="kvlayer-tier")
        _log.info(
            "kvlayer's tier is on: namespace %s, chunks of %d bytes in %s",
            namespace.digest[:12],
            self.block_size_bytes,
            ", ".join(tier.name for tier in opened.subject.tiers),
        )
        return opened

    # -- what is there -----------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> Any:
        if not self._is_checked:
            self._check_root()
        if self._has_adapters and has_adapter(req_context):
            self._away.add(req_context.req_id)
        return RequestOffloadingContext()

    def _check_root(self) -> None:
        """vLLM's hashes begin somewhere by now: where they were said to."""
        self._is_checked = True
        try:
            check_root(self._root)
        except UnsupportedError as exc:
            _log.warning("kvlayer's tier is off: %s", exc)
            portal, self._portal = self._portal, None
            if portal is not None:
                portal.close()

    def lookup(self, key: bytes, req_context: ReqContext) -> Any:
        if self._portal is None or req_context.req_id in self._away:
            return LookupResult.MISS
        is_there = self._verdicts.of(key, req_context.req_id)
        if is_there is None:
            return LookupResult.RETRY
        return LookupResult.HIT if is_there else LookupResult.MISS

    def on_schedule_end(self, context: Any) -> None:
        self._verdicts.send()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._verdicts.forget(req_context.req_id)
        self._away.discard(req_context.req_id)

    def _ask(self, keys: Sequence[bytes]) -> None:
        def heard(job: Any) -> None:
            failed = job.cancelled() or job.exception() is not None
            found = [False] * len(keys) if failed else job.result()
            self._verdicts.hear([*zip(keys, found, strict=True)])

        if self._portal is None:  # shut down with questions left
            return
        try:
            job = self._portal.submit(ObjectStore.contains, [name_of(key) for key in keys])
        except (ClosedError, ForkedError):
            self._verdicts.hear([(key, False) for key in keys])
        else:
            job.add_done_callback(heard)

    def touch(self, keys: Collection[bytes], req_context: ReqContext) -> None:
        if self._portal is None or req_context.req_id in self._away:
            return
        names = [name_of(key) for key in keys]
        try:
            self._portal.post([partial(self._portal.subject.touch, names)])
        except (ClosedError, ForkedError):
            return  # it is a hint

    # -- jobs --------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, _store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, _load)

    def _submit(self, wanted: TransferJob, move: Move) -> None:
        """Begin a job. However it ends, that is told once, when its memory is vLLM's again."""
        task = _Task(wanted.job_id, tuple(wanted.keys), wanted.is_promotion, self.block_size_bytes)
        with self._changed:
            self._running += 1
        if self._portal is None or wanted.req_context.req_id in self._away:
            self._over(task, None)
            return
        size = self.block_size_bytes
        rows = [self._rows[at * size : (at + 1) * size] for at in map(int, wanted.chunk_ids)]
        try:
            job = self._portal.submit(move, [name_of(key) for key in task.keys], rows)
        except (ClosedError, ForkedError):
            self._over(task, None)
        else:
            job.add_done_callback(lambda _: self._is_done(task, job))

    def _is_done(self, task: _Task, job: Job[Moved]) -> None:
        if not job.has_ended:  # left behind by a portal that was closed: its memory is in use
            return
        failed = job.cancelled() or job.exception() is not None
        self._over(task, None if failed else job.result())

    def _over(self, task: _Task, moved: Moved | None) -> None:
        """On any thread. ``moved``: None where nothing was."""
        with self._changed:
            self._ended.append((task, moved or Moved([False] * len(task.keys), 0.0)))
            self._running -= 1
            self._changed.notify_all()

    def get_finished_jobs(self) -> Iterable[Any]:
        with self._changed:
            ended, self._ended = self._ended, []
        found: list[Any] = []
        for task, moved in ended:
            if (
                task.is_promotion
            ):  # at once: who waits for it must not be told again that it is there
                self._verdicts.is_missing(task.lacking(moved))
            found.append(task.result(moved))
        return found

    def drain_jobs(self) -> None:
        """Wait until nothing is moved any more: at most the tiers' deadlines, and as long as a
        system call takes that cannot be interrupted. vLLM is about to use the memory otherwise.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    def shutdown(self) -> None:
        """Close the tiers. Raises ``RuntimeError`` where one will not let go of vLLM's memory,
        which vLLM then keeps.
        """
        portal, self._portal = self._portal, None
        if portal is not None:
            portal.close()
        if self._running:
            raise RuntimeError(
                f"{self._running} jobs of kvlayer's tier have not let go of vLLM's memory"
            )
        self._rows.release()


class Moved(NamedTuple):
    """What came of a job: of each chunk whether it was moved, and how long that took."""

    ok: Sequence[bool]
    seconds: float


Move: TypeAlias = Callable[
    [ObjectStore, Sequence[bytes], Sequence[memoryview]], Coroutine[Any, Any, Moved]
]


class _Task(NamedTuple):
    """A job of vLLM's."""

    job_id: int
    keys: Sequence[bytes]
    is_promotion: bool
    nbytes: int

    def lacking(self, moved: Moved) -> list[bytes]:
        return [key for key, ok in zip(self.keys, moved.ok, strict=True) if not ok]

    def result(self, moved: Moved) -> Any:
        """As vLLM wants it."""
        done = [key for key, ok in zip(self.keys, moved.ok, strict=True) if ok]
        return JobResult(
            job_id=self.job_id,
            success=all(moved.ok),
            successful_keys=tuple(done) if done and self.is_promotion else None,
            transfer_time=moved.seconds,
            transfer_bytes=len(done) * self.nbytes,
        )


async def _store(store: ObjectStore, names: Sequence[bytes], rows: Sequence[memoryview]) -> Moved:
    async def one(name: bytes, row: memoryview) -> bool:
        outcomes = await store.store(name, [row])
        return all(outcome.ok for outcome in outcomes)

    return await _each(one, names, rows)


async def _load(store: ObjectStore, names: Sequence[bytes], rows: Sequence[memoryview]) -> Moved:
    async def one(name: bytes, row: memoryview) -> bool:
        return (await store.load(name, [row])).ok

    return await _each(one, names, rows)


async def _each(
    move: Callable[[bytes, memoryview], Coroutine[Any, Any, bool]],
    names: Sequence[bytes],
    rows: Sequence[memoryview],
) -> Moved:
    """Move chunks, some at once."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    found: list[bool] = []
    for at in range(0, len(names), _AT_ONCE):
        async with asyncio.TaskGroup() as group:
            pairs = zip(names[at : at + _AT_ONCE], rows[at : at + _AT_ONCE], strict=True)
            tasks = [group.create_task(move(*pair)) for pair in pairs]
        found += [task.result() for task in tasks]
    return Moved(found, loop.time() - began)


def _is_shared(config: CacheConfig) -> bool:
    """Whether a tier outlives this process, or is shared with others."""
    return any(outlives(open_backend(tier.url, backends=BACKENDS)) for tier in config.tiers)
