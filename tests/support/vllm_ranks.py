"""An engine of several ranks, each in a process of its own: a role for ``zygote.Zygote``.

What ``vllm_engine.py`` answers. The ranks are forked from the engine's process, which has imported
vLLM by then (its CPU platform would spawn them), so what is patched here is patched in each.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import vllm_engine

from kvlayer.api.rank_worker import RankWorker
from kvlayer.tier.messages import Verb
from kvlayer_vllm import layouts

__all__ = ["serve"]


def serve(model: str, cache: Any, options: dict[str, Any]) -> None:
    """As ``vllm_engine.serve``. Of the options ``heads`` is ``wrong`` where each rank is to take
    itself for the holder of other heads than it has, and ``stuck`` a FIFO: rank 1 writes its
    process' number there with each gather that it begins, and never ends."""
    os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "1"
    with pytest.MonkeyPatch.context() as patch:
        _forks_ranks(patch)
        _stages_compute(patch)
        if options.pop("heads", "") == "wrong":
            patch.setattr(layouts, "_heads", _by_turns)
        if stuck := options.pop("stuck", ""):
            _never_gathers(patch, stuck)
        vllm_engine.serve(model, cache, {"distributed_executor_backend": "mp", **options})


def _by_turns(held: Any, rank: int, _ranks: int) -> tuple[int, int]:
    """Of more ranks than heads not the neighbours would hold the same one, but every other."""
    first = rank * held.heads % held.group.num_kv_heads
    return first, first + held.heads


def _never_gathers(patch: pytest.MonkeyPatch, fifo: str) -> None:
    carry_out = RankWorker.carry_out

    async def stuck(rank: RankWorker, order: Any, view: Any) -> bytes:
        if rank.number == 1 and rank.order(order).verb is Verb.GATHER:
            Path(fifo).write_text(f"{os.getpid()}\n")
            await asyncio.Event().wait()
        return await carry_out(rank, order, view)

    patch.setattr(RankWorker, "carry_out", stuck)


def _forks_ranks(patch: pytest.MonkeyPatch) -> None:
    from vllm.v1.executor import multiproc_executor

    context = multiprocessing.get_context("fork")
    patch.setattr(multiproc_executor, "get_mp_context", lambda: context)


def _stages_compute(patch: pytest.MonkeyPatch) -> None:
    """What a stage gets from the one before it has a place: vLLM makes it in a warm-up that its CPU
    runner leaves out when it is eager."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model

    def load(runner: Any, *args: Any, **how: Any) -> None:
        load_model(runner, *args, **how)
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )

    patch.setattr(CPUModelRunner, "load_model", load)
