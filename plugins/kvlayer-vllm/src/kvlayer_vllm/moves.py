"""Copies between the engine's blocks and the cache, as scheduler and worker see them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from threading import Condition, Event
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvlayer import Cache, KVView, Portal, RetrieveReport
from kvlayer.abc.stager import Landed
from kvlayer.api.lookup import Lookup
from kvlayer.errors import ClosedError, ForkedError
from kvlayer.identity.chain import ChunkChain
from kvlayer.runtime.job import Job
from kvlayer_vllm.device_order import Queued
from kvlayer_vllm.token_ids import Name

__all__ = ["NULL_BLOCK", "Load", "Save", "Slots", "slots_of", "state_slots"]

Slots: TypeAlias = NDArray[np.int64]

Learn: TypeAlias = Callable[[Cache, ChunkChain], Awaitable[None]]
"""Is told what is going to be stored, on the cache's loop."""

NULL_BLOCK = 0
"""Stands in a block table for what the engine has let go of."""

_POLL_SECONDS = 0.05


def slots_of(block_ids: Sequence[int], tokens_per_block: int, first: int, stop: int) -> Slots:
    """Slots of tokens ``first .. stop`` of a request with this block table; -1 for what is gone.

    Shorter where the table ends earlier.
    """
    at = first // tokens_per_block
    ids = np.array(block_ids[at : -(-stop // tokens_per_block)], np.int64)
    slots = ids[:, None] * tokens_per_block + np.arange(tokens_per_block)
    slots[ids == NULL_BLOCK] = -1
    inside = first - at * tokens_per_block
    found: Slots = slots.reshape(-1)[inside : inside + stop - first]
    return found


def state_slots(states: Mapping[int, int], tokens_per_block: int, first: int, stop: int) -> Slots:
    """Slots of tokens ``first .. stop`` where ``states`` says in which block the state lies that
    follows so many tokens; -1 for all others.
    """
    slots: Slots = np.full(stop - first, -1, np.int64)
    for end, block in states.items():
        if first < end <= stop:
            slots[end - 1 - first] = (block + 1) * tokens_per_block - 1
    return slots


class Save:
    """A store of some of a request's KV. Its blocks are read until it :attr:`is_over`."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._gathered = Event()
        self._job: Job[None] | None = None

    def begin(
        self,
        portal: Portal,
        name: Callable[[Name], Awaitable[ChunkChain]],
        view: KVView,
        behind: Queued,
        *,
        first_token: int,
        tail: bool,
        learn: Learn | None = None,
    ) -> None:
        """Start to store ``view``, from token ``first_token`` on, after ``learn(cache, chain)``.

        It is read behind what the engine has queued.

        ``name(cache.chain)`` says on the loop what its tokens are called, from the first on. What
        cannot be started is over. Raises ``ClosedError`` and ``ForkedError``.
        """
        view = behind.followed_by(view)
        try:
            self._job = portal.submit(
                self._run, name, view, first_token=first_token, tail=tail, learn=learn
            )
        except BaseException:
            self._gathered.set()
            raise

    async def _run(
        self,
        cache: Cache,
        name: Callable[[Name], Awaitable[ChunkChain]],
        view: KVView,
        *,
        first_token: int,
        tail: bool,
        learn: Learn | None,
    ) -> None:
        try:
            chain = await name(cache.chain)
            if learn is not None:
                await learn(cache, chain)
            await cache.store(
                chain,
                view,
                first_token=first_token,
                tail=tail,
                on_gathered=self._gathered.set,
                patience=0.0,  # a save holds blocks that the scheduler counts on
            )
        finally:
            self._gathered.set()

    @property
    def is_over(self) -> bool:
        """Whether the blocks are not read any more."""
        return self._gathered.is_set() or (self._job is not None and self._job.has_ended)

    @property
    def has_ended(self) -> bool:
        """Whether nothing is written to any tier any more, but by tiers that write ``back``."""
        return self._job is not None and self._job.has_ended

    def cancel(self) -> None:
        """What is not gathered yet is not stored."""
        if self._job is not None:
            self._job.cancel()

    def wait(self) -> None:
        """Until the blocks are not read any more: as long as copying them takes."""
        while (
            self._job is not None and not self.is_over
        ):  # a job that a closing portal drops sets no event
            self._gathered.wait(_POLL_SECONDS)


class Load:
    """A retrieve into a request's blocks, of what lies in host memory.

    Tokens ``first .. promised`` are what the scheduler was told; ``blocks`` is the block table of
    the one KV group, or None where there are several.
    """

    def __init__(
        self,
        request_id: str,
        lookup: Lookup | None,
        *,
        first: int,
        promised: int,
        blocks: Sequence[int] | None,
        tokens_per_block: int,
    ) -> None:
        self.request_id = request_id
        self.first = first
        self.promised = promised
        self._lookup = lookup
        self._blocks = blocks
        self._tokens_per_block = tokens_per_block
        self._start: Callable[[Landed, Queued], Job[RetrieveReport]] | None = None
        self._job: Job[RetrieveReport] | None = None
        self._is_distrusted = False
        self._is_refused = False
        self._changed = Condition()
        """Guards what follows."""
        self._landed: set[tuple[int, int]] = set()

    def prepare(self, start: Callable[[Landed, Queued], Job[RetrieveReport]]) -> None:
        """``start(landed, behind)`` begins the copy, which follows ``behind`` on the device."""
        self._start = start

    def begin(self, behind: Queued, on_over: Callable[[], None] | None = None) -> None:
        """Start to write into the blocks, behind all that the engine has queued for them.

        ``on_over`` is called once it :attr:`is_over`, on any thread. A load that was never prepared
        is over at once, and calls nothing.
        """
        if self._start is None or self._is_refused:
            self._is_refused = True  # nothing is loaded, and that is reported
            return
        try:
            self._job = self._start(self._layer_landed, behind)
        except (ClosedError, ForkedError):
            self._is_refused = True
        else:
            self._job.add_done_callback(lambda _: self._wake())
            if on_over is not None:
                self._job.add_done_callback(lambda _: on_over())

    def _layer_landed(self, group: int, local: int) -> None:
        with self._changed:
            self._landed.add((group, local))
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait_for_layer(self, group: int, local: int) -> None:
        """Until a layer holds all that is loaded, or the load has ended without it."""
        with self._changed:
            while (group, local) not in self._landed and not self.is_over:
                self._changed.wait(_POLL_SECONDS)

    def distrust(self) -> None:
        """Nothing that is computed with it counts. One that has not begun does not begin."""
        self._is_distrusted = True
        self._is_refused = self._job is None

    @property
    def is_over(self) -> bool:
        """Whether the blocks are not written any more."""
        return self._is_refused or (self._job is not None and self._job.has_ended)

    def wait(self) -> None:
        """Until the blocks are not written any more: as long as copying them takes."""
        if self._job is None:
            return
        try:
            self._job.exception()
        except CancelledError:
            pass  # the portal closes: nothing was loaded, and the blocks are let go of
        while not self._job.has_ended:
            Event().wait(_POLL_SECONDS)

    @property
    def tokens(self) -> int:
        """How many tokens from the prompt's start are in the blocks and right. Once it is over."""
        if self._job is None or self._is_distrusted:
            return self.first
        if self._job.cancelled() or self._job.exception() is not None:
            return self.first
        return max(min(self._job.result().tokens, self.promised), self.first)

    @property
    def is_whole(self) -> bool:
        """Whether all that was promised is there. Once it is over."""
        return self.tokens >= self.promised

    def invalid_blocks(self) -> set[int]:
        """The blocks that do not hold what was promised. Once it is over."""
        if self._blocks is None:
            return set()
        size = self._tokens_per_block
        return set(self._blocks[self.tokens // size : -(-self.promised // size)])

    def release(self) -> None:
        """Let go of what was loaded."""
        if self._lookup is not None:
            self._lookup.release()
