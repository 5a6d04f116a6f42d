"""What of the requests' KV is stored, and how much of it at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from kvlayer import Cache, CacheConfig, Portal
from kvlayer.errors import BackendError, IdentityError, KVLayerError
from kvlayer.runtime.job import Job
from kvlayer.runtime.turns import in_turns
from kvlayer.tier.planner.records import HostState
from kvlayer_vllm.block_events import BlockEvents
from kvlayer_vllm.engine import KVCacheManager
from kvlayer_vllm.hands import WorkerLink
from kvlayer_vllm.held_blocks import HeldBlocks
from kvlayer_vllm.kept_states import KeptStates
from kvlayer_vllm.moves import NULL_BLOCK, Save, slots_of, state_slots
from kvlayer_vllm.scopes import Digests, scope_of
from kvlayer_vllm.tracked import Tracked

__all__ = ["Stores"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it

_TRIES = 50  # to empty a cache while loads that were given up still end
_TRY_SECONDS = 0.01


class Stores:
    """Stores what vLLM counts as computed: chunks as they fill, tails at the ends.

    What is read is held (``held``). Where no more may be, a store is cut short at a chunk, which
    ``on_cut`` is told once, and the request's next step goes on from there; what a request that
    ends had no room for is not stored. One chunk at a time always has room.
    """

    def __init__(
        self,
        portal: Portal,
        hands: WorkerLink,
        block_sizes: Sequence[int],
        config: CacheConfig,
        *,
        digests: Digests,
        events: BlockEvents | None,
        held: HeldBlocks,
        kept: KeptStates,
        on_cut: Callable[[], None],
    ) -> None:
        self._portal = portal
        self._hands = hands
        self._block_sizes = tuple(block_sizes)
        self._config = config
        chunk = config.tokens_per_chunk
        # At most: a chunk that is no multiple of the block ends and begins inside of one.
        self._blocks_per_chunk = sum(-(-chunk // n) + bool(chunk % n) for n in block_sizes)
        self._digests = digests
        self._events = events
        self._held = held
        self._kept = kept
        self._on_cut = on_cut
        self._running: list[Save] = []
        """Those that may still write to a tier, whether or not they read blocks."""

    def new(self, tracked: Tracked, block_table: KVCacheManager) -> None:
        """A step of the request was accepted: store the chunks it filled, or its whole prompt."""
        request_id = tracked.request.request_id
        where = partial(block_table.get_block_ids, request_id)
        computed = tracked.storable
        if not tracked.has_prompt and computed >= tracked.request.num_prompt_tokens:
            self._store(tracked, computed, where, tail=True)
            tracked.has_prompt = not tracked.is_cut
            return
        chunk = self._config.tokens_per_chunk
        if computed // chunk > tracked.saved // chunk:
            self._store(tracked, computed // chunk * chunk, where, tail=False)

    def rest(self, tracked: Tracked, block_ids: Sequence[Sequence[int]]) -> None:
        """The request is over: store all that it has, tail included."""
        self._store(tracked, tracked.storable, lambda: block_ids, tail=True)

    def _store(
        self,
        tracked: Tracked,
        stop: int,
        where: Callable[[], Sequence[Sequence[int]]],
        *,
        tail: bool,
    ) -> None:
        """Store tokens up to ``stop`` beyond those that are saved, from the blocks ``where()``."""
        request = tracked.request
        if tracked.search is None or tracked.load is not None or not self._hands.may_copy:
            return
        stop -= stop % self._config.tail_tokens
        if stop <= tracked.saved:
            tracked.is_cut = False
            return
        try:
            scope = scope_of(request, self._digests, tracked.wishes)
        except IdentityError as exc:
            tracked.exclude(str(exc))
            return
        if scope is None:
            return  # a digest of it is still being made
        chunk = self._config.tokens_per_chunk
        first = tracked.saved // chunk * chunk
        tables = where()
        blocks = self._blocks(tracked, tables, first, stop)
        room = self._room()
        tracked.is_cut, was_cut = len(blocks) > room, tracked.is_cut
        if tracked.is_cut:
            if not was_cut:
                self._on_cut()
            tail, stop = False, first + room // self._blocks_per_chunk * chunk
            if stop <= tracked.saved:
                return
            blocks = self._blocks(tracked, tables, first, stop)
        slots = [
            state_slots(_of_table(tracked, number), size, first, stop)
            if number in self._kept.tables
            else slots_of(each, size, first, stop)
            for number, (each, size) in enumerate(zip(tables, self._block_sizes, strict=True))
        ]
        if min(map(len, slots)) < stop - first:
            return
        save = Save(request.request_id)
        tokens = tracked.ids.upto(stop)
        view = self._hands.view(slots, save)
        learn = None
        if self._events is not None:
            learn = partial(self._events.stores, request=request, first=first)
        behind = self._hands.queued()  # may be refused by the device: before anything is held
        self._held.hold(save, blocks)
        save.begin(
            self._portal,
            partial(tracked.ids.chain_in_slices, tokens=tokens, scope=scope),
            view,
            behind,
            first_token=first,
            tail=tail,
            learn=learn,
        )
        self._running = [each for each in self._running if not each.has_ended]
        self._running.append(save)
        tracked.saved = stop
        self._kept.taken(tracked, stop)

    def _blocks(
        self, tracked: Tracked, tables: Sequence[Sequence[int]], first: int, stop: int
    ) -> list[int]:
        """The blocks of tokens ``first .. stop`` of every group, but for those that are gone.

        Of states those that are kept: their groups' tables have others, too.
        """
        rows = [
            block
            for number, (table, size) in enumerate(zip(tables, self._block_sizes, strict=True))
            if number not in self._kept.tables
            for block in table[first // size : -(-stop // size)]
            if block != NULL_BLOCK
        ]
        kept = (blocks for end, blocks in tracked.states.items() if first < end <= stop)
        return [*rows, *(block for blocks in kept for block in blocks.values())]

    def _room(self) -> int:
        """How many blocks the next store may read."""
        self._held.let_go()
        return max(self._held.room, 0 if self._held else self._blocks_per_chunk)

    def forget(self) -> bool:
        """Empty the cache, in all tiers, of this namespace. Whether nothing of it is left.

        What is being stored is given up first, or it would be there again. Waits at most
        ``close_seconds``, and not for what ranks elsewhere are copying: they answer with the
        engine's next steps, and what was given up by then is never served.
        """
        for save in self._running:
            save.cancel()
        await_copies = self._hands.is_local
        job: Job[bool] = self._portal.submit(_emptied, [*self._running], await_copies)
        try:
            return job.wait(self._config.close_seconds)
        except KVLayerError:
            job.cancel()
            _log.exception("the cache was not cleared")
            return False


def _of_table(tracked: Tracked, table: int) -> dict[int, int]:
    """By the token they follow, the blocks of the states that are kept of a group of vLLM's."""
    return {end: blocks[table] for end, blocks in tracked.states.items()}


async def _emptied(cache: Cache, saves: Sequence[Save], await_copies: bool) -> bool:
    """What is under way would be there again once it ends: that comes first.

    All of it was cancelled. A save that is still being copied ends without having stored that.
    """
    left = _TRIES
    while left:
        if all(save.has_ended or not (await_copies or save.is_over) for save in saves):
            left -= 1
            await cache.flush()
            with suppress(BackendError):  # something is left, which the figures say
                await cache.control.clear()
            if await _is_empty(cache, await_copies):
                return True
        await asyncio.sleep(_TRY_SECONDS)
    return False


async def _is_empty(cache: Cache, await_copies: bool) -> bool:
    """Whether no tier has anything; what ranks are still copying into memory is not there yet."""
    host, *lower = cache.control.stats().tiers
    if any(tier.objects for tier in lower):
        return False
    if await_copies or not host.objects:
        return not host.objects
    found = await in_turns(cache.stack.planner.resident())
    return not any(record.host is HostState.READY for record in found)
