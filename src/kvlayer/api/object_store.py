"""A cache's lower tiers alone: whole objects, in memory of their owner's, under names of his own.

For an engine that keeps KV in host memory itself and wants a place behind that: no tier 0, no
planner, no copy of ours. What a tier costs is bounded as in a cache: deadlines, turns, breakers;
what it gives is verified, and what is damaged is taken out of sight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from sys import maxsize

from kvlayer._values import functions, instance
from kvlayer._version import version
from kvlayer.abc.backend import Backend, Damaged
from kvlayer.abc.codec import Codec
from kvlayer.api.lower_tiers import (
    check_sharing,
    close_tier,
    codings_of,
    lower_tier,
    masks_of,
    names_of,
    open_tier,
)
from kvlayer.config.model import CacheConfig
from kvlayer.config.registry import BACKENDS, CODECS, Registry, open_backend
from kvlayer.errors import LayoutError
from kvlayer.events import Emitter, ObjectQuarantined, Sink
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, Part
from kvlayer.identity.namespace import Namespace
from kvlayer.layout import AttentionKind
from kvlayer.memory.slab import Slab
from kvlayer.payload import ALIGNMENT, Payload
from kvlayer.results import Cause, TierHealth, TierStats
from kvlayer.runtime.foreign import words
from kvlayer.tier.guard.guard import Lane, Refused, TierCall
from kvlayer.tier.messages import Outcome
from kvlayer.tier.tier import LowerTier, Tier
from kvlayer.tier.transfer.flight import outcome_of
from kvlayer.tier.transfer.named import Named
from kvlayer.tier.transfer.objects import Item, Objects

__all__ = ["ObjectStore"]

_ASKED = 256  # objects that a tier is asked about at once


class ObjectStore:
    """Opaque objects of one size in tiers, nearest first. Made by :meth:`open`; on its loop.

    Each is named by a hash of 32 bytes, which stands for its content: two that store the same name
    store the same bytes. Memory is lent as it is: while a call is under way, and no longer than
    that, tiers read and write it.
    """

    def __init__(
        self, namespace: Namespace, tiers: Sequence[LowerTier], objects: Objects, emit: Emitter
    ) -> None:
        self.namespace = namespace
        self.tiers = tuple(tiers)
        self._objects = objects
        self._emit = emit
        self._part = Part(0, (0, 1), None)
        self._payload = Payload.of(namespace.groups[0], self._part, namespace.tokens_per_chunk)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: CacheConfig,
        namespace: Namespace,
        *,
        sinks: Iterable[Sink] = (),
        backends: Registry[type[Backend]] = BACKENDS,
        codecs: Registry[type[Codec]] = CODECS,
    ) -> AsyncGenerator[ObjectStore]:
        """Open the tiers of ``config``, all of which are lower ones here, or none of them.

        The one group of ``namespace`` is a state of one layer: an object's bytes. Leaving the block
        waits until everything that was lent is back, and closes the tiers; what will not let go
        within ``close_seconds`` is named in the log and keeps what it was lent. Raises
        ``IdentityError`` where a tier outlives the process and ``namespace`` does not,
        ``ConfigError``, ``LayoutError``, and what a tier's opening raises.
        """
        instance("config", config, CacheConfig, hint="CacheConfig(tiers=...)")
        instance("namespace", namespace, Namespace, hint="Namespace(...), which names the objects")
        _check_opaque(namespace)
        emit = Emitter(functions("sinks", sinks))
        async with AsyncExitStack() as resources:
            codings = codings_of(config.tiers, codecs)
            found = [open_backend(tier.url, backends=backends) for tier in config.tiers]
            check_sharing(namespace, found)
            places: list[Backend] = [
                Named(backend, mask, [coding.encoding for coding in some])
                for backend, mask, some in zip(found, masks_of(config.tiers), codings, strict=True)
            ]
            tiers = [
                lower_tier(
                    Tier(index, name, emit), backend, tier, max_nbytes=maxsize
                )  # it is lent: no memory of ours
                for index, (name, backend, tier) in enumerate(
                    zip(names_of(found), places, config.tiers, strict=True), 1
                )
            ]
            for tier in tiers:
                await open_tier(tier)
                resources.push_async_callback(close_tier, tier, config.close_seconds)
                tier.backend.on_evicted = partial(_evicted, tier)
            scratch = Slab(ALIGNMENT, name="kvlayer-store")
            resources.callback(scratch.close)
            objects = Objects(
                scratch,
                [None, *places],
                shape=partial(Payload.of, namespace.groups[0]),
                clock=asyncio.get_running_loop().time,
                wall_clock=time.time,
                build=f"kvlayer-core {version()}",
                retries=[0, *(tier.retries for tier in config.tiers)],
                codings=[(), *codings],
            )
            resources.callback(objects.close)
            objects.begin()
            store = cls(namespace, tiers, objects, emit)
            store._introduce()
            resources.push_async_callback(store._let_go, config.close_seconds)
            yield store

    def _introduce(self) -> None:
        """Say whose objects these are, and how a tier that has failed is tried again."""
        nothing = self.key(bytes(32))
        canonical = self.namespace.canonical()
        for tier in self.tiers:
            described = partial(
                self._objects.describe, tier.index, self.namespace.digest, canonical
            )
            tier.guard.hint(described)
            tier.guard.probe = partial(self._objects.probe, tier.index, nothing)

    async def _let_go(self, seconds: float) -> None:
        for tier in self.tiers:
            if stuck := await tier.guard.aclose(seconds):
                tier.complains(
                    Cause.TIER_DOWN,
                    f"{stuck} calls did not end within {seconds:g} s of being cancelled",
                )

    @property
    def nbytes(self) -> int:
        """Of one object."""
        return self._payload.body_nbytes

    def key(self, name: bytes) -> ObjectKey:
        """The full name of the object with the hash ``name``."""
        tokens = self.namespace.tokens_per_chunk
        return ObjectKey.of(self.namespace.digest, PUBLIC_ZONE, name, tokens, self._part)

    def health(self) -> list[TierHealth]:
        """Of each tier, whether it serves."""
        return [tier.health() for tier in self.tiers]

    def stats(self) -> list[TierStats]:
        """Of each tier, what it has done so far. ``objects`` is 0: nobody here counts them."""
        return [
            tier.stats(0, tier.figure("used_nbytes") or 0, tier.figure("capacity_nbytes"))
            for tier in self.tiers
        ]

    # -- objects ---------------------------------------------------------------------------------

    async def contains(self, names: Sequence[bytes]) -> list[bool]:
        """Which of these objects some tier says it has. A hint: only a read is certain.

        Takes no longer than the tiers' deadlines together. What a tier does not answer in time,
        answers with an error or is not asked for now counts as absent there, and as the tier's
        trouble.
        """
        found = [False] * len(names)
        for tier in self.tiers:
            left = [at for at, there in enumerate(found) if not there]
            for at in range(0, len(left), _ASKED):
                some = left[at : at + _ASKED]
                for place, there in zip(
                    some, await self._asked(tier, [names[place] for place in some]), strict=True
                ):
                    found[place] = there
        return found

    async def _asked(self, tier: LowerTier, names: Sequence[bytes]) -> list[bool]:
        nowhere = [False] * len(names)
        keys = [self.key(name) for name in names]
        try:
            call = tier.guard.start(partial(self._objects.contains, tier.index, keys))
        except Refused as no:
            tier.refused(no.cause)
            return nowhere
        tier.asks(len(keys))
        if not await tier.guard.wait_alone(call):
            tier.fails(Cause.DEADLINE, f"no answer within {tier.guard.deadline} s")
            return nowhere
        if call.error is not None:
            if not call.was_cancelled:
                tier.fails(Cause.TIER_DOWN, words(call.error))
            return nowhere
        sizes = call.result()
        tier.answered(sizes, is_late=call.was_late)
        return [isinstance(size, int) for size in sizes]

    async def load(self, name: bytes, regions: Sequence[memoryview]) -> Outcome:
        """Fill ``regions``, :attr:`nbytes` in all, from the nearest tier that has the object whole.

        What is damaged there is gone when this returns. After a failure the memory may hold
        anything; it is the caller's again when this returns or raises, however long that takes.
        """
        outcome = Outcome(self.key(name), Cause.NEVER_STORED, "no tier has it")
        for tier in self.tiers:
            found = await self._moved("load", tier, self._item(name, regions), Lane.READS)
            if found.ok:
                return found
            if found.cause is not None and found.cause.is_damage:
                await self._quarantined(tier, found)
            if found.cause is not Cause.VANISHED:
                outcome = found
        return outcome

    async def store(self, name: bytes, regions: Sequence[memoryview]) -> list[Outcome]:
        """Give ``regions``, :attr:`nbytes` in all, to every tier that takes writes.

        Their outcomes. The memory is the caller's again when this returns or raises.
        """
        item = self._item(name, regions)
        async with asyncio.TaskGroup() as group:
            moves = [
                group.create_task(self._moved("store", tier, item, Lane.WRITES))
                for tier in self.tiers
                if tier.write != "never"
            ]
        return [move.result() for move in moves]

    def touch(self, names: Sequence[bytes]) -> None:
        """These were used, the most valuable last: a hint, for which nobody waits."""
        keys = [self.key(name) for name in names]
        for tier in self.tiers:
            tier.guard.hint(partial(self._objects.touch, tier.index, keys))

    def _item(self, name: bytes, regions: Sequence[memoryview]) -> Item:
        return Item(self.key(name), self._payload, 0, tuple(regions))

    async def _moved(self, direction: str, tier: LowerTier, item: Item, lane: Lane) -> Outcome:
        is_load = lane is Lane.READS
        job = (self._objects.reading if is_load else self._objects.writing)(tier.index, item)
        try:
            call = tier.guard.send(job, lane=lane, nbytes=self.nbytes)
        except Refused as no:
            tier.refused(no.cause)
            return Outcome(item.key, no.cause, no.detail)
        tier.begins(direction, item.key, self.nbytes)
        await _ended(tier, call)
        outcome = outcome_of(call, item.key)
        tier.transferred(direction, outcome, call)
        return outcome

    async def _quarantined(self, tier: LowerTier, found: Outcome) -> None:
        damaged = Damaged(found.key, found.version)
        if tier.emit and found.cause is not None:
            tier.emit(
                ObjectQuarantined(
                    tier=tier.name, key=found.key, cause=found.cause, detail=found.detail
                )
            )
        try:
            call = tier.guard.start(partial(self._objects.quarantine, tier.index, damaged))
        except Refused:  # found again, and quarantined then, by the next load
            return
        if not await tier.guard.wait_alone(call):
            tier.fails(Cause.DEADLINE, "quarantine did not end in time")
        elif call.error is not None and not call.was_cancelled:
            tier.complains(Cause.TIER_DOWN, words(call.error))


async def _ended(tier: LowerTier, call: TierCall[Outcome]) -> None:
    """Until the tier has let go of what it was lent. It is told to when the call is late, and when
    this is cancelled.
    """
    cancelled: asyncio.CancelledError | None = None
    while not call.has_ended:
        try:
            if call.was_told_to_stop:
                await call.ended()
            elif not await tier.guard.wait(call):
                tier.fails(Cause.DEADLINE, f"not moved within {tier.guard.deadline} s", call.lane)
                call.cancel()
        except asyncio.CancelledError as exc:
            cancelled = exc
            call.cancel()
    if cancelled is not None:
        raise cancelled


def _evicted(tier: LowerTier, gone: list[tuple[ObjectKey, int]], policy: str) -> None:
    """A backend gave objects up to make room."""
    tier.lost(policy, [key for key, _ in gone], sum(nbytes for _, nbytes in gone))


def _check_opaque(namespace: Namespace) -> None:
    groups = namespace.groups
    if len(groups) != 1 or groups[0].kind is not AttentionKind.STATE or len(groups[0].layers) != 1:
        raise LayoutError(
            f"a store's objects are opaque: expected a namespace of one state group of one layer, "
            f"found {len(groups)} groups, the first of kind {groups[0].kind}",
            hint="KVGroup(AttentionKind.STATE, (0,), 'int8', state_nbytes=SIZE, quantisation=WHAT)",
        )
