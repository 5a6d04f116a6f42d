"""Building a cache: from configuration, layout and namespace to open tiers, all or nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from functools import partial

from kvlayer._values import callee, functions, instance
from kvlayer._version import version
from kvlayer.abc.backend import Backend, Capability
from kvlayer.abc.codec import Codec
from kvlayer.abc.host import HostMemory
from kvlayer.abc.stager import MakeStager, Stager
from kvlayer.api.lower_tiers import (
    check_sharing,
    close_tier,
    codings_of,
    lower_tier,
    masks_of,
    names_of,
    open_tier,
)
from kvlayer.api.open_cache import OpenCache
from kvlayer.config.model import CacheConfig
from kvlayer.config.registry import CODECS, POLICIES, Registry, open_backend
from kvlayer.errors import ConfigError, IdentityError
from kvlayer.events import Emitter, Sink
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey
from kvlayer.identity.namespace import COMPUTE_DTYPES, Namespace
from kvlayer.identity.weights import parse_weights, process_weights
from kvlayer.layout import KVLayout
from kvlayer.memory.slab import Slab
from kvlayer.runtime.foreign import awaited
from kvlayer.runtime.offload import Offload
from kvlayer.tier.epochs import Epochs
from kvlayer.tier.guard.estimate import Rate
from kvlayer.tier.planner.copies import copy_of
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.ranks.rank_team import RankDevice, RankTeam
from kvlayer.tier.stack import Stack
from kvlayer.tier.tier import LowerTier, Tier
from kvlayer.tier.transfer.device import Device, LocalDevice
from kvlayer.tier.transfer.encodings import Coding
from kvlayer.tier.transfer.named import Named
from kvlayer.tier.transfer.objects import Objects
from kvlayer.urls import shown_url

__all__ = ["OpenCache", "Stack", "build", "check_namespace"]


async def build(
    config: CacheConfig,
    layout: KVLayout,
    namespace: Namespace | None,
    sinks: Iterable[Sink],
    registry: Registry[type[Backend]],
    *,
    codecs: Registry[type[Codec]] = CODECS,
    ranks: RankTeam | None,
    make_stager: MakeStager,
) -> OpenCache:
    """Open everything, or nothing: a failure closes what was opened before it."""
    instance("config", config, CacheConfig, hint="CacheConfig(...) or CacheConfig.load(path)")
    instance("layout", layout, KVLayout, hint="KVLayout.single(group, axes, tokens_per_block=...)")
    if namespace is not None:
        instance("namespace", namespace, Namespace, hint="leave it out to make one of both")
    instance("backends", registry, Registry, hint='BACKENDS.extended({"mine": MyBackend})')
    instance("codecs", codecs, Registry, hint='CODECS.extended({"mine": MyCodec})')
    if ranks is not None:
        instance("ranks", ranks, RankTeam, hint="RankTeam([layout of rank 0, ...])")
    callee("make_stager", make_stager)
    sinks = functions("sinks", sinks)
    async with AsyncExitStack() as resources:
        if namespace is None:
            namespace = await _identify(config, layout, resources)
        check_namespace(namespace, layout)
        codings = codings_of(config.tiers, codecs)
        backends = [open_backend(tier.url, backends=registry) for tier in config.tiers]
        host = _host_memory(config, backends)
        check_sharing(namespace, backends)
        masks = masks_of(config.tiers)
        for index, backend in enumerate(backends[1:], 1):
            encodings = [coding.encoding for coding in codings[index]]
            backends[index] = Named(backend, masks[index], encodings)
        emit = Emitter(sinks)
        with masks[0].hiding():
            await awaited(partial(resources.enter_async_context, backends[0]))
        top, lower = _tiers(config, backends, emit, max_nbytes=host.slab.nbytes // 2)
        planner = _make_planner(
            config,
            layout,
            namespace,
            slab=host.slab,
            tiers=[top, *lower],
            ranks=ranks,
        )
        resources.callback(planner.host.extents.detach)
        for tier in lower:
            await _enter_tier(tier, planner, config.close_seconds, resources)
        device = _make_device(
            config,
            layout,
            planner,
            host.slab,
            ranks=ranks,
            make_stager=make_stager,
            resources=resources,
        )
        objects = _make_objects(config, planner, host.slab, backends[1:], codings)
        resources.callback(objects.close)
        objects.begin()
        stack = _make_stack(config, namespace, planner, device, objects, top=top, lower=lower)
        clock = asyncio.get_running_loop().time
        return OpenCache(config, namespace, stack, emit, clock, ranks, resources.pop_all())


async def _identify(config: CacheConfig, layout: KVLayout, resources: AsyncExitStack) -> Namespace:
    """The namespace of a configuration; digests the model's files if it names a path."""
    model = config.model
    weights = model.weights
    if not weights:
        weights = process_weights()
    else:
        offload = Offload(1, "kvlayer-digest")
        resources.callback(offload.close)
        weights = await offload.run(  # may read all of the model
            partial(parse_weights, weights, whole=config.verify_weights)
        )
    if model.numerics != "portable":
        raise ConfigError(
            f"numerics = {model.numerics!r} needs an engine adapter to name the engine",
            hint="pass Cache.open a namespace with numerics='engine:<name>-<version>'",
        )
    groups = tuple(g.group for g in layout.groups)
    return Namespace(
        weights=weights,
        compute_dtype=model.compute_dtype or _computed_in(groups[0].dtype),
        overrides=model.overrides,
        kv_scales=model.kv_scales,
        groups=groups,
        tokens_per_chunk=config.tokens_per_chunk,
        tokens_per_tail=config.tail_tokens,
    )


def _computed_in(kv_dtype: str) -> str:
    """What attention is computed in where the KV is kept as it was computed."""
    if kv_dtype not in COMPUTE_DTYPES:
        raise IdentityError(
            f"model.compute_dtype is not set, and the KV is quantised: nothing computes in "
            f"{kv_dtype}",
            hint="set model.compute_dtype to what attention is computed in, one of: "
            f"{', '.join(COMPUTE_DTYPES)}",
        )
    return kv_dtype


def check_namespace(namespace: Namespace, layout: KVLayout) -> None:
    """Raise unless KV that lies as ``layout`` says can be that of a namespace."""
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


def _host_memory(config: CacheConfig, backends: Sequence[Backend]) -> HostMemory:
    """The first tier."""
    host = backends[0]
    if not isinstance(host, HostMemory):
        raise ConfigError(
            f"the first tier must be host memory, found {shown_url(config.tiers[0].url)}",
            hint='start the list with url = "cpu://?capacity=8GiB"',
        )
    return host


def _tiers(
    config: CacheConfig, backends: Sequence[Backend], emit: Emitter, *, max_nbytes: int
) -> tuple[Tier, list[LowerTier]]:
    """Host memory and what is below it, as the stack sees them."""
    top, *places = (Tier(index, name, emit) for index, name in enumerate(names_of(backends)))
    below = zip(places, backends[1:], config.tiers[1:], strict=True)
    return top, [lower_tier(*each, max_nbytes=max_nbytes) for each in below]


async def _enter_tier(
    tier: LowerTier,
    planner: Planner,
    close_seconds: float,
    resources: AsyncExitStack,
) -> None:
    """Open a tier. It closes with ``resources`` and tells the planner what comes and goes."""
    await open_tier(tier)
    resources.push_async_callback(close_tier, tier, close_seconds)
    resources.push_async_callback(tier.guard.aclose, close_seconds)
    tier.backend.on_evicted = partial(_evicted, planner, tier)
    tier.backend.on_stored = partial(_stored, planner, tier)


def _evicted(
    planner: Planner, tier: LowerTier, gone: list[tuple[ObjectKey, int]], policy: str
) -> None:
    """A backend gave objects up to make room: they are no longer offered."""
    keys = [key for key, _ in gone]
    planner.vanished(keys, tier.index, f"evicted from {tier.name} by {policy}")
    tier.lost(policy, keys, sum(nbytes for _, nbytes in gone))


def _stored(planner: Planner, tier: LowerTier, found: list[tuple[ObjectKey, int]]) -> None:
    """A backend has found objects that nobody here has put there: they are offered."""
    copies = [copy_of(0, nbytes) for _, nbytes in found]
    planner.note([key for key, _ in found], tier.index, copies)


def _make_planner(
    config: CacheConfig,
    layout: KVLayout,
    namespace: Namespace,
    *,
    slab: Slab,
    tiers: Sequence[Tier],
    ranks: RankTeam | None,
) -> Planner:
    return Planner(
        namespace.digest,
        layout,
        tiers=[tier.name for tier in tiers],
        capacity=slab.nbytes,
        generations=slab.generations(),
        policy=POLICIES.load(config.policy),
        tokens_per_chunk=namespace.tokens_per_chunk,
        tokens_per_tail=namespace.tokens_per_tail,
        head_shards=config.head_shards,
        ranks=() if ranks is None else ranks.layouts,
        clock=asyncio.get_running_loop().time,
        wall_clock=time.time,
    )


def _make_device(
    config: CacheConfig,
    layout: KVLayout,
    planner: Planner,
    slab: Slab,
    *,
    ranks: RankTeam | None,
    make_stager: MakeStager,
    resources: AsyncExitStack,
) -> Device:
    """The device of this process, or those of the ranks."""
    if ranks is not None:
        device: Device = RankDevice(ranks, slab)
    else:
        stager = make_stager(layout, slab, config.staging_threads)
        resources.push_async_callback(stager.aclose)
        device = LocalDevice(slab, stager, planner.payload)
    resources.callback(device.close)
    return device


def _make_objects(
    config: CacheConfig,
    planner: Planner,
    slab: Slab,
    lower: Sequence[Backend],
    codings: Sequence[Sequence[Coding]],
) -> Objects:
    """What moves objects between the slab and the lower tiers."""
    return Objects(
        slab,
        [None, *lower],
        shape=planner.payload,
        clock=asyncio.get_running_loop().time,
        wall_clock=time.time,
        build=f"kvlayer-core {version()}",
        retries=[tier.retries for tier in config.tiers],
        codings=codings,
    )


def _make_stack(
    config: CacheConfig,
    namespace: Namespace,
    planner: Planner,
    device: Device,
    objects: Objects,
    *,
    top: Tier,
    lower: list[LowerTier],
) -> Stack:
    """The stack. Tiers that can list what they hold begin to; it knows how to ask a tier again."""
    stack = Stack(
        planner,
        device,
        objects,
        top,
        lower,
        foreign=top.emit.foreign,
        clock=asyncio.get_running_loop().time,
        prefill=Rate(config.prefill_tokens_per_second),
        high_watermark=config.high_watermark,
        low_watermark=config.low_watermark,
        epochs=Epochs(namespace.digest),
    )
    nothing = ObjectKey.of(
        namespace.digest,
        PUBLIC_ZONE,
        bytes(32),
        namespace.tokens_per_chunk,
        planner.directory.needs[0],
    )
    canonical = namespace.canonical()
    for tier in lower:
        tier.guard.hint(partial(objects.introduce, tier.index))
        # For people and explain.
        tier.guard.hint(partial(objects.describe, tier.index, namespace.digest, canonical))
        tier.guard.probe = partial(objects.probe, tier.index, nothing)
        if Capability.LIST in tier.backend.capabilities:
            stack.recover(tier, namespace.digest)
    return stack


def make_stager(layout: KVLayout, slab: Slab, threads: int = 2) -> Stager:
    """The stager of an engine's device. It uses ``slab`` until it is closed."""
    from kvlayer.staging.cuda.stager import DeviceStager  # imports torch: only when a cache opens

    return DeviceStager(layout, slab=slab, threads=threads)
