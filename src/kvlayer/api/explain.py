"""Why a prompt missed: the cause of every span after the usable prefix, in words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from kvlayer._steps import Steps
from kvlayer.errors import IdentityError
from kvlayer.identity.keys import ChunkChain, ObjectKey, Scope, Span, Tokens
from kvlayer.identity.namespace import Namespace
from kvlayer.layout import HitRule
from kvlayer.results import Cause, Explanation, MissedChunk
from kvlayer.runtime.turns import in_turns
from kvlayer.tier.guard.guard import Refused
from kvlayer.tier.planner.copies import Copy, of_tier
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.tier import LowerTier
from kvlayer.tier.transfer.loads import LATE, down

if TYPE_CHECKING:
    from kvlayer.api.cache import Cache
    from kvlayer.tier.planner.journal import Loss
    from kvlayer.tier.planner.match import Match
    from kvlayer.tier.planner.survey import Account

__all__ = ["explain"]

# What made trouble may name an object of somebody else's.
_HEALTH = "control.health() says why"

_SLICE = 64  # spans explained in one turn of the loop: some 10 us each


async def explain(cache: Cache, tokens: Tokens, scope: Scope) -> Explanation:
    """Look a prompt up without pinning it and name the cause of each miss.

    Causes come from what this process remembers (a bounded journal) and from what the tiers say.
    Nothing is told of what another owner stored, or of what lies under a salt that ``scope`` has
    not: such tokens were never stored, for all that whoever asks may know. What is usable is said,
    whoever stored it: a lookup finds it, too.
    """
    chain = await cache.named(tokens, scope)
    if chain.is_stale:
        detail = "its chain was made before the cache was rebound"
        missed = MissedChunk(0, chain.num_tokens, Cause.REBOUND, detail)
        return Explanation(chain.num_tokens, 0, {}, (missed,))
    async with cache.stack.finder.found(chain) as match:
        others = await _other_namespaces(cache, chain, match.tokens)
        misses = await in_turns(_misses(cache, chain, match, others))
        by_tier = await in_turns(cache.stack.planner.by_tier(match))
        takes = await in_turns(_takes(cache, match))
        return Explanation(chain.num_tokens, match.tokens, by_tier, misses, takes)


def _misses(
    cache: Cache, chain: ChunkChain, match: Match, others: dict[bytes, str]
) -> Steps[tuple[MissedChunk, ...]]:
    """Why each span after ``match`` misses."""
    start = match.tokens
    if start < chain.named_tokens:
        yield from chain.fingerprinting(len(chain))
    misses: list[MissedChunk] = []
    for count, span in enumerate(_unusable(chain, start), 1):
        missed = _missed(cache, chain, match, span, others)
        if missed is not None:
            _append(misses, missed)
        if not count % _SLICE:
            yield
    return tuple(misses)


def _takes(cache: Cache, match: Match) -> Steps[dict[str, int]]:
    """By lower tier, the bytes that what is usable takes there, as far as is known."""
    path, lower = match.path(), cache.stack.lower
    takes = {tier.name: 0 for tier in lower}
    for at, found in enumerate(path):
        if at and not at % _SLICE:
            yield
        for tier in lower:
            takes[tier.name] += Copy.read(of_tier(found.copies, tier.index)).nbytes
    return takes


def _unusable(chain: ChunkChain, start: int) -> Iterator[Span]:
    """The spans a complete hit would have had after ``start``, and the rest that has no name."""
    step = chain.chunk_step
    end = len(chain) * step
    yield from map(chain.span, range(start // step, len(chain)))
    tails = chain.tails(len(chain))
    named = max(start, end)
    if tails and tails[0].stop > start:
        yield tails[0]
        named = tails[0].stop
    if named < chain.num_tokens:
        yield Span(named, chain.num_tokens, b"")


def _missed(  # noqa: PLR0911  # one return per cause, most telling first
    cache: Cache,
    chain: ChunkChain,
    match: Match,
    span: Span,
    others: dict[bytes, str],
) -> MissedChunk | None:
    """The cause for one span; None when the span itself is there."""
    planner = cache.stack.planner
    at = (span.start, span.stop)
    if not span.hash:
        return _nameless(chain, span)
    account = planner.account(chain, span)
    if None not in account.covers:
        return _not_taken(cache, span, [found for cover in account.covers for found in cover or ()])
    loss = account.loss
    if account.is_filling:
        return MissedChunk(*at, Cause.IN_FLIGHT, "on its way into host memory right now")
    if _lacks_only_states(cache, account):
        return _no_end(match, span, loss)
    if loss is not None:
        return MissedChunk(*at, loss.cause, _told(loss))
    if account.elsewhere is not None:
        detail = f"you stored the same tokens under: {account.elsewhere}"
        return MissedChunk(*at, Cause.OTHER_SALT, detail)
    if account.is_own and span.hash in others:
        return MissedChunk(*at, Cause.OTHER_NAMESPACE, others[span.hash])
    if account.beside is not None:
        detail = (
            f"this cache has it in namespace {account.beside[:12]}: of another epoch, or of a "
            "quality that the request does not accept"
        )
        return MissedChunk(*at, Cause.OTHER_NAMESPACE, detail)
    for tier in cache.stack.lower:
        if tier.trouble:
            return MissedChunk(*at, Cause.TIER_DOWN, f"{tier.name} has trouble: {_HEALTH}")
    detail = "no record of these tokens after what precedes them"
    if account.divergent is not None:
        detail = f"a stored prompt starts alike and differs from token {account.divergent} on"
    return MissedChunk(*at, Cause.NEVER_STORED, detail, account.divergent)


def _nameless(chain: ChunkChain, span: Span) -> MissedChunk:
    if chain.unnamed is not None:
        detail = f"token {chain.unnamed} has an id of 2^30 or more, which no vocabulary has"
        return MissedChunk(span.start, span.stop, Cause.NO_NAME, detail)
    detail = (
        f"{span.tokens} tokens are left over: a prompt's end is kept in multiples of "
        f"{chain.tail_step}"
    )
    return MissedChunk(span.start, span.stop, Cause.SHORT, detail)


def _told(loss: Loss) -> str:
    return f"{loss.detail}, {max(time.time() - loss.when, 0):.0f} s ago"


def _lacks_only_states(cache: Cache, account: Account) -> bool:
    """Whether all else of a span is there, so that a hit that ends with it lacks its state."""
    groups = [layout.group for layout in cache.stack.planner.layout.groups]
    lacking = [g for g, cover in zip(groups, account.covers, strict=True) if cover is None]
    return 0 < len(lacking) < len(groups) and all(
        group.hit_rule is HitRule.BOUNDARY for group in lacking
    )


def _no_end(match: Match, span: Span, loss: Loss | None) -> MissedChunk:
    """Why no hit ends with a span whose attention is there: a state is at few of the ends."""
    state = f"the state to {match.tokens:,}" if match.tokens else "there is no state"
    detail = f"attention is there to {match.reached:,}, {state}"
    if loss is None:
        return MissedChunk(span.start, span.stop, Cause.NEVER_STORED, detail)
    return MissedChunk(
        span.start, span.stop, loss.cause, f"{detail}; at {span.stop:,}: {_told(loss)}"
    )


def _not_taken(cache: Cache, span: Span, records: list[ObjectRecord]) -> MissedChunk | None:
    """Why a span that is there would not be loaded now; None when only something before it is."""
    dead = down(cache.stack.lower)
    for found in records:
        if tier_name := cache.stack.loads.stuck(found):
            return MissedChunk(span.start, span.stop, Cause.DEADLINE, f"{tier_name}: {LATE}")
    for tier in cache.stack.lower:
        if any(
            found.host is not HostState.READY
            and not found.tiers & ~dead
            and found.tiers >> tier.index & 1
            for found in records
        ):
            detail = f"{tier.name} is not asked for now: {_HEALTH}"
            return MissedChunk(span.start, span.stop, Cause.TIER_DOWN, detail)
    if any(found.host is not HostState.READY for found in records):
        rate = cache.stack.prefill.tokens_per_second
        if rate is not None:
            detail = f"computing it takes {span.tokens / rate:.3f} s, which loading would not beat"
            return MissedChunk(span.start, span.stop, Cause.SLOW, detail)
    return None


async def _other_namespaces(cache: Cache, chain: ChunkChain, start: int) -> dict[bytes, str]:
    """Missing chunks that other namespaces of the lower tiers hold, and which fields differ."""
    found: dict[bytes, str] = {}
    for tier in cache.stack.lower:
        with suppress(Refused):
            call = tier.guard.start(partial(_held_elsewhere, cache, tier, chain, start))
            if await tier.guard.wait_alone(call) and call.error is None:
                found.update(call.result())
            call.cancel()  # an explanation that cannot be had is not worth failing for
    return found


async def _held_elsewhere(
    cache: Cache, tier: LowerTier, chain: ChunkChain, start: int
) -> dict[bytes, str]:
    found: dict[bytes, str] = {}
    for digest, canonical in (await cache.stack.objects.namespaces(tier.index)).items():
        if digest == chain.namespace:
            continue
        try:
            theirs = Namespace.from_canonical(canonical)
        except IdentityError:  # of a later release, say: that is no reason to miss the others
            continue
        differing = ", ".join(cache.namespace.differences(theirs))
        detail = f"stored on {tier.name} for another setup: {differing}"
        for at in range(start // chain.chunk_step, len(chain), _SLICE):
            keys = [
                ObjectKey.of(digest, chain.zone(span), span.hash, span.tokens, part)
                for span in chain.spans(min(at + _SLICE, len(chain)), at)
                for part in cache.stack.planner.directory.needs
            ]
            sizes = await cache.stack.objects.contains(tier.index, keys)
            there = (key for key, size in zip(keys, sizes, strict=True) if isinstance(size, int))
            found.update((key.end_hash, detail) for key in there)
            await asyncio.sleep(0)
    return found


def _append(misses: list[MissedChunk], missed: MissedChunk) -> None:
    """Join neighbours that share a cause, so that a long prompt stays readable.

    What follows a chunk that was never stored was not stored either, and says nothing new.
    """
    last = misses[-1] if misses else None
    if (
        last is not None
        and last.stop == missed.start
        and last.cause is missed.cause
        and (last.detail == missed.detail or missed.cause is Cause.NEVER_STORED)
    ):
        misses[-1] = MissedChunk(
            last.start, missed.stop, last.cause, last.detail, last.divergent_token
        )
    else:
        misses.append(missed)
