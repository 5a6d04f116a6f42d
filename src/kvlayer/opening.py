"""Building a cache: from configuration, layout and namespace to open tiers, all or nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from kvlayer._offload import Offload
from kvlayer._version import version
from kvlayer.abc.backend import Backend, Capability
from kvlayer.abc.host import HostMemory
from kvlayer.abc.stager import MakeStager, Stager
from kvlayer.config import CacheConfig, TierConfig
from kvlayer.errors import BackendTimeoutError, ConfigError, IdentityError
from kvlayer.events import Emitter, Sink
from kvlayer.keys import PUBLIC_ZONE, ObjectKey
from kvlayer.layout import KVLayout
from kvlayer.memory.slab import Slab
from kvlayer.namespace import Namespace
from kvlayer.registry import POLICIES, Registry, open_backend
from kvlayer.results import Cause
from kvlayer.tier.estimate import Rate
from kvlayer.tier.guard import Guard
from kvlayer.tier.mover import Mover
from kvlayer.tier.planner import Planner
from kvlayer.tier.ranks import RankMover, Ranks
from kvlayer.tier.stack import Stack
from kvlayer.tier.tier import LowerTier, Tier
from kvlayer.weights import parse_weights, process_weights

__all__ = ["Parts", "Stack", "build"]

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Parts:
    """Everything an open cache consists of."""

    config: CacheConfig
    namespace: Namespace
    stack: Stack
    emit: Emitter
    clock: Callable[[], float]
    ranks: Ranks | None
    resources: AsyncExitStack
    lookups: int = 0
    asked_tokens: int = 0
    hit_tokens: int = 0
    _jobs: set[asyncio.Task[Any]] = field(default_factory=set)
    _flushing: asyncio.Task[None] | None = None
    _is_hurried: bool = False

    def count_lookup(self, asked: int, hit: int) -> None:
        """Keep the totals that ``Control.stats`` reports. In any thread."""
        with self.stack.planner.lock:
            self.lookups += 1
            self.asked_tokens += asked
            self.hit_tokens += hit

    def spawn(self, job: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a background job that ends with the cache at the latest."""
        task = asyncio.get_running_loop().create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

    async def aclose(self, *, flush: bool) -> None:
        """End jobs, flush if asked (bounded), take all lent memory back, close the tiers.

        Must not be cancelled: see :meth:`stop_flushing`.
        """
        self.part_from_ranks()
        for job in tuple(self._jobs):
            job.cancel()
        if self._jobs:
            await asyncio.wait(tuple(self._jobs))
        if flush and not self._is_hurried:
            self._flushing = asyncio.ensure_future(self.stack.flush(drain=True))
            # What is not written in time is a miss later; closing must not hang.
            await asyncio.wait({self._flushing}, timeout=self.config.close_seconds)
            self._flushing.cancel()
            await asyncio.wait({self._flushing})
        try:
            await self.stack.aclose()
        finally:
            await self.resources.aclose()

    def part_from_ranks(self) -> None:
        """Wait for no rank any more: the cache closes."""
        if self.ranks is not None:
            self.stack.planner.retire()  # a rank may be writing into what it was lent all the same
            self.ranks.close()

    def stop_flushing(self) -> None:
        """Whoever closes has no time left: give up what is not written yet."""
        self._is_hurried = True
        if self._flushing is not None:
            self._flushing.cancel()


async def build(
    config: CacheConfig,
    layout: KVLayout,
    namespace: Namespace | None,
    sinks: Iterable[Sink],
    registry: Registry[type[Backend]],
    *,
    ranks: Ranks | None,
    make_stager: MakeStager,
) -> Parts:
    """Open everything, or nothing: a failure closes what was opened before it."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as resources:
        if namespace is None:
            namespace = await _identify(config, layout, resources)
        _check_namespace(namespace, layout)
        backends = [open_backend(tier.url, backends=registry) for tier in config.tiers]
        host = backends[0]
        if not isinstance(host, HostMemory):
            raise ConfigError(
                f"the first tier must be host memory, found {config.tiers[0].url}",
                hint='start the list with url = "cpu://?capacity=8GiB"',
            )
        _check_sharing(namespace, backends)
        names = _names(backends)
        emit = Emitter(sinks)
        await resources.enter_async_context(host)
        lower = [
            _lower_tier(
                Tier(index, names[index], emit), backend, tier, max_nbytes=host.slab.nbytes // 2
            )
            for index, (backend, tier) in enumerate(zip(backends, config.tiers, strict=True))
            if index
        ]
        planner = Planner(
            namespace.digest,
            layout,
            tiers=names,
            capacity=host.slab.nbytes,
            policy=POLICIES.load(config.policy)(),
            tokens_per_chunk=namespace.tokens_per_chunk,
            tokens_per_tail=namespace.tokens_per_tail,
            head_shards=config.head_shards,
            ranks=() if ranks is None else ranks.layouts,
            clock=loop.time,
            wall_clock=time.time,
        )
        for tier in lower:
            await _open_tier(tier)
            resources.push_async_callback(_close_tier, tier, config.close_seconds)
            resources.push_async_callback(tier.guard.aclose)
            tier.backend.on_evicted = partial(_evicted, planner, tier)
            described = partial(tier.backend.describe, namespace.digest, namespace.canonical())
            tier.guard.hint(described)  # for people and explain
        mover = _make_mover(
            config,
            layout,
            planner,
            slab=host.slab,
            lower=backends[1:],
            ranks=ranks,
            make_stager=make_stager,
            resources=resources,
        )
        resources.callback(mover.close)
        mover.begin()
        stack = Stack(
            planner,
            mover,
            Tier(0, names[0], emit),
            lower,
            clock=loop.time,
            prefill=Rate(config.prefill_tokens_per_second),
            high_watermark=config.high_watermark,
            low_watermark=config.low_watermark,
        )
        nothing = ObjectKey.of(namespace.digest, PUBLIC_ZONE, bytes(32), planner.directory.needs[0])
        for tier in lower:
            tier.guard.probe = partial(mover.probe, tier.index, nothing)
            if Capability.LIST in tier.backend.capabilities:
                stack.recover(tier)
        return Parts(config, namespace, stack, emit, loop.time, ranks, resources.pop_all())


async def _identify(config: CacheConfig, layout: KVLayout, resources: AsyncExitStack) -> Namespace:
    """The namespace of a configuration; digests the model's files if it names a path."""
    model = config.model
    weights = model.weights
    if not weights:
        weights = process_weights()
    else:
        offload = Offload(1, "kvlayer-digest")
        resources.callback(offload.close)
        weights = await offload.run(parse_weights, weights)  # may read all of the model
    if model.numerics != "portable":
        raise ConfigError(
            f"numerics = {model.numerics!r} needs an engine adapter to name the engine",
            hint="pass Cache.open a namespace with numerics='engine:<name>-<version>'",
        )
    groups = tuple(g.group for g in layout.groups)
    return Namespace(
        weights=weights,
        compute_dtype=model.compute_dtype or groups[0].dtype,
        overrides=model.overrides,
        kv_scales=model.kv_scales,
        groups=groups,
        tokens_per_chunk=config.tokens_per_chunk,
        tokens_per_tail=config.tail_tokens,
    )


def _check_namespace(namespace: Namespace, layout: KVLayout) -> None:
    if namespace.groups != tuple(g.group for g in layout.groups):
        raise IdentityError(
            "the namespace and the layout describe different KV groups",
            hint="build both from the same KVGroup values, in the same order",
        )
    for g in layout.groups:
        if g.form != "canonical" and namespace.tokens_per_tail % g.tokens_per_block:
            raise ConfigError(
                f"tails of {namespace.tokens_per_tail} tokens are not whole blocks of "
                f"{g.tokens_per_block}, which the native form {g.form!r} needs",
                hint="make tokens_per_tail a multiple of the engine's block size",
            )


def _check_sharing(namespace: Namespace, backends: list[Backend]) -> None:
    """KV of unknown weights must not leave the process: another model's would be served."""
    if not namespace.is_private:
        return
    beyond = {Capability.PERSISTENT, Capability.SHARED}
    for backend in backends:
        if backend.capabilities & beyond:
            raise IdentityError(
                f"{backend.scheme}:// outlives or is shared beyond this process, but the "
                "model's weights are not known",
                hint="set model.weights to the model's folder, or to 'sha256:<64 hex digits>'",
            )


def _names(backends: list[Backend]) -> list[str]:
    """Tier names for reports: the scheme, numbered from its second use on."""
    seen: dict[str, int] = {}
    names: list[str] = []
    for backend in backends:
        count = seen[backend.scheme] = seen.get(backend.scheme, 0) + 1
        names.append(backend.scheme if count == 1 else f"{backend.scheme}-{count}")
    return names


def _lower_tier(place: Tier, backend: Backend, tier: TierConfig, *, max_nbytes: int) -> LowerTier:
    return LowerTier(
        place.index,
        place.name,
        place.emit,
        backend=backend,
        guard=Guard(
            tier.deadline_seconds,
            tier.max_inflight,
            max_write_nbytes=tier.max_inflight_bytes or max_nbytes,
            pause=tier.pause_seconds,
        ),
        write=tier.write,
        tails=tier.tails,
        is_shared=Capability.SHARED in backend.capabilities,
        is_recovered=Capability.PERSISTENT not in backend.capabilities,
    )


async def _open_tier(tier: LowerTier) -> None:
    seconds = tier.guard.deadline
    opened = asyncio.timeout(max(seconds, 0))
    try:
        async with opened:
            await tier.backend.open()
    except TimeoutError as exc:
        if not opened.expired():
            raise
        raise BackendTimeoutError(
            f"{tier.name} did not open within {seconds:g} s",
            hint="raise the tier's deadline_seconds, or leave the tier out",
        ) from exc


async def _close_tier(tier: LowerTier, seconds: float) -> None:
    """Close a tier, which holds nothing lent any more: its failure is reported, not raised."""
    try:
        async with asyncio.timeout(seconds):
            await tier.backend.aclose()
    except Exception as exc:  # noqa: BLE001  # foreign code: it must not stop the others' close
        tier.complains(Cause.TIER_DOWN, f"not closed: {type(exc).__name__}: {exc}")


def _evicted(
    planner: Planner, tier: LowerTier, gone: list[tuple[ObjectKey, int]], policy: str
) -> None:
    """A backend gave objects up to make room: they are no longer offered."""
    keys = [key for key, _ in gone]
    planner.vanished(keys, tier.index, f"evicted from {tier.name} by {policy}")
    tier.lost(policy, keys, sum(nbytes for _, nbytes in gone))


def _make_mover(
    config: CacheConfig,
    layout: KVLayout,
    planner: Planner,
    *,
    slab: Slab,
    lower: Sequence[Backend],
    ranks: Ranks | None,
    make_stager: MakeStager,
    resources: AsyncExitStack,
) -> Mover:
    """The Mover of this process: with a device, or for ranks that have theirs elsewhere."""
    backends = [None, *lower]
    clock = asyncio.get_running_loop().time
    build = f"kvlayer-core {version()}"
    shape, wall = planner.payload, time.time
    retries = [tier.retries for tier in config.tiers]
    if ranks is not None:
        return RankMover(
            ranks,
            slab,
            backends,
            shape=shape,
            clock=clock,
            wall_clock=wall,
            build=build,
            retries=retries,
        )
    stager = make_stager(layout, slab, config.staging_threads)
    resources.push_async_callback(stager.aclose)
    return Mover(
        slab,
        stager,
        backends,
        shape=shape,
        clock=clock,
        wall_clock=wall,
        build=build,
        retries=retries,
    )


def make_stager(layout: KVLayout, slab: Slab, threads: int = 2) -> Stager:
    """The stager of an engine's device. It uses ``slab`` until it is closed."""
    from kvlayer.staging.cuda.stager import CudaStager  # imports torch: only when a cache opens

    return CudaStager(layout, slab=slab, threads=threads)
