"""The engines that are measured: what each keeps KV in, and how a prompt leaves its blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvlayer import Cache
from kvlayer_vllm.bench.serving import Serving
from kvlayer_vllm.bench.settled import settled
from kvlayer_vllm.engine import module, platform

__all__ = ["FILES", "KINDS", "TIERS", "leave_blocks", "options_of"]

TIERS = ("cpu", "file", "tier", "native", "native-fs")
"""kvlayer's connector with ``cpu://`` and with ``file://`` behind that, and vLLM's own
``OffloadingConnector`` with ``KVLayerTier`` (``file://``) behind its host memory, with that alone,
and with vLLM's tier of files."""

FILES = ("file", "tier", "native-fs")
"""Those whose files other engines read, at the same time and later."""

KINDS = ("prefix", *TIERS)
"""``prefix``: vLLM's prefix cache alone, the ceiling of the others, which have it too."""

HOST_NBYTES = 512 << 20  # of host memory each: more than all prompts of a run


def options_of(kind: str, directory: Path) -> dict[str, Any]:
    """Arguments of :class:`Serving`. Files go below ``directory``.

    Everything else is as users get it: prefix caching is on, kvlayer loads beside the batch.
    """
    if kind == "prefix":
        return {"enable_prefix_caching": True}
    files = {"url": f"file://{directory / kind}", "deadline_seconds": 60.0}
    if kind in ("cpu", "file"):
        tiers: list[dict[str, Any]] = [{"url": f"cpu://?capacity={HOST_NBYTES}B"}]
        if kind == "file":
            tiers.append({**files, "write": "back"})
        # Loads are what is measured: nothing is computed because that would be faster.
        cache = {"tiers": tiers, "report_prefill": False}
        return {"enable_prefix_caching": True, "cache": cache}
    extra: dict[str, Any] = {"cpu_bytes_to_use": HOST_NBYTES}
    specs = "CPUOffloadingSpec", "TieringOffloadingSpec"
    if platform() == "cpu":  # vLLM's own copies refuse it
        specs = "HostOnCpu", "TieringOnCpu"
        extra["spec_module_path"] = "kvlayer_vllm.bench.offload"
    extra["spec_name"] = specs[kind in FILES]
    if kind == "native-fs":
        extra["secondary_tiers"] = [{"type": "fs", "root_dir": str(directory / kind)}]
    elif kind == "tier":
        named = {"type": "KVLayerTier", "module_path": "kvlayer_vllm.tier"}
        extra["secondary_tiers"] = [{**named, "tiers": [files]}]
    transfer = module("config").KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra
    )
    return {"enable_prefix_caching": True, "kv_transfer_config": transfer}


def leave_blocks(serving: Serving, kind: str, prompt: list[int]) -> None:
    """From now on the prompt's KV is in the tier that is measured, and nowhere above it."""
    serving.rest()
    if kind == "prefix":
        return
    if kind in ("cpu", "file"):
        half = serving.connector.scheduler
        settled(half)
        if kind == "file":
            call: Callable[..., Any] = half.portal.call
            call(_evict, prompt)
    # vLLM's host memory is emptied with its connector, which a tier of files outlives.
    while not serving.core.reset_prefix_cache(False, kind in ("tier", "native-fs")):
        serving.engine.step()


async def _evict(cache: Cache, prompt: list[int]) -> None:
    await cache.control.evict(prompt, tier="cpu")
