"""What vLLM was promised to be loaded, from the promise until it has heard how the load ended.

A promise must end: loaded or reported, whatever fails in between. Which step waits for a load, and
which one tells of its end, is noted in the step's record (``steps_under_way``).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from kvlayer import Cache, KVView, Portal, RetrieveReport
from kvlayer.api.lookup import Lookup
from kvlayer_vllm.device_order import NOTHING
from kvlayer_vllm.hands import WorkerLink
from kvlayer_vllm.messages import Step
from kvlayer_vllm.moves import NULL_BLOCK, Load, Slots, slots_of, state_slots
from kvlayer_vllm.settings import Loads
from kvlayer_vllm.steps_under_way import StepUnderWay
from kvlayer_vllm.tracked import Tracked

__all__ = ["PendingLoads"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it


class PendingLoads:
    """Loads in the order of their lives: promised, sent with a step, over, told. No I/O.

    ``is_async``: requests wait beside the batch, and hear of their load with some later step; else
    a load is over before the step that it was sent with computes.
    """

    def __init__(
        self,
        portal: Portal,
        hands: WorkerLink,
        block_sizes: Sequence[int],
        loads: Loads,
        *,
        states: Collection[int] = (),
    ) -> None:
        """``states``: those of vLLM's groups, by their numbers, that keep recurrent states."""
        self._portal = portal
        self._hands = hands
        self._block_sizes = tuple(block_sizes)
        self._is_layerwise = loads == "layerwise"
        self._states = states
        self._is_all_or_none = bool(states) or len(block_sizes) > 1
        """vLLM could not be told which blocks failed; a shorter prefix has no state at its end."""
        # No worker of this process could wait in a step, or vLLM copies the state before it.
        self.is_async = loads == "async" or not hands.is_local or self._is_all_or_none
        self._made: list[Tracked] = []
        """To be loaded with the next step."""
        self._sent: dict[str, Tracked] = {}
        """Beside the batch, and not over as far as vLLM was told."""

    def __len__(self) -> int:
        """Promises that have not ended, but for those a step waits for."""
        return len(self._made) + len(self._sent)

    # -- made ------------------------------------------------------------------------------------

    def make(self, tracked: Tracked, block_ids: Sequence[Sequence[int]], more: int) -> None:
        """Promise the ``more`` tokens that vLLM has made room for in these blocks."""
        assert tracked.search is not None
        lookup = tracked.search.take()
        load = self._make(tracked, block_ids, more, lookup)
        # All that was found: the last token is computed again, into a block that is whole by then.
        is_all = load.promised == tracked.request.num_tokens - 1
        held = min(len(ids) * size for ids, size in zip(block_ids, self._block_sizes, strict=True))
        stop = min(tracked.found, held) if is_all else load.promised
        slots = [
            self._state_slots(ids, size, load.first, stop)
            if number in self._states
            else slots_of(ids, size, load.first, stop)
            for number, (ids, size) in enumerate(zip(block_ids, self._block_sizes, strict=True))
        ]
        view = self._hands.view(slots, load)
        load.prepare(
            lambda landed, behind: self._portal.submit(
                _retrieve,
                lookup,
                behind.followed_by(view),
                first_token=load.first,
                on_layer=landed if self._is_layerwise else None,
            )
        )
        tracked.saved = stop

    @staticmethod
    def _state_slots(ids: Sequence[int], size: int, first: int, stop: int) -> Slots:
        """The one that vLLM goes on from: in its table where the last tokens of the prefix are."""
        block = ids[stop // size - 1]
        return state_slots({} if block == NULL_BLOCK else {stop: block}, size, first, stop)

    def make_failed(self, tracked: Tracked, block_ids: Sequence[Sequence[int]], more: int) -> None:
        """:meth:`make` has failed: what was promised is going to be a load that failed."""
        if tracked.load is None:
            self._make(tracked, block_ids, more, None)

    def _make(
        self,
        tracked: Tracked,
        block_ids: Sequence[Sequence[int]],
        more: int,
        lookup: Lookup | None,
    ) -> Load:
        """What vLLM relies on from here on: unless the load is prepared, it is one that failed."""
        load = Load(
            tracked.request.request_id,
            lookup,
            first=tracked.local,
            promised=tracked.local + more,
            blocks=None if self._is_all_or_none else tuple(block_ids[0]),
            tokens_per_block=self._block_sizes[0],
        )
        tracked.load = load
        tracked.is_awaited = self.is_async
        self._made.append(tracked)
        return load

    def distrust(self) -> None:
        """The blocks have lost what they held: of no load that vLLM awaits anything counts."""
        for tracked in (*self._made, *self._sent.values()):
            if tracked.load is not None:
                tracked.load.distrust()

    # -- sent ------------------------------------------------------------------------------------

    def send(self, step: Step, record: StepUnderWay) -> None:
        """Start what was promised, with this step."""
        step.must_wait = not self.is_async
        for tracked in self._made:
            assert tracked.load is not None
            self._send(tracked, tracked.load, record)
            if self._hands.is_local:
                step.loads.append(tracked.load)
            else:
                tracked.load.begin(NOTHING)  # its ranks order their copies themselves
                step.is_idle = step.is_idle or not record.computes
        self._made = []

    def send_failed(self, step: Step, record: StepUnderWay) -> None:
        """The step went wrong before or while loads were put into it: those left out are over."""
        step.must_wait = not self.is_async
        for tracked in self._made:
            load = tracked.load
            assert load is not None
            self._send(tracked, load, record)
            if load in step.loads:
                continue
            load.distrust()
            if not self.is_async:
                step.invalid |= load.invalid_blocks()
        self._made = []

    def _send(self, tracked: Tracked, load: Load, record: StepUnderWay) -> None:
        if self.is_async:
            self._sent[load.request_id] = tracked
        elif (tracked, load) not in record.waits_for:
            record.waits_for.append((tracked, load))

    # -- over, and told ---------------------------------------------------------------------------

    def land(self, step: Step, record: StepUnderWay) -> None:
        """Tell with this step of the loads beside the batch that have ended.

        Of one that began with this very step a later one tells: a hook that fails after it has
        begun must still be able to distrust it.
        """
        if not self.is_async:
            return
        for request_id, tracked in list(self._sent.items()):
            load = tracked.load
            assert load is not None
            if load in step.loads or not load.is_over:
                step.is_idle = step.is_idle or not record.computes
                continue
            if not load.is_whole:  # said first: what is not whole must never count as received
                if self._is_all_or_none:
                    step.failed.add(request_id)
                else:
                    step.invalid |= load.invalid_blocks()
            step.received.add(request_id)
            del self._sent[request_id]
            record.told.append(tracked)
            self._end(tracked, load)

    def settle(self, record: StepUnderWay) -> None:
        """vLLM has heard the step: end the loads it waited for, and the promises it told of."""
        for tracked in record.told:
            tracked.is_awaited = False
        for tracked, load in record.waits_for:
            if tracked.load is load:
                self._end(tracked, load)

    def settle_early(self, tracked: Tracked) -> None:
        """The request is over before its step was heard of: a load that went well is right."""
        load = tracked.load
        if load is not None and not self.is_async and load.is_over and load.is_whole:
            self._end(tracked, load)

    def _end(self, tracked: Tracked, load: Load) -> None:
        if not load.is_whole:
            _log.warning(
                "request %s: %d of %d tokens were loaded, the rest is computed",
                load.request_id,
                load.tokens,
                load.promised,
            )
            tracked.has_failed = True
            tracked.saved = 0 if self._is_all_or_none else load.tokens
        load.release()
        tracked.load = None


async def _retrieve(cache: Cache, /, lookup: Lookup, view: KVView, **how: Any) -> RetrieveReport:
    """Load, and let go of it here: for a thousand chunks that is a third of a millisecond."""
    with lookup:
        return await cache.retrieve(lookup.hit, view, **how)
