"""A worker's half: waits for copies that its step depends on, and carries out orders."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvlayer import KVView
from kvlayer.api.rank_worker import RankWorker
from kvlayer.runtime.loop_thread import LoopThread
from kvlayer.tier.messages import Task, Verb
from kvlayer_vllm.engine import KVCacheConfig, VllmConfig, make_scales
from kvlayer_vllm.groups import engine_groups
from kvlayer_vllm.hands import given_up
from kvlayer_vllm.layouts import RankLayout, caches_of, check_device, rank_layout
from kvlayer_vllm.messages import Answers, Handshake, Step
from kvlayer_vllm.moves import Load
from kvlayer_vllm.settings import Settings

__all__ = ["WorkerHalf"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it

_IDLE_SECONDS = 0.0005  # as long as vLLM's own loop sleeps after a step without work, and less


class WorkerHalf:
    """Made in every worker. Raises ``UnsupportedError`` for what cannot be carried."""

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings
    ) -> None:
        check_device()
        self._vllm_config = vllm_config
        self._form = settings.form
        self._groups = engine_groups(vllm_config, kv_cache_config)
        self._number = int(vllm_config.parallel_config.rank)
        self._held: RankLayout | None = None
        self._is_alone = vllm_config.parallel_config.distributed_executor_backend == "uni"
        self._caches: list[list[Any]] = []
        self._rank: LoopThread[RankWorker] | None = None
        self._has_tried = False
        self._completions: list[bytes] = []
        self._joined: set[int] = set()
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
        self._held = held

    def handshake(self) -> Handshake:
        """What the scheduler must know of this worker, once it has its tensors."""
        assert self._held is not None
        return Handshake(self._held, self._caches if self._is_alone else None)

    def before_step(self, step: Step) -> None:
        """Join where that is asked for, and gather what was ordered. Nothing else waits here."""
        if step.greeting and not self._has_tried:
            self._has_tried = True  # once: a rank that cannot join would cost something every step
            assert self._held is not None
            self._rank = RankWorker.start(
                step.greeting,
                self._held.layout,
                self._number,
                make_stager=self._held.make_stager(),
            )
            self._joined.add(self._number)
        self._carry_out(step, Verb.GATHER)

    def load(self, step: Step) -> None:
        """Fill blocks. Returns when those are there that this step computes with."""
        for load in step.loads:
            load.begin()
        if step.must_wait:
            self._loads, self._waited = step.loads, set()
            if not self._is_layerwise:
                for load in self._loads:
                    load.wait()
        self._carry_out(step, Verb.SCATTER)
        if step.is_idle:
            time.sleep(_IDLE_SECONDS)

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
        """Carry out the step's orders of one kind; those that are left are not answered yet."""
        for errand in tuple(step.errands):
            if errand.verb is not verb:
                continue
            assert self._rank is not None
            slots = [np.frombuffer(each, np.int64) for each in errand.slots]
            view = KVView(self._caches, slots)
            self._completions.append(self._rank.call(RankWorker.carry_out, errand.order, view))
            step.errands.remove(errand)

    def give_up(self, step: Step) -> None:
        """A hook of this step has failed: none of its loads counts, and every order is answered."""
        for load in step.loads:
            load.distrust()
        if step.must_wait:
            self._loads = step.loads
        for errand in step.errands:
            order = Task.from_bytes(errand.order)
            self._completions.append(given_up(order, "the worker's hook has failed"))
        step.errands = []

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
        found = Answers(step.number, self._completions, self._joined)
        self._completions, self._joined = [], set()
        return found

    def close(self) -> None:
        """Leave. Idempotent."""
        rank, self._rank = self._rank, None
        if rank is not None:
            rank.close()
