"""A connector of vLLM's that introduces its workers, as those of disaggregated serving do.

It moves nothing. Like NIXL's it raises for an introduction that is none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)

__all__ = ["Greeter", "LoneGreeter"]


@dataclass
class Greeting(KVConnectorHandshakeMetadata):
    """From its workers to its scheduler's half."""

    text: str = "hello"


class LoneGreeter(KVConnectorBase_V1):
    """One that knows a single KV group."""

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return Greeting()

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        for each in metadata.values():
            if not isinstance(each, Greeting):
                raise ValueError(f"expected a {Greeting.__name__}, found {each!r}")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing was promised."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to load."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is stored."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""


class Greeter(LoneGreeter, SupportsHMA):
    """One that knows several KV groups."""

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None
