"""A connector that promises a prefix and then reports all of it as not loaded.

It moves nothing, so what is wrong behind it is the engine's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

__all__ = ["Rejecting"]

_base: Any = import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")


@dataclass
class _Promises(_base.KVConnectorMetadata):  # type: ignore[misc]  # vLLM's own type
    blocks: set[int] = field(default_factory=set[int])
    names: set[str] = field(default_factory=set[str])


class Rejecting(_base.KVConnectorBase_V1):  # type: ignore[misc]  # vLLM's own type
    """Every request is promised all but its last block, once; ``is_async``: beside the batch."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._size = vllm_config.cache_config.block_size
        self._is_async = self._kv_transfer_config.kv_connector_extra_config["is_async"]
        self._promised = _Promises()
        self._known: set[str] = set()
        self._over = _Promises()

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        if request.request_id in self._known:
            return 0, False
        count = (request.num_prompt_tokens - 1) // self._size * self._size - computed
        return (count, self._is_async) if count > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, count: int) -> None:
        if count:
            self._known.add(request.request_id)
            self._promised.names.add(request.request_id)
            self._promised.blocks.update(blocks.get_block_ids()[0][: count // self._size])

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        promised, self._promised = self._promised, _Promises()
        return promised

    def start_load_kv(self, forward_context: Any, **how: Any) -> None:
        said = self._get_connector_metadata()
        self._over.blocks |= said.blocks
        if self._is_async:
            self._over.names |= said.names

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        names, self._over.names = self._over.names, set()
        return _base.KVConnectorTransferResults(finished_recving=names)

    def get_block_ids_with_load_errors(self) -> set[int]:
        blocks, self._over.blocks = self._over.blocks, set()
        return blocks

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, *args: Any, **how: Any) -> None:
        """Nothing is stored."""

    def wait_for_save(self) -> None:
        """Nothing is stored."""
