"""vLLM's real ``TieringOffloadingManager`` with a tier behind it, driven as its scheduler does."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hang import HANG

from kvlayer_vllm.bench.serving import Serving

__all__ = [
    "Offload",
    "config_of",
    "content_of",
    "folder_tier",
    "key_of",
    "leave_offload",
    "offload_state",
    "spec_of",
    "tier_of",
]

CHUNKS = 8  # of host memory


def spec_of(vllm_config: Any, kv_cache_config: Any, tier: dict[str, Any], **extra: Any) -> Any:
    """The offload of an engine with this tier: ``TieringOffloadingSpec``."""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
        build_offloading_config,
    )
    from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

    config = copy.copy(vllm_config)
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "cpu_bytes_to_use": 1 << 30,
            "secondary_tiers": [tier],
            **extra,
        },
    )
    spec = TieringOffloadingSpec(build_offloading_config(config, kv_cache_config))
    spec.num_chunks = CHUNKS
    return spec


def tier_of(*tiers: dict[str, Any], **options: Any) -> dict[str, Any]:
    """``KVLayerTier`` as ``secondary_tiers`` names it."""
    named = {"type": "KVLayerTier", "module_path": "kvlayer_vllm.tier"}
    return {**named, "tiers": [*tiers], **options}


def folder_tier(folder: Path) -> dict[str, Any]:
    return {"url": f"file://{folder}", "deadline_seconds": HANG}


def key_of(number: int, group: int = 0) -> Any:
    """vLLM's name of a chunk."""
    from vllm.v1.kv_offload.base import make_offload_key

    return make_offload_key(random.Random(number).randbytes(32), group)


def content_of(number: int, nbytes: int) -> bytes:
    return random.Random(f"content {number}").randbytes(nbytes)


class Offload:
    """One engine's offload. :meth:`close` it."""

    def __init__(
        self,
        vllm_config: Any,
        kv_cache_config: Any,
        tier: dict[str, Any],
        **extra: Any,
    ) -> None:
        from kvlayer_vllm.tier import manager

        spec = spec_of(vllm_config, kv_cache_config, tier, **extra)
        with pytest.MonkeyPatch.context() as patch:  # no connector makes it here
            patch.setattr(manager, "offloading_engine", lambda: (vllm_config, kv_cache_config))
            self.manager = spec.get_manager()
        (self.tier,) = self.manager.secondary_tiers
        self._rows = self.manager.primary_tier.get_kv_memoryview().cast("B")
        self.nbytes = self.tier.block_size_bytes
        self._count = 0

    def request(self, **fields: Any) -> Any:
        """A request arrives."""
        from vllm.v1.kv_offload.base import ReqContext

        self._count += 1
        context = ReqContext(req_id=f"request-{self._count}")
        for name, value in fields.items():
            setattr(context, name, value)
        return self.arrives(context)

    def arrives(self, context: Any) -> Any:
        self.manager.on_new_request(context)
        return context

    def over(self, context: Any) -> None:
        self.manager.on_request_finished(context)

    def step(self) -> None:
        """A step is scheduled."""
        ended = SimpleNamespace(new_req_ids=(), preempted_req_ids=())
        self.manager.on_schedule_end(ended)

    def rest(self) -> None:
        """Until nothing is moved."""
        while self.manager._jobs:
            self.tier.drain_jobs()
            self.step()

    def row(self, chunk: int) -> memoryview:
        return self._rows[chunk * self.nbytes : (chunk + 1) * self.nbytes]

    def store(self, numbers: Sequence[int], context: Any = None) -> None:
        """An engine stores chunks, which go on to the tier."""
        own = context or self.request()
        keys = [key_of(number) for number in numbers]
        out = self.manager.prepare_store(keys, own)
        assert out is not None and list(out.keys_to_store) == keys
        for number, chunk in zip(numbers, out.store_spec.chunk_ids, strict=True):
            self.row(int(chunk))[:] = content_of(number, self.nbytes)
        self.manager.complete_store(keys, own)
        self.rest()
        if context is None:
            self.over(own)

    def found(self, number: int, context: Any = None) -> bytes | None:
        """What an engine loads of a chunk; None where it is a miss. It never waits for ever."""
        from vllm.v1.kv_offload.base import LookupResult

        own = context or self.request()
        key = key_of(number)
        while (result := self.manager.lookup(key, own)) is not LookupResult.MISS:
            if result is LookupResult.HIT:
                break
            self.step()
        found: bytes | None = None
        if result is LookupResult.HIT:
            spec = self.manager.prepare_load([key], own)
            found = bytes(self.row(int(spec.chunk_ids[0])))
            self.manager.complete_load([key], own)
        if context is None:
            self.over(own)
        return found

    def forget(self) -> None:
        """vLLM's host memory holds nothing any more."""
        self.manager.reset_cache()

    def close(self) -> None:
        self._rows.release()
        self.manager.shutdown()


# -- in an engine of its own -----------------------------------------------------------------------


def config_of(tier: dict[str, Any]) -> Any:
    """vLLM's offload with this tier, on a CPU: its copies alone are replaced."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "cpu_bytes_to_use": 64 << 20,
            "spec_name": "TieringOnCpu",
            "spec_module_path": "kvlayer_vllm.bench.offload",
            "secondary_tiers": [tier],
        },
    )


def _manager(serving: Serving) -> Any:
    return serving.connector.connector_scheduler.manager


def leave_offload(serving: Serving) -> Any:
    """What was stored is in the tier alone: neither in vLLM's blocks nor in its host memory."""
    serving.rest()
    while not serving.core.reset_prefix_cache(False, True):
        serving.engine.step()


def offload_state(serving: Serving) -> Any:
    """Of the tier, whether it is on, and what it has done."""
    (tier,) = _manager(serving).secondary_tiers
    portal = getattr(tier, "_portal", None)
    if portal is None:
        return {"on": False}
    stats = portal.subject.stats()
    return {
        "on": True,
        "namespace": portal.subject.namespace.digest,
        "hits": [each.hits for each in stats],
        "stored": [each.stored for each in stats],
        "verdicts": len(tier._verdicts),
        "running": tier._running,
    }
