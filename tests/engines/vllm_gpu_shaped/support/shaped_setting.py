"""An engine's shape: its scheduler, its ranks, and how far they run behind each other."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "BLOCK",
    "CHUNK",
    "HEADS",
    "HEAD_SIZE",
    "SETTINGS",
    "STATE_LAYERS",
    "STATE_NBYTES",
    "Configs",
    "Setting",
]

BLOCK, CHUNK = 16, 32
LAYERS, HEADS, HEAD_SIZE = 2, 2, 16
STATE_LAYERS = ((2,), (3, 4))
"""Of two KV groups, where a model has recurrent states."""
STATE_NBYTES = 64
_MODEL: dict[str, Any] = {
    "hidden_size": HEADS * HEAD_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_SIZE,
    "vocab_size": 512,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What differs between the engines that a traffic is played on."""

    name: str
    is_async: bool = False
    """vLLM's ``AsyncScheduler``: a step is scheduled before the last one was heard."""
    depth: int = 1
    """Steps under way at most. The device is up to ``depth - 1`` steps behind the scheduler."""
    loads: str = "async"
    window: int | None = None
    """Tokens that the last layer sees; it is a KV group of its own then."""
    has_states: bool = False
    """Two more KV groups keep recurrent states, as vLLM does with prefix caching (mode align)."""
    tensor: int = 1
    pipeline: int = 1
    is_remote: bool = False
    """The workers are in other processes: what goes to them and comes back is pickled."""
    zeroes: bool = False
    """New blocks are zeroed before any hook of the step, as vLLM's V2 runner does."""
    is_gpu: bool = False
    """The ranks compute on a simulated GPU (``gpu_sim``) that checks the order of all accesses."""
    blocks: int = 32

    def __str__(self) -> str:
        return self.name

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline


SETTINGS = {
    each.name: each
    for each in (
        Setting("one step, sync loads", loads="sync"),
        Setting("one step, async loads"),
        Setting("one step, a window", window=40),
        Setting("one step, a worker elsewhere", is_remote=True),
        Setting("one step, zeroed blocks", zeroes=True),
        Setting("two steps", is_async=True, depth=2),
        Setting("two steps, a window", is_async=True, depth=2, window=40),
        Setting("two steps, a worker elsewhere", is_async=True, depth=2, is_remote=True),
        Setting("two steps, zeroed blocks", is_async=True, depth=2, zeroes=True),
        Setting("three steps", is_async=True, depth=3),
        Setting("three steps, a window", is_async=True, depth=3, window=40),
        Setting("one step, states", has_states=True, blocks=72),
        Setting("one step, states, a worker elsewhere", has_states=True, is_remote=True, blocks=72),
        Setting("two steps, states", is_async=True, depth=2, has_states=True, blocks=72),
        Setting(
            "three steps, states, a window",
            is_async=True,
            depth=3,
            window=40,
            has_states=True,
            blocks=72,
        ),
        Setting("a GPU, checked", is_async=True, depth=2, zeroes=True, is_gpu=True),
        Setting(
            "two GPU ranks, checked", is_async=True, depth=2, tensor=2, is_remote=True, is_gpu=True
        ),
        Setting("two tensor ranks", is_async=True, depth=2, tensor=2, is_remote=True),
        Setting("four tensor ranks", is_async=True, depth=2, tensor=4, is_remote=True),
        Setting("two stages", is_async=True, depth=3, pipeline=2, is_remote=True),
        Setting("two by two", is_async=True, depth=3, tensor=2, pipeline=2, is_remote=True),
    )
}


class Configs:
    """vLLM's own configuration objects for a setting. Reused by every seed."""

    def __init__(self, setting: Setting, model: Path) -> None:
        from vllm import EngineArgs
        from vllm.config import KVTransferConfig

        self.setting = setting
        self._base = EngineArgs(
            model=str(model),
            dtype="float32",
            load_format="dummy",
            block_size=BLOCK,
            max_model_len=512,
            max_num_seqs=6,
            max_num_batched_tokens=96,
            enable_prefix_caching=True,
            distributed_executor_backend="mp" if setting.is_remote else "uni",
            kv_transfer_config=KVTransferConfig(
                kv_connector="KVLayerConnector",
                kv_connector_module_path="kvlayer_vllm",
                kv_role="kv_both",
                kv_connector_extra_config={
                    "tiers": [{"url": "cpu://?capacity=2MiB"}],
                    "tokens_per_chunk": CHUNK,
                    "tokens_per_tail": BLOCK,
                    "loads": setting.loads,
                    "form": "native" if setting.ranks == 1 else "canonical",
                    "model": {"weights": "sha256:" + "5" * 64},
                },
            ),
        ).create_engine_config()
        self._base.scheduler_config.async_scheduling = setting.is_async
        self._base.cache_config.block_size = BLOCK
        self._base.cache_config.num_gpu_blocks = setting.blocks
        self._base.cache_config.kv_cache_layout = "LBNHC"
        if setting.has_states:
            self._base.cache_config.mamba_cache_mode = "align"
            self._base.cache_config.mamba_block_size = BLOCK
        parallel = self._base.parallel_config
        parallel.tensor_parallel_size, parallel.pipeline_parallel_size = (
            setting.tensor,
            setting.pipeline,
        )
        parallel.world_size = setting.ranks

    def engine(self, rank: int = 0) -> Any:
        """The engine's, as rank ``rank`` has it."""
        config = copy.copy(self._base)
        config.parallel_config = copy.copy(self._base.parallel_config)
        config.parallel_config.rank = rank
        return config

    def kv_cache(self, rank: int = 0) -> Any:
        """The KV groups of rank ``rank``; those of rank 0 are the scheduler's, as in vLLM."""
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            MambaSpec,
            SlidingWindowSpec,
        )

        names = [name_of(layer) for layer in layers_of(self.setting, rank)]
        fields: dict[str, Any] = {
            "block_size": BLOCK,
            "num_kv_heads": len(heads_of(self.setting, rank)),
            "head_size": HEAD_SIZE,
            "dtype": torch.float32,
        }
        groups = [KVCacheGroupSpec(names, FullAttentionSpec(**fields))]
        if self.setting.window is not None:
            seen = SlidingWindowSpec(sliding_window=self.setting.window, **fields)
            groups = [
                KVCacheGroupSpec(names[:-1], FullAttentionSpec(**fields)),
                KVCacheGroupSpec(names[-1:], seen),
            ]
        if self.setting.has_states:
            state = MambaSpec(
                block_size=BLOCK,
                shapes=((STATE_NBYTES // 4,),),
                dtypes=(torch.float32,),
                mamba_cache_mode="align",
            )
            groups += [
                KVCacheGroupSpec([name_of(layer) for layer in layers], state)
                for layers in STATE_LAYERS
            ]
        kind: Any = KVCacheConfig
        if self.setting.zeroes:  # as for a model with several kinds of state: it does for no other
            kind = type("Zeroed", (KVCacheConfig,), {"needs_kv_cache_zeroing": True})
        return kind(num_blocks=self.setting.blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def model_of(folder: Path) -> Path:
    """A model's folder for :class:`Configs`; its weights are never read."""
    from kvlayer_vllm.bench.models import random_model

    return random_model(folder, **_MODEL)


def layers_of(setting: Setting, rank: int) -> range:
    """The model's layers that a rank computes. Ranks count through a stage, then the next."""
    count = LAYERS // setting.pipeline
    stage = rank // setting.tensor
    return range(stage * count, (stage + 1) * count)


def heads_of(setting: Setting, rank: int) -> range:
    """The model's KV heads that a rank holds, as vLLM deals them out."""
    count = max(1, HEADS // setting.tensor)
    first = rank % setting.tensor * HEADS // setting.tensor  # of more ranks than heads, neighbours
    return range(first, first + count)


def name_of(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"
