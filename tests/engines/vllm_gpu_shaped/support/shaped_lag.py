"""A device that lags, in vLLM's V2 runner: what a step computes is there when somebody waits.

The model computes in tensors that nobody else sees. The connector's are others: they get the blocks
of a step when vLLM takes the step's output, and the model sees what a connector has written into
them from the next step on. So a connector that reads too early reads what was there before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

__all__ = ["Lag", "lagging"]


@dataclass
class Lag:
    """Both copies of the KV, and what was seen last of the connector's."""

    model: dict[str, torch.Tensor]
    connector: dict[str, torch.Tensor] = field(init=False)
    _seen: dict[str, torch.Tensor] = field(init=False)
    late: int = 0
    """Blocks that came after the step that computed them was scheduled."""

    def __post_init__(self) -> None:
        self.connector = {
            name: tensor.clone(memory_format=torch.preserve_format)
            for name, tensor in self.model.items()
        }
        self._seen = {name: tensor.clone() for name, tensor in self.connector.items()}

    def show(self) -> None:
        """The model sees what the connector has written since the last step."""
        with torch.inference_mode():
            for name, tensor in self.connector.items():
                now = tensor.clone()  # copies may be under way: the rest is seen next time
                bits = (now.view(torch.uint8) != self._seen[name].view(torch.uint8)).flatten(1)
                changed = bits.any(dim=1).nonzero().flatten()
                self.model[name][changed] = now[changed]
                self._seen[name] = now

    def kept(self, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
        """What these blocks hold on the device once the step has run."""
        return {name: tensor[blocks].clone() for name, tensor in self.model.items()}

    def commit(self, blocks: torch.Tensor, kept: dict[str, torch.Tensor]) -> None:
        """Somebody has waited for the step."""
        self.late += len(blocks)
        with torch.inference_mode():
            for name, rows in kept.items():
                self.connector[name][blocks] = rows
                self._seen[name][blocks] = rows


def lagging() -> None:
    """Give this process's V2 runner such a device. For good: the process is one engine's."""
    hooks: Any = import_module("vllm.v1.worker.gpu.kv_connector").ActiveKVConnector
    runner: Any = import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    answer: Any = import_module("vllm.v1.worker.gpu.async_utils").AsyncOutput
    init, pre_forward = hooks.__init__, hooks.pre_forward
    prepare_attn, sample = runner.prepare_attn, runner.sample_tokens
    get_output = answer.get_output

    def begin(self: Any, vllm_config: Any, kv_caches: dict[str, torch.Tensor]) -> None:
        self.lag = Lag(kv_caches)
        init(self, vllm_config, self.lag.connector)

    def before(self: Any, *args: Any, **how: Any) -> None:
        pre_forward(self, *args, **how)
        self.lag.show()

    def prepared(self: Any, batch: Any) -> Any:
        tables, slots = prepare_attn(self, batch)
        size = self.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.written = torch.unique(slots[0][slots[0] >= 0] // size)
        return tables, slots

    def sampled(self: Any, *args: Any) -> Any:
        found = sample(self, *args)
        if isinstance(found, answer) and isinstance(self.kv_connector, hooks):
            lag = self.kv_connector.lag
            found.is_late = lag, self.written, lag.kept(self.written)
        return found

    def taken(self: Any) -> Any:
        lag, blocks, kept = self.__dict__.pop("is_late", (None, None, None))
        if lag is not None:
            lag.commit(blocks, kept)
        return get_output(self)

    hooks.__init__, hooks.pre_forward = begin, before
    runner.prepare_attn, runner.sample_tokens = prepared, sampled
    answer.get_output = taken
