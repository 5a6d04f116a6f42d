"""The control API of one cache: pin, evict, clear, explain, and what it has been doing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvlayer._steps import Steps, used_up
from kvlayer._values import instance, text
from kvlayer.abc.backend import Capability
from kvlayer.api.explain import explain
from kvlayer.api.lookup import released
from kvlayer.errors import ArgumentError, ConfigError
from kvlayer.identity.keys import ObjectKey, Scope, Tokens
from kvlayer.results import Cause, Explanation, Health, Stats
from kvlayer.runtime.foreign import words
from kvlayer.runtime.turns import in_turns
from kvlayer.tier.planner.lease import Lease, lease_seconds
from kvlayer.tier.planner.records import ObjectRecord
from kvlayer.tier.tier import LowerTier
from kvlayer.tier.transfer.listing import listed
from kvlayer.tier.transfer.removal import Removal
from kvlayer.urls import nearest

if TYPE_CHECKING:
    from kvlayer.api.cache import Cache

__all__ = ["Control", "Pin"]

_PUBLIC = Scope()
_NAMED = 64  # objects named in one turn of the loop: some 4 us each
_SLICE = 16  # objects dropped for each hold of the planner's lock: some 30 us each


@dataclass(frozen=True, slots=True)
class Pin:
    """A prefix held in host memory: ``number`` names it, ``tokens`` is how much it holds."""

    number: int
    tokens: int
    lease: Lease | None = field(default=None, repr=False, compare=False)
    """The pin itself; for the cache that granted it."""


class Control:
    """Operations on one cache. Belongs to the cache's loop, but for ``stats`` and ``health``."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def pin(
        self, tokens: Tokens, *, scope: Scope = _PUBLIC, seconds: float, owner: str = ""
    ) -> Pin:
        """Bring a prompt's usable prefix into host memory and hold it there for ``seconds``.

        Pins bind this process; other processes sharing a tier may still evict their copies. Raises
        ``TokensError`` and ``ArgumentError``.
        """
        self._cache.check_loop()
        chain = await self._cache.named(tokens, scope)
        owner = text("owner", owner, hint="a name as text, or leave it out")
        lease, report = await self._cache.stack.hold(
            chain, owner=owner or chain.scope.owner, seconds=lease_seconds(seconds)
        )
        return Pin(lease.number, report.tokens, lease)

    def unpin(self, pin: Pin) -> bool:
        """Let go of a pin. False when it had expired or was let go of before.

        Raises ``ArgumentError`` for what is no pin of this cache.
        """
        planner = self._cache.stack.planner
        lease = instance("pin", pin, Pin, hint="what `await control.pin(...)` returned").lease
        if lease is None or lease.number != pin.number or not planner.granted(lease):
            raise ArgumentError(
                "this pin was not made by this cache",
                hint="use a pin with the cache whose control.pin returned it, as it is",
            )
        return released(planner, lease)

    async def explain(self, tokens: Tokens, *, scope: Scope = _PUBLIC) -> Explanation:
        """What of a prompt is usable, from where, and the cause of every miss."""
        self._cache.check_loop()
        return await explain(self._cache, tokens, scope)

    async def evict(
        self, tokens: Tokens, *, scope: Scope = _PUBLIC, tier: str | None = None
    ) -> int:
        """Remove a prompt's objects from one tier, or from all; returns how many went.

        Of every namespace that the cache serves: those it is and was bound to, and those that
        somebody has asked for, at most the latest 64.
        What a tier was still to get does not go there, and what is being written to it is waited
        for. What is pinned stays in host memory, and what is being written to another tier.

        Raises ``BackendError``, once all that can be removed is, when a tier did not answer or kept
        some of them: it says how many.
        """
        self._cache.check_loop()
        stack = self._cache.stack
        lower = self._lower(tier)
        named = await self._cache.named(tokens, scope)
        chains = [named.bound(stack.epochs.current, n) for n in stack.planner.served()]
        for chain in chains:
            await stack.finder.find(chain)  # what other processes stored goes, too
        removal = Removal(stack.planner, stack.objects)

        async def everything() -> list[ObjectRecord]:
            found: list[ObjectRecord] = []
            for chain in chains:
                found += await in_turns(stack.planner.known(chain))
            return found

        known = await everything()

        async def drop() -> None:
            if tier in (None, stack.host.name):
                removal.gone += await self._drop([*known], "evicted by request")

        await self._stop_writes(lower, removal, drop, await in_turns(_keys(known)))
        known = await everything()  # what was on its way has come
        for each in lower:
            there = [found for found in known if found.tiers >> each.index & 1]
            if each.is_shared and not each.health().ok:  # others may have stored there
                removal.unseen(each, each.health().detail)
            await removal.delete(each, await in_turns(_keys(there)))
        await drop()
        removal.check()
        return removal.gone

    async def clear(self, tier: str | None = None) -> int:
        """Remove everything from one tier, or from all; returns how many went.

        Of every namespace that the cache serves, as :meth:`evict`; others are not touched. What is
        on its way is stopped as by :meth:`evict`, and what is pinned stays as there. Raises
        ``BackendError``, once all that can be removed is, when a tier did not answer or kept some
        of it: it says how many objects.
        """
        self._cache.check_loop()
        stack = self._cache.stack
        removal = Removal(stack.planner, stack.objects)

        async def drop() -> None:
            if tier in (None, stack.host.name):
                resident = await in_turns(stack.planner.resident())
                removal.gone += await self._drop(resident, "cleared by request")

        tiers = self._lower(tier)
        await self._stop_writes(tiers, removal, drop)
        known = await in_turns(stack.planner.on_tiers([lower.index for lower in tiers]))
        for lower in tiers:
            keys: list[ObjectKey] = []
            if Capability.LIST in lower.backend.capabilities:
                for namespace in stack.planner.served():
                    await self._list(lower, namespace, keys, removal)
            keys += known[lower.index]
            await removal.delete(lower, list(dict.fromkeys(keys)))
        await drop()
        removal.check()
        return removal.gone

    async def _stop_writes(
        self,
        tiers: Sequence[LowerTier],
        removal: Removal,
        drop: Callable[[], Awaitable[None]],
        keys: Sequence[ObjectKey] | None = None,
    ) -> None:
        """Let nothing that was begun before bring back what is about to be removed.

        ``drop`` takes it out of host memory, too: first of all, or whoever uses it meanwhile would
        have it written again, and once more when nothing is being written from there.
        """
        spills = self._cache.stack.spills
        running = [(tier, await in_turns(spills.withdraw(tier.index, keys))) for tier in tiers]
        await drop()
        for tier, writes in running:
            removal.being_written(tier, await spills.settled(writes))
        await drop()

    async def _drop(self, records: list[ObjectRecord], detail: str) -> int:
        """Take objects out of host memory, in slices; how many went. Uses ``records`` up."""
        planner = self._cache.stack.planner
        gone = 0
        for some in used_up(records, _SLICE):
            self._cache.stack.loads.forsake(some)
            dropped = planner.evict(some, Cause.CLEARED, detail)
            self._cache.stack.host.removed(dropped)
            gone += len(dropped)
            await asyncio.sleep(0)
        return gone

    def stats(self) -> Stats:
        """Counters since the cache was opened, and who leases what. From any thread.

        Takes as long for an empty cache as for a full one.
        """
        stack, parts = self._cache.stack, self._cache.parts
        planner = stack.planner
        counts = planner.counts(tier.index for tier in stack.lower)
        host = replace(
            stack.host.stats(
                counts.objects, counts.used_nbytes, counts.capacity_nbytes, counts.pinned_nbytes
            ),
            policies_replaced=counts.policies_replaced,
        )
        lower = [
            replace(
                tier.stats(
                    counts.held[tier.index],
                    tier.figure("used_nbytes") or 0,
                    tier.figure("capacity_nbytes"),
                ),
                policies_replaced=tier.figure("policies_replaced") or 0,
                queued=stack.spills.queued(tier.index),
                encoded_nbytes=counts.held_nbytes[tier.index],
                left_unfinished=tier.figure("left_unfinished") or 0,
            )
            for tier in stack.lower
        ]
        return Stats(
            (host, *lower),
            parts.lookups,
            parts.asked_tokens,
            parts.hit_tokens,
            counts.leases,
            stack.inflight,
            stack.prefill.tokens_per_second,
            counts.owners,
            stack.foreign.costs(),
            planner.directory.forgotten,
        )

    def health(self) -> Health:
        """Whether each tier serves, by its last calls. From any thread."""
        stack = self._cache.stack
        return Health((stack.host.health(), *(tier.health() for tier in stack.lower)))

    def _lower(self, name: str | None) -> list[LowerTier]:
        stack = self._cache.stack
        if name is None:
            return list(stack.lower)
        instance("tier", name, str, hint="a tier's name as in stats(), or None for all")
        known = [stack.host.name, *(tier.name for tier in stack.lower)]
        if name not in known:
            near = nearest(name, known)
            raise ConfigError(
                f"there is no tier {name!r}",
                hint=f"did you mean {near!r}?" if near else f"tiers: {', '.join(known)}",
            )
        return [tier for tier in stack.lower if tier.name == name]

    async def _list(
        self, lower: LowerTier, namespace: str, keys: list[ObjectKey], removal: Removal
    ) -> None:
        """Add what a tier lists to ``keys``, as far as it does: the deadline is of each step."""
        try:
            async for batch in listed(lower, namespace):
                keys += batch.keys
        except TimeoutError:
            why = f"not listed within {lower.guard.deadline} s"
            lower.complains(Cause.DEADLINE, why)
            removal.unseen(lower, why)
        except Exception as exc:  # noqa: BLE001  # foreign code: what is known still goes
            lower.complains(Cause.TIER_DOWN, words(exc))
            removal.unseen(lower, words(exc))


def _keys(records: Sequence[ObjectRecord]) -> Steps[list[ObjectKey]]:
    keys: list[ObjectKey] = []
    for at in range(0, len(records), _NAMED):
        keys += [found.key for found in records[at : at + _NAMED]]
        if at + _NAMED < len(records):
            yield
    return keys
