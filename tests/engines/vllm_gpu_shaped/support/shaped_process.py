"""An engine of a GPU's shape in a process of its own: a role for ``zygote.Zygote``.

What ``vllm_engine.py`` answers, with vLLM's V2 runner and its AsyncScheduler around a CPU.
"""

from __future__ import annotations

import os
from typing import Any

import shaped_triton

shaped_triton.use()

import vllm_engine  # noqa: E402  # imports vLLM
from shaped_attention import WRITES, triton_attention  # noqa: E402
from shaped_lag import lagging  # noqa: E402
from shaped_order import recorded  # noqa: E402

__all__ = ["serve"]

_STEPS: list[list[list[str]]] = []


def serve(model: str, cache: Any, options: dict[str, Any]) -> None:
    """As ``vllm_engine.serve``. Of the options ``attention`` is ``cpu`` or ``triton``, ``layout``
    a KV cache layout of vLLM's, ``rejecting`` says whether a connector of that name is asked
    ``sync`` or ``async``, ``lags`` whether the device does, and ``notes_order`` whether ``order``
    is going to be asked for."""
    layout = options.pop("layout", "")
    if layout:
        os.environ["VLLM_KV_CACHE_LAYOUT"] = layout
    if options.pop("attention", "cpu") == "triton":
        triton_attention()
    if options.pop("lags", False):
        lagging()
    if options.pop("notes_order", False):
        _STEPS.append(recorded())
    _schedules_ahead()
    rejecting = options.pop("rejecting", "")
    if rejecting:
        options["kv_transfer_config"] = _rejecting(is_async=rejecting == "async")
    vllm_engine.VERBS |= {"shape": shape, "order": order}
    vllm_engine.serve(model, cache, options)


def shape(serving: Any) -> Any:
    """What runs here, so that a test knows what it has seen."""
    runner = serving.core.model_executor.driver_worker.worker.model_runner
    lag = getattr(runner.kv_connector, "lag", None)
    config = serving.engine.vllm_config
    return {
        "scheduler": type(serving.core.scheduler).__name__,
        "runner": type(runner).__mro__[1].__module__,
        "steps": serving.core.batch_queue_size,
        "layout": config.cache_config.kv_cache_layout,
        "writes": WRITES[0],
        "late": 0 if lag is None else lag.late,
    }


def order(_: Any) -> Any:
    """What happened in each step."""
    return _STEPS[0]


def _schedules_ahead() -> None:
    """vLLM's CPU platform turns it off at the end of its own check."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def checked(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(checked)


def _rejecting(*, is_async: bool) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="Rejecting",
        kv_connector_module_path="shaped_rejecting",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"is_async": is_async},
    )
