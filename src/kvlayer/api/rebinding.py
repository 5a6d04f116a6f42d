"""Binding an open cache to another namespace: what is asked of it, and the steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable

from kvlayer._values import instance, shown_value
from kvlayer.abc.backend import Capability
from kvlayer.api import assembly
from kvlayer.api.lower_tiers import check_sharing
from kvlayer.api.open_cache import OpenCache
from kvlayer.errors import ArgumentError, IdentityError
from kvlayer.events import CacheRebound
from kvlayer.identity.namespace import Namespace
from kvlayer.runtime.foreign import awaited

__all__ = ["check", "rebind"]

_SAME = ("tokens_per_chunk", "tokens_per_tail", "hash_scheme")


def check(namespace: Namespace, parts: OpenCache) -> None:
    """Raise ``IdentityError`` unless an open cache could hold KV of a namespace.

    It must have the same KV groups, chunks, links and hash scheme: else its objects have other
    shapes or names, and belong to another cache.
    """
    instance("namespace", namespace, Namespace, hint="dataclasses.replace(cache.namespace, ...)")
    assembly.check_namespace(namespace, parts.stack.planner.layout)
    for field in _SAME:
        here, there = getattr(parts.namespace, field), getattr(namespace, field)
        if here != there:
            raise IdentityError(
                f"the namespace has {field} = {there!r}, this cache {here!r}",
                hint="open another cache for it: objects of other sizes or names are not its own",
            )
    check_sharing(namespace, [tier.backend for tier in parts.stack.lower])


async def rebind(
    parts: OpenCache, namespace: Namespace, update: Callable[[], Awaitable[object]] | None
) -> None:
    """See ``Cache.rebind``."""
    check(namespace, parts)
    stack, before = parts.stack, parts.namespace
    # No request can begin between any two of these: there is no await.
    stopped = stack.epochs.close(namespace.digest)
    parts.namespace = namespace
    stack.planner.serve(namespace.digest)
    for tier in stack.lower:
        tier.guard.hint(
            partial(stack.objects.describe, tier.index, namespace.digest, namespace.canonical())
        )
        if Capability.LIST in tier.backend.capabilities and namespace.digest not in tier.listed:
            stack.recover(tier, namespace.digest)
    if parts.emit:
        parts.emit(CacheRebound(before=before.digest, now=namespace.digest, stopped=stopped))
    with stack.epochs.changing():
        await stack.epochs.ended()
        if update is not None:
            await awaited(partial(_updated, update))


async def _updated(update: Callable[[], Awaitable[object]]) -> None:
    found = update()
    if not isawaitable(found):
        raise ArgumentError(
            f"update() must return what can be awaited, found {shown_value(found)}; until it is "
            "rebound the cache stores and serves nothing",
            hint="make it an `async def`, and call rebind again",
        )
    await found
