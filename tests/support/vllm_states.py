"""Engines of models with recurrent states, in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kvlayer import Scope
from kvlayer.layout import AttentionKind, KVGroup
from kvlayer_vllm.bench.serving import Serving

__all__ = ["ends", "misses", "noise", "states_are_optional", "without_checkpoints"]


def without_checkpoints() -> None:
    """A step ends where a state is wanted, as it does for every other kind of recurrence.

    Of Mamba 2 vLLM believes that a kernel can hand out a state from inside a step. That of its CPU
    build cannot, and the engine dies of it.
    """
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    theirs = MambaMixer2.get_kv_cache_spec

    def spec(self: Any, vllm_config: Any) -> Any:
        found = theirs(self, vllm_config)
        none = {"num_prefill_checkpoint_blocks": 0, "prefill_checkpoint_alignment": None}
        return found and replace(found, **none)

    MambaMixer2.get_kv_cache_spec = spec


def noise(serving: Serving, prompt: Sequence[int], in_states: bool) -> Any:
    """Put noise in place of a prompt's states in host memory, or of all else; how many objects."""
    portal = serving.connector.scheduler.portal
    stack, altered = portal.cache.stack, 0
    drawn = torch.Generator().manual_seed(1)
    chain = portal.cache.chain(prompt[:-1], Scope())
    for record in stack.planner.match(chain).path():
        held = stack.planner.layout.groups[record.part.group].group
        if (held.kind is AttentionKind.STATE) is not in_states:
            continue
        slot = stack.objects.slab.view(record.offset, record.nbytes)
        # Of a state's tensors some may be float32: two such numbers side by side are one, too.
        dtype = torch.bfloat16 if in_states else getattr(torch, held.dtype)
        values = torch.frombuffer(slot, dtype=dtype)
        values.copy_(torch.randn(values.shape, generator=drawn))
        altered += 1
    return altered


def ends(serving: Serving, prompt: Sequence[int]) -> Any:
    """The hashes at the ends of a prompt's chunks, which are in the names of files."""
    chain = serving.connector.scheduler.portal.cache.chain(prompt, Scope())
    return [end.hex() for end in chain.hashes]


def misses(serving: Serving) -> Any:
    """What lower tiers have missed so far, by cause."""
    cache = serving.connector.scheduler.portal.cache
    return {
        str(cause): count
        for tier in cache.control.stats().tiers[1:]
        for cause, count in tier.misses.items()
    }


def states_are_optional(_: Serving) -> Any:
    """From now on a hit needs no state: what is found is answered from."""
    needed = KVGroup.first_needed

    def without(group: KVGroup, stop: int) -> int:
        return stop if group.kind is AttentionKind.STATE else needed(group, stop)

    KVGroup.first_needed = without  # type: ignore[method-assign]
