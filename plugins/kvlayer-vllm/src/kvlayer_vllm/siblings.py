"""Other connectors of the same engine, in vLLM's ``MultiConnector``: what goes for all of them."""

from __future__ import annotations

import logging

from kvlayer_vllm.engine import (
    KVCacheConfig,
    VllmConfig,
    single_group_connectors,
    transfer_config,
)

__all__ = ["may_load", "recompute_failed_loads", "warn_of_single_groups"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it


def may_load(vllm_config: VllmConfig) -> bool:
    """Whether loads are asked for, and safe. Called while the scheduler's connector is made.

    Where several steps are under way vLLM keeps blocks that one of them still writes from those
    who load into them, but only for a connector that it knows as a consumer. Of a
    ``MultiConnector`` it knows the role of the whole.
    """
    own, outer = vllm_config.kv_transfer_config, transfer_config(vllm_config)
    if not own.is_kv_consumer or outer.is_kv_consumer:
        return bool(own.is_kv_consumer)
    if getattr(vllm_config, "max_concurrent_batches", 2) == 1:
        return True
    _log.warning(
        "kvlayer stores, but loads nothing: %s has kv_role %r, so that vLLM does not keep blocks "
        "from loads while a step still writes them; its kv_role must be 'kv_both'",
        outer.kv_connector,
        outer.kv_role,
    )
    return False


def recompute_failed_loads(vllm_config: VllmConfig) -> None:
    """Have vLLM compute what a load has not brought; its default fails the request.

    Called while the scheduler's connector is made: vLLM reads the policy after that.
    """
    transfer = transfer_config(vllm_config)
    if transfer.kv_load_failure_policy == "recompute":
        return
    transfer.kv_load_failure_policy = "recompute"
    whose = ""
    if transfer is not vllm_config.kv_transfer_config:
        whose = f" for all connectors of {transfer.kv_connector}"
    _log.info(
        "kv_load_failure_policy is 'recompute' from here on%s: a cache fails into a miss", whose
    )


def warn_of_single_groups(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Name the connectors because of which vLLM keeps sliding windows as full attention.

    Called while the scheduler's connector is made.
    """
    if not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    names = single_group_connectors(transfer_config(vllm_config))
    if names and any(getattr(spec, "sliding_window", None) for spec in specs):
        _log.warning(
            "%s beside kvlayer serves a single KV group (it is no SupportsHMA), so that vLLM keeps "
            "this model's sliding windows as full attention, and more blocks of them",
            ", ".join(names),
        )
