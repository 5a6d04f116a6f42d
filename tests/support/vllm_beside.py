"""kvlayer among other connectors of one engine, in vLLM's ``MultiConnector``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvlayer_vllm.bench.serving import Serving

__all__ = ["BesideServing", "config_of", "sibling"]

_SIBLINGS: Mapping[str, dict[str, Any]] = {
    "greeter": {"kv_connector": "Greeter", "kv_connector_module_path": "vllm_greeter"},
    "lone": {"kv_connector": "LoneGreeter", "kv_connector_module_path": "vllm_greeter"},
    "offloading": {
        "kv_connector": "OffloadingConnector",
        "kv_connector_extra_config": {
            "spec_name": "HostOnCpu",
            "spec_module_path": "kvlayer_vllm.bench.offload",
            "cpu_bytes_to_use": 64 << 20,
        },
    },
}


def config_of(order: Sequence[str], cache: Mapping[str, Any], role: str = "kv_both") -> Any:
    """vLLM's configuration of connectors in this order; ``kvlayer`` with ``cache`` for its own.

    ``role`` is that of all together; each has ``kv_both``.
    """
    from vllm.config import KVTransferConfig

    kvlayer = {
        "kv_connector": "KVLayerConnector",
        "kv_connector_module_path": "kvlayer_vllm",
        "kv_connector_extra_config": dict(cache),
    }
    chosen = [{**_SIBLINGS, "kvlayer": kvlayer}[name] for name in order]
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role=role,
        kv_connector_extra_config={"connectors": [{"kv_role": "kv_both", **n} for n in chosen]},
    )


class BesideServing(Serving):
    """An engine whose connector is a ``MultiConnector``."""

    @property
    def connector(self) -> Any:
        """kvlayer's."""
        return sibling(self, "KVLayerConnector")


def sibling(serving: Serving, name: str) -> Any:
    """The one connector of a class."""
    every = serving.core.scheduler.connector.sub_connectors
    (found,) = [each for each in every if type(each).__name__ == name]
    return found
