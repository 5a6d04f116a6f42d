"""vLLM's KV tensors as the adapter takes them: its groups, its layout of them, its views.

The engine's configuration is stood in for: a model of one layer's kind on a CUDA device, without
weights. A recurrent state, which the adapter refuses, is put in kvlayer's own words here.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shaped_specs import LAYERS, Kind, Tensors

from kvlayer.layout import STATE_BLOCKS, AttentionKind, GroupLayout, KVGroup, KVLayout
from kvlayer_vllm import layouts
from kvlayer_vllm.groups import EngineGroup, engine_groups
from kvlayer_vllm.layouts import RankLayout

__all__ = ["Held", "config_of", "groups_of", "held", "kv_cache_of", "names", "on_a_gpu"]


@dataclass(frozen=True, slots=True)
class Held:
    """The tensors of one kind in one layout, as a stager takes them."""

    rank: RankLayout
    views: list[torch.Tensor]
    tokens_per_block: int
    """Of a block of the scheduler's."""

    @property
    def layout(self) -> KVLayout:
        return self.rank.layout

    @property
    def group(self) -> KVGroup:
        return self.layout.groups[0].group


def names(count: int = LAYERS) -> list[str]:
    return [f"model.layers.{number}.self_attn.attn" for number in range(count)]


@contextmanager
def on_a_gpu() -> Generator[None]:
    """vLLM says that it computes on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "platform", lambda: "cuda")
        yield


def config_of(backends: Mapping[str, str], cache_dtype: str = "auto", **impls: Any) -> Any:
    """vLLM's configuration as far as groups and layouts read it; ``backends`` by layer's name."""
    layers = {
        name: SimpleNamespace(
            get_attn_backend=lambda called=called: SimpleNamespace(get_name=lambda: called),
            impl=impls.get("impl"),
        )
        for name, called in backends.items()
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(rope_parameters=rope), dtype=torch.bfloat16
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            rank=0,
            distributed_executor_backend="uni",
        ),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def kv_cache_of(*groups: tuple[list[str], Any]) -> Any:
    """vLLM's groups: the names of their layers, and a spec."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    found = [KVCacheGroupSpec(layers, spec) for layers, spec in groups]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=found)


def groups_of(kind: Kind, spec: Any = None) -> list[EngineGroup]:
    """The adapter's groups of a model whose layers are all of one kind."""
    config = config_of(dict.fromkeys(names(), kind.called()), kind.cache)
    return engine_groups(config, kv_cache_of((names(), spec or kind.spec())))


def held(kind: Kind, tensors: Tensors, form: str, *, tensor: Any = torch.Tensor) -> Held:
    """``tensor`` is the class of the tensors that are registered.

    Raises ``UnsupportedError`` where the adapter refuses them.
    """
    views = [view.as_subclass(tensor) for view in tensors.views]
    if type(tensors.spec).__name__ == "MambaSpec":
        return _state(tensors.spec, views)
    config = config_of(dict.fromkeys(names(), kind.called()), kind.cache)
    groups = engine_groups(config, kv_cache_of((names(), tensors.spec)))
    registered = dict(zip(names(), views, strict=True))
    with on_a_gpu():
        rank = layouts.rank_layout(config, groups, form, registered, rank=0)
        (caches,) = layouts.caches_of(groups, rank.layout, registered)
    return Held(rank, caches, groups[0].tokens_per_block)


def _state(spec: Any, views: list[torch.Tensor]) -> Held:
    nbytes, layers = spec.page_size_bytes, tuple(range(LAYERS))
    group = KVGroup(AttentionKind.STATE, layers, "int8", state_nbytes=nbytes)
    lying = GroupLayout(group, STATE_BLOCKS, spec.block_size, form="native:vllm-state")
    flat = [view.view(torch.int8).squeeze(1).squeeze(1) for view in views]
    return Held(RankLayout(KVLayout((lying,)), ()), flat, spec.block_size)
