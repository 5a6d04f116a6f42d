"""The forward passes over a batch of prompts, all but the last, which is ``model.generate``'s."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from kvlayer_transformers.engine import Model, Past
from kvlayer_transformers.prompts import Prompts, passes

__all__ = ["OnPass", "generate", "last_start", "prefill"]

OnPass: TypeAlias = Callable[[int, int], None]
"""Called with ``(columns done, columns of the prompt)`` after each forward pass over a prompt."""


def last_start(columns: int, width: int) -> int:
    """The column where the last pass over a prompt begins: ``model.generate`` computes from it."""
    return (columns - 1) // width * width


def prefill(
    model: Model,
    prompts: Prompts,
    past: Past,
    start: int,
    *,
    width: int,
    on_pass: OnPass | None = None,
) -> int:
    """Compute columns ``[start, last pass)`` into ``past``. Returns the tokens computed.

    Where a pass ends depends on ``width`` alone. What ``on_pass`` raises leaves whole passes in
    ``past``.
    """
    _forget_last_call(model)
    accepted = inspect.signature(model.forward).parameters
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    device, computed = model.device, 0
    with torch.no_grad():
        for begin, end in passes(start, last_start(prompts.columns, width), width):
            model(
                prompts.ids[:, begin:end].to(device),
                past_key_values=past,
                use_cache=True,
                **prompts.padding(begin, end, device),
                **last_only,
            )
            computed += (end - begin) * prompts.rows
            if on_pass is not None:
                on_pass(end, prompts.columns)
    return computed


def _forget_last_call(model: Model) -> None:
    """Models that see images keep how far those moved the positions of the last call's text.

    transformers applies it to whatever continues a past, and takes for that any past given.
    """
    for module in model.modules():
        if "rope_deltas" in module.__dict__:
            module.rope_deltas = None


def generate(model: Model, prompts: Prompts, past: Past | None, **arguments: Any) -> Any:
    """``model.generate`` for the prompts; the columns that ``past`` holds are not computed again.

    Without ``past`` the model makes a cache of its own: this is what it answers by itself.
    """
    if past is not None:
        if past.get_seq_length() >= prompts.columns:
            # transformers would silently feed the whole prompt once more
            raise AssertionError(f"the past covers all {prompts.columns} columns of the prompt")
        arguments["past_key_values"] = past
    device = model.device
    return model.generate(
        # A copy: what logits processors are given, they may write to.
        input_ids=prompts.ids.to(device, copy=True),
        attention_mask=prompts.mask().to(device),
        **arguments,
    )
