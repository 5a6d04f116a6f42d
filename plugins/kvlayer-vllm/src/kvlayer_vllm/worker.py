"""A worker's half: waits for copies that its step depends on, and begins its rank's orders."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from threading import Event
from typing import Any

from kvlayer.tier.messages import Verb
from kvlayer_vllm.device_order import NOTHING, EngineStream
from kvlayer_vllm.engine import KVCacheConfig, VllmConfig, make_scales
from kvlayer_vllm.groups import engine_groups
from kvlayer_vllm.introductions import Introduction
from kvlayer_vllm.layouts import caches_of, check_device, rank_layout
from kvlayer_vllm.lent_tensors import LentTensors
from kvlayer_vllm.messages import Answers, RankOrder, Step
from kvlayer_vllm.moves import Load
from kvlayer_vllm.orders import Orders
from kvlayer_vllm.ranks import count_of, is_beside_scheduler
from kvlayer_vllm.settings import Settings

__all__ = ["WorkerHalf"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it

_IDLE_SECONDS = 0.0002  # a step that computes nothing leaves the processor to others for so long


class WorkerHalf:
    """Made in every worker. Raises ``UnsupportedError`` for what cannot be carried."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings
    ) -> None:
        self._stream = EngineStream(check_device())
        self._vllm_config = vllm_config
        self._form = settings.form_of(count_of(vllm_config))
        self._groups = engine_groups(vllm_config, kv_cache_config)
        self._number = int(vllm_config.parallel_config.rank)
        self.introduction: Introduction | None = None
        """What the scheduler must know of this worker, once it has its tensors."""
        self._is_beside = is_beside_scheduler(vllm_config)
        self._caches: list[list[Any]] = []
        self._lent = LentTensors(self._caches, self._stream)
        """To a scheduler beside it."""
        self._orders: Orders | None = None
        """None beside a scheduler, which copies itself."""
        self._is_greeted = False
        self._invalid: set[int] = set()
        self._is_layerwise = settings.loads == "layerwise"
        self._places = {
            name: (group, local)
            for group, each in enumerate(self._groups)
            for local, name in enumerate(each.layer_names)
        }
        self._loads: list[Load] = []
        """Of the step under way, while it computes."""
        self._waited: set[str] = set()
        self._has_loaded = Event()
        """A load has ended since the last rest."""

    def registered(self, tensors: Mapping[str, Any]) -> None:
        """The engine's KV tensors are there, by the names of their layers.

        Raises ``UnsupportedError`` for tensors that cannot be carried.
        """
        held = rank_layout(self._vllm_config, self._groups, self._form, tensors, rank=self._number)
        self._caches = caches_of(self._groups, held.layout, tensors)
        for each in self._groups:
            if each.group.quantisation.endswith("_per_token_head"):
                for name in each.layer_names:
                    make_scales(self._vllm_config, name, tensors[name])
        self._lent = LentTensors(self._caches, self._stream)
        if self._is_beside:
            self.introduction = Introduction(held, self._lent)
        else:
            self.introduction = Introduction(held, None)
            self._orders = Orders(self._number, held)

    def unregistered(self) -> None:
        """The memory of the tensors is going to be given up. Idempotent.

        Nothing copies when this returns, as long as that takes, and nothing does until it is there
        again: :meth:`restored`.
        """
        self._lent.take_back()
        if self._orders is not None:
            self._orders.wait()

    def restored(self) -> None:
        """The tensors have memory again, at the same place. Idempotent."""
        self._lent.give_out()

    def before_step(self, step: Step) -> None:
        """Begin to join where that is asked for, and to gather what was ordered. Nothing waits."""
        if self._orders is None:
            return
        self._stream.note()
        if step.greeting and not self._is_greeted:
            self._orders.join(step.greeting, step.shares[self._number])
            self._is_greeted = True
        self._carry_out(step, Verb.GATHER)

    def load(self, step: Step) -> None:
        """Fill blocks. Returns when those are there that this step computes with."""
        self._stream.note()
        if step.loads:
            behind = self._stream.queued()
            for load in step.loads:
                if not self._lent.are_there:
                    load.distrust()
                load.begin(behind, self._has_loaded.set)
        if step.must_wait:
            self._loads, self._waited = step.loads, set()
            if not self._is_layerwise:
                for load in self._loads:
                    load.wait()
        self._carry_out(step, Verb.SCATTER)
        if step.is_idle:
            self._rest(step)

    def _rest(self, step: Step) -> None:
        """Leave the processor to others until a copy has ended, at most so long, and say so.

        A step that computes nothing costs vLLM as much as a copy of some MiB: what ends while it
        rests is told of with it, not with the next one.
        """
        if self._orders is not None:
            self._orders.rest(_IDLE_SECONDS)
            return
        self._has_loaded.wait(_IDLE_SECONDS)
        self._has_loaded.clear()
        if step.land is not None:
            step.land()

    def layer(self, name: str) -> None:
        """Attention over this layer is next: wait for what is loaded into it."""
        if not self._loads:
            return
        self._waited.add(name)
        if self._is_layerwise and name in self._places:
            for load in self._loads:
                load.wait_for_layer(*self._places[name])

    def _end_loads(self) -> None:
        """The step has computed: which blocks it should have had and did not."""
        is_trusted = not self._is_layerwise or self._places.keys() <= self._waited
        if self._loads and not is_trusted:
            self._is_layerwise = False  # this model's attention does not ask: wait before the step
            _log.warning("this model does not wait for layers: loads are waited for as a whole")
        for load in self._loads:
            load.wait()
            if not is_trusted:
                load.distrust()
            if not load.is_whole:
                self._invalid |= load.invalid_blocks()
        self._loads = []

    def _carry_out(self, step: Step, verb: Verb) -> None:
        """Begin this rank's orders of one kind; those that are left have not begun."""
        mine = [each for each in self._mine(step) if each.verb is verb]
        behind = self._stream.queued() if mine else NOTHING
        for order in mine:
            assert self._orders is not None
            if self._lent.are_there and self._is_greeted:
                self._orders.begin(order, step.views[order.view], self._caches, behind)
            else:
                self._orders.give_up(order)
            step.errands.remove(order)

    def _mine(self, step: Step) -> list[RankOrder]:
        return [each for each in step.errands if each.rank == self._number]

    def give_up(self, step: Step) -> None:
        """A hook of this step has failed: none of its loads counts, and no more orders begin."""
        for load in step.loads:
            load.distrust()
        if step.must_wait:
            self._loads = step.loads
        for order in self._mine(step):
            assert self._orders is not None
            self._orders.give_up(order)
            step.errands.remove(order)

    def invalid_blocks(self, step: Step) -> set[int]:
        """Blocks that were to be loaded by now and were not."""
        self._end_loads()
        found, self._invalid = self._invalid | step.invalid, set()
        return found

    def all_blocks(self, step: Step) -> set[int]:
        """:meth:`invalid_blocks` has failed: every block that was to be loaded by now."""
        self.give_up(step)
        loads, self._loads = self._loads, []
        for load in loads:
            load.wait()
        found, self._invalid = self._invalid | step.invalid, set()
        return found.union(*(load.invalid_blocks() for load in loads))

    def answers(self, step: Step) -> Answers:
        """What the scheduler is to hear with this step, each time at least its number."""
        if self._orders is None:
            return Answers(step.number)
        greeted = {self._number} if self._is_greeted else set[int]()
        answers = Answers(step.number, self._orders.answers(), greeted)
        if why_not := self._orders.why_not:
            answers.refusals[self._number] = why_not
        if step.asks and self.introduction is not None:
            answers.introductions[self._number] = self.introduction
        return answers

    def close(self) -> None:
        """Leave. Idempotent."""
        orders, self._orders = self._orders, None
        if orders is not None:
            orders.close()
