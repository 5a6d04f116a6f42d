"""The engine's ranks together: each one's share of the layers and heads of the whole model.

Ranks count through the tensor ranks of a pipeline's first stage, then of the next. A worker knows
the layers of its own stage; which those are among the model's, and with it the name of the KV, is
known once all have introduced themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvlayer.errors import LayoutError, UnsupportedError
from kvlayer.layout import AttentionKind, GroupLayout, KVLayout
from kvlayer_vllm.engine import VllmConfig
from kvlayer_vllm.groups import rope_of
from kvlayer_vllm.layouts import RankLayout

__all__ = ["check_agrees", "count_of", "is_beside_scheduler", "united", "whole"]


def count_of(vllm_config: VllmConfig) -> int:
    """How many ranks the engine has."""
    parallel = vllm_config.parallel_config
    return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size)


def is_beside_scheduler(vllm_config: VllmConfig) -> bool:
    """Whether the one worker is in the scheduler's process, and has its tensors before that."""
    return bool(vllm_config.parallel_config.distributed_executor_backend == "uni")


def united(ranks: Sequence[RankLayout], text_config: Any) -> list[RankLayout]:
    """The ranks' own layouts, in their order, as shares of the whole model's KV groups.

    Raises ``UnsupportedError`` where the stages of a pipeline do not have the same groups, or do
    not divide a group's layers into stretches.
    """
    if len({len(rank.layout.groups) for rank in ranks}) > 1:
        raise UnsupportedError(
            "kvlayer cannot carry KV of a pipeline whose stages do not have the same KV groups",
            hint="the engine serves without kvlayer",
        )
    columns = [
        _shares(index, held, text_config)
        for index, held in enumerate(zip(*(rank.layout.groups for rank in ranks), strict=True))
    ]
    return [
        replace(rank, layout=KVLayout(shares))
        for rank, shares in zip(ranks, zip(*columns, strict=True), strict=True)
    ]


def whole(ranks: Sequence[RankLayout]) -> KVLayout:
    """What ranks that were :func:`united` hold together: every layer and every head."""
    first = ranks[0].layout
    if len(ranks) == 1:
        return first
    return KVLayout(tuple(replace(held, layers=None, heads=None) for held in first.groups))


def check_agrees(own: RankLayout, share: RankLayout) -> None:
    """Raise ``LayoutError`` unless ``share`` is of the layers and heads that this rank has itself.

    Workers that are numbered otherwise than the scheduler believes would fill each other's blocks.
    """
    for mine, given in zip(own.layout.groups, share.layout.groups, strict=True):
        here = mine.group.layers, mine.head_range, mine.form
        there = given.group.layers[slice(*given.layer_range)], given.head_range, given.form
        if here != there:
            raise LayoutError(f"this rank holds {here}, the scheduler expects {there}")


def _shares(index: int, held: Sequence[GroupLayout], text_config: Any) -> tuple[GroupLayout, ...]:
    """One KV group's layout on each rank, of the group with the layers of all of them."""
    layers = tuple(sorted({layer for each in held for layer in each.group.layers}))
    group = replace(held[0].group, layers=layers, rope=rope_of(text_config, layers))
    found: list[GroupLayout] = []
    for number, each in enumerate(held):
        own = each.group
        if replace(own, layers=layers, rope=group.rope) != group:
            raise UnsupportedError(
                f"kvlayer cannot carry KV group {index}: rank {number} keeps {own}, rank 0 "
                f"{held[0].group}",
                hint="the engine serves without kvlayer",
            )
        first = layers.index(own.layers[0])
        stop = first + len(own.layers)
        if layers[first:stop] != own.layers:
            raise UnsupportedError(
                f"kvlayer cannot carry KV group {index}: rank {number} has layers {own.layers} of "
                f"{layers}, which is no stretch of them",
                hint="the engine serves without kvlayer",
            )
        heads = each.heads if own.kind is AttentionKind.MHA else None
        found.append(replace(each, group=group, layers=(first, stop), heads=heads))
    return tuple(found)
