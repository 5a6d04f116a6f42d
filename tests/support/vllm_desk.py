"""Both halves of the vLLM adapter on real requests, tensors and caches, stepped without an engine.

What the engine's scheduler would do with a request's numbers and blocks, a test does here: the
cases it is about are a matter of the order of hooks, which a whole engine seldom gets into.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvlayer import Cache
from kvlayer_vllm.bench.settled import settled
from kvlayer_vllm.introductions import Introduction
from kvlayer_vllm.messages import Answers, Step
from kvlayer_vllm.scheduler import SchedulerHalf
from kvlayer_vllm.settings import Settings
from kvlayer_vllm.worker import WorkerHalf

__all__ = ["BLOCK", "LAYERS", "Desk", "hanging"]

BLOCK, CHUNK = 32, 64
LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]


class Desk:
    """One scheduler and its workers: one, in its process or with ``remote`` as if in another, or
    ``tensor`` times ``pipeline`` as if elsewhere, each with a ``kv_cache_configs`` of its own.

    ``widths`` are the elements of a token of one head, of layers that do not have their spec's.
    """

    def __init__(
        self,
        vllm_config: Any,
        *kv_cache_configs: Any,
        tiers: Sequence[dict[str, Any]] = ({"url": "cpu://?capacity=64MiB"},),
        remote: bool = False,
        widths: dict[str, int] | None = None,
        tensor: int = 1,
        pipeline: int = 1,
        clock: Callable[[], float] = time.monotonic,
        **extra: Any,
    ) -> None:
        given = {
            "tokens_per_chunk": CHUNK,
            "tokens_per_tail": BLOCK,
            "report_prefill": False,  # steps that compute nothing take no time
            "tiers": list(tiers),
        }
        settings = Settings.of({**given, **extra})
        configs = [vllm_config]
        if remote or tensor * pipeline > 1:
            configs = [
                _elsewhere(vllm_config, n, tensor, pipeline) for n in range(tensor * pipeline)
            ]
        self.half = SchedulerHalf(configs[0], kv_cache_configs[0], settings, clock=clock)
        self.workers: list[WorkerHalf] = []
        self.rows_held: list[dict[str, torch.Tensor]] = []
        """The KV tensors by the names of layers, of each rank."""
        for number, config in enumerate(configs):
            mine = kv_cache_configs[number % len(kv_cache_configs)]
            self.workers.append(WorkerHalf(config, mine, settings))
            self.rows_held.append(_tensors(mine, widths or {}))
            self.workers[-1].registered(self.rows_held[-1])
        self.worker, self.tensors = self.workers[0], self.rows_held[0]
        self.half.open(self.introductions())
        self.tables: dict[str, list[list[int]]] = {}
        self.groups = len(kv_cache_configs[0].kv_cache_groups)
        self.pool = _pool(kv_cache_configs[0].num_blocks)
        self.half.bind(SimpleNamespace(get_block_ids=self.tables.__getitem__, block_pool=self.pool))

    def introductions(self) -> dict[int, Introduction]:
        """What the workers say of themselves, by their ranks."""
        said = {number: each.introduction for number, each in enumerate(self.workers)}
        return {number: each for number, each in said.items() if each is not None}

    # -- what the engine would do ------------------------------------------------------------------

    def asked(self, request: Any, computed: int = 0) -> tuple[int, bool]:
        """What the request can have beyond ``computed``, once that is known."""
        while (found := self.half.matched(request, computed))[0] is None:
            self.run()
        more, is_async = found
        assert more is not None
        return more, is_async

    def admit(self, request: Any, blocks: Sequence[int], computed: int = 0) -> int:
        """A request that has arrived gets blocks; how many tokens are going to be loaded."""
        more, _ = self.asked(request, computed)
        self.tables[request.request_id] = [list(blocks) for _ in range(self.groups)]
        self.half.allocated(request, self.tables[request.request_id], more)
        request.num_computed_tokens = computed + more
        return more

    def begin(
        self, scheduled: dict[Any, int] | None = None, preempted: Collection[Any] = ()
    ) -> Step:
        """A step goes out and computes: ``scheduled`` tokens of requests."""
        scheduled = scheduled or {}
        output = SimpleNamespace(
            num_scheduled_tokens={each.request_id: n for each, n in scheduled.items()},
            preempted_req_ids={each.request_id for each in preempted},
        )
        step = Step()
        self.half.step(output, step)
        for request, count in scheduled.items():
            request.num_computed_tokens += count
            request.num_in_flight_tokens += count
        for worker in self.workers:
            worker.before_step(step)
        for worker in self.workers:
            worker.load(step)
        return step

    def accept(self, step: Step, scheduled: dict[Any, int] | None = None) -> set[int]:
        """Its output is accepted. Returns the blocks that were to be loaded and were not."""
        invalid = set[int]().union(*(each.invalid_blocks(step) for each in self.workers))
        for request, count in (scheduled or {}).items():
            request.num_in_flight_tokens -= count
        self.half.heard(reduce(Answers.aggregate, (each.answers(step) for each in self.workers)))
        return invalid

    def run(self, scheduled: dict[Any, int] | None = None) -> Step:
        """A whole step."""
        step = self.begin(scheduled)
        self.accept(step, scheduled)
        return step

    def preempt(self, request: Any) -> None:
        """The request's blocks are another's from now on."""
        request.num_computed_tokens = 0
        self.tables[request.request_id] = [[] for _ in range(self.groups)]

    def finish(self, request: Any) -> None:
        self.half.finished(request, self.tables[request.request_id])

    def held(self) -> set[int]:
        """Blocks that are held: none of the requests' own counts here."""
        return {block.block_id for block in self.pool.blocks[1:] if block.ref_cnt}

    def rest(self) -> None:
        """Until nothing is read or written any more."""
        while self.half.tracked:
            self.run()
        settled(self.half)

    def answer(self, request: Any, blocks: Sequence[int]) -> None:
        """A whole request: what the cache has of it is loaded, the rest is computed and stored."""
        self.half.arrived(request)
        more = self.admit(request, blocks)
        self.run()  # loads of several groups are beside the batch
        while self.half._tracked[request.request_id].load is not None:
            self.run()
        self.run({request: request.num_tokens - more})
        self.finish(request)
        self.rest()

    def found(self, tokens: Sequence[int], **scope: Any) -> int:
        """Tokens of a prompt that the cache has."""

        async def look(cache: Cache) -> int:
            async with cache.lookup(list(tokens), **scope) as hit:
                return hit.tokens

        return self.half.portal.call(look)

    def rows(self, blocks: Sequence[int]) -> list[Any]:
        """What the blocks hold, of every layer of every rank."""
        return [each[list(blocks)].clone() for held in self.rows_held for each in held.values()]

    def close(self) -> None:
        self.half.close()
        for worker in self.workers:
            worker.close()


def _elsewhere(vllm_config: Any, rank: int, tensor: int, pipeline: int) -> Any:
    """The configuration as rank ``rank`` of several has it, in a process of its own."""
    config = copy.copy(vllm_config)
    config.parallel_config = parallel = copy.copy(vllm_config.parallel_config)
    parallel.distributed_executor_backend = "mp"
    parallel.rank, parallel.world_size = rank, tensor * pipeline
    parallel.tensor_parallel_size, parallel.pipeline_parallel_size = tensor, pipeline
    return config


def _tensors(kv_cache_config: Any, widths: dict[str, int]) -> dict[str, torch.Tensor]:
    """Random KV by the names of layers, as the CPU backend shapes it."""
    found: dict[str, torch.Tensor] = {}
    for group in kv_cache_config.kv_cache_groups:
        by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            spec = by_layer.get(name, group.kv_cache_spec)
            row = spec.state_content_size_bytes // spec.dtype.itemsize
            row = widths.get(name, row)
            shape = (kv_cache_config.num_blocks, spec.num_kv_heads, spec.block_size, row)
            found[name] = torch.randn(shape).to(spec.dtype)
    return found


def _pool(blocks: int) -> Any:
    """vLLM's own, in which the requests of a test hold nothing."""
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(blocks, enable_caching=True, hash_block_size=BLOCK)


def hanging(patch: pytest.MonkeyPatch, go_on: threading.Event) -> None:
    """From now on ``Cache.store`` begins to read blocks only once ``go_on`` is set."""
    store = Cache.store

    async def late(cache: Cache, *args: Any, **how: Any) -> Any:
        await asyncio.get_running_loop().run_in_executor(None, go_on.wait)
        return await store(cache, *args, **how)

    patch.setattr(Cache, "store", late)
