"""Both halves of the vLLM adapter on real requests, tensors and caches, stepped without an engine.

What the engine's scheduler would do with a request's numbers and blocks, a test does here: the
cases it is about are a matter of the order of hooks, which a whole engine seldom gets into.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_settled import settled

from kvlayer import Cache
from kvlayer_vllm.messages import Step
from kvlayer_vllm.scheduler import SchedulerHalf
from kvlayer_vllm.settings import Settings
from kvlayer_vllm.worker import WorkerHalf

__all__ = ["BLOCK", "LAYERS", "Desk", "hanging"]

BLOCK, CHUNK = 32, 64
LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]


class Desk:
    """One scheduler and one worker, in one process or, with ``remote``, as if in two.

    ``widths`` are the elements of K and V of one head, of layers where they are not 128.
    """

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        *,
        tiers: Sequence[dict[str, Any]] = ({"url": "cpu://?capacity=64MiB"},),
        remote: bool = False,
        widths: dict[str, int] | None = None,
        **extra: Any,
    ) -> None:
        settings = Settings.of(
            {"tokens_per_chunk": CHUNK, "tokens_per_tail": BLOCK, "tiers": list(tiers), **extra}
        )
        self.half = SchedulerHalf(vllm_config, kv_cache_config, settings)
        self.worker = WorkerHalf(vllm_config, kv_cache_config, settings)
        names = [name for group in kv_cache_config.kv_cache_groups for name in group.layer_names]
        blocks, width = kv_cache_config.num_blocks, widths or {}
        self.tensors = {name: torch.randn(blocks, 2, BLOCK, width.get(name, 128)) for name in names}
        self.worker.registered(self.tensors)
        handshake = self.worker.handshake()
        if remote:
            handshake.caches = None
        self.half.open({0: handshake})
        self.tables: dict[str, list[list[int]]] = {}
        self.groups = len(kv_cache_config.kv_cache_groups)
        self.pool = _pool(kv_cache_config.num_blocks)
        self.half.bind(SimpleNamespace(get_block_ids=self.tables.__getitem__, block_pool=self.pool))

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
        self.worker.before_step(step)
        self.worker.load(step)
        return step

    def accept(self, step: Step, scheduled: dict[Any, int] | None = None) -> set[int]:
        """Its output is accepted. Returns the blocks that were to be loaded and were not."""
        invalid = self.worker.invalid_blocks(step)
        for request, count in (scheduled or {}).items():
            request.num_in_flight_tokens -= count
        self.half.heard(self.worker.answers(step))
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
        """What the blocks hold, of every layer."""
        return [each[list(blocks)].clone() for each in self.tensors.values()]

    def close(self) -> None:
        self.half.close()
        self.worker.close()


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
