"""In which order a runner of vLLM's works on blocks and calls a connector, step by step."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import getsource
from typing import Any

__all__ = ["STEP", "recorded"]

STEP = ["blocks are zeroed", "first hook", "computed", "loads begin", "last hook"]
"""What comes after what in each step, on the thread that queues the device's work."""


def recorded() -> list[list[str]]:
    """Of every step from now on, what happened in it. For good: the process is one engine's.

    vLLM zeroes new blocks, where a model needs that, in ``update_requests``; it computes until
    ``finish_forward``.
    """
    steps: list[list[str]] = []
    runner: Any = import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    hooks: Any = import_module("vllm.v1.worker.gpu.kv_connector").ActiveKVConnector
    connector: Any = import_module("kvlayer_vllm.connector").KVLayerConnector
    assert "zero_block_ids(" in getsource(runner.update_requests)
    assert "copy_kv_cache_blocks_inplace(" in getsource(runner.update_requests)

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **how: Any) -> Any:
            if what == STEP[0]:
                steps.append([])
            if steps:  # before the first step vLLM may try itself out
                steps[-1].append(what)
            return call(*args, **how)

        return note

    for owner, name, what in (
        (runner, "update_requests", STEP[0]),
        (connector, "handle_preemptions", STEP[1]),
        (hooks, "finish_forward", STEP[2]),
        (connector, "start_load_kv", STEP[3]),
        (connector, "build_connector_worker_meta", STEP[4]),
    ):
        setattr(owner, name, noted(what, getattr(owner, name)))
    return steps
