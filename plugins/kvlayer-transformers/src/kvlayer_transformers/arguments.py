"""Which arguments of ``model.generate`` go together with stored KV, and where answers end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvlayer.errors import UnsupportedError
from kvlayer_transformers.engine import Model

__all__ = ["answer_ends", "check_arguments", "eos_ids"]

# What would make KV that token ids do not name, or a past whose rows are not the prompts'.
_REFUSED: Mapping[str, str] = {
    "past_key_values": "the session provides it; load() and save() leave it to you",
    "use_cache": "without it there is no KV to reuse",
    "cache_implementation": "only a DynamicCache of plain layers can be carried",
    "prefill_chunk_size": "the session cuts the prompt itself: see pass_tokens",
    "assistant_model": "assisted generation rolls the past back and forth",
    "prompt_lookup_num_tokens": "assisted generation rolls the past back and forth",
    "num_beams": "beams reorder the rows of the past",
    "num_return_sequences": "a row of the past must belong to one prompt",
    "return_dict_in_generate": "generate() answers with sequences; use load() and save() for more",
}
_HARMLESS: Mapping[str, object] = {
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}


def check_arguments(model: Model, arguments: Mapping[str, Any]) -> None:
    """Raise ``UnsupportedError`` for what makes KV other than the tokens say.

    Looks at the arguments and at what the generation config adds to them.
    """
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            raise UnsupportedError(
                f"generate({name}=<tensor>) shapes KV that token ids do not name",
                hint="prompts are token ids; call model.generate() for other inputs",
            )
    config = arguments.get("generation_config") or model.generation_config
    for name, reason in _REFUSED.items():
        value = arguments.get(name, getattr(config, name, None))
        if value is not None and value != _HARMLESS.get(name):
            raise UnsupportedError(
                f"generate with {name}={value!r} does not go together with stored KV",
                hint=f"{reason}; where it comes from the model's generation config, pass "
                f"{name}={_HARMLESS.get(name)}",
            )


def eos_ids(model: Model, arguments: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end an answer, as ``model.generate`` with these arguments sees them."""
    config = arguments.get("generation_config") or model.generation_config
    found: int | list[int] | None = arguments.get("eos_token_id", config.eos_token_id)
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def answer_ends(sequences: torch.Tensor, start: int, eos: frozenset[int]) -> list[int]:
    """Per row, the column after its first end token from ``start`` on; padding follows it."""
    ends: list[int] = []
    generated: Any = sequences[:, start:]  # torch leaves the type of tolist() open
    rows: list[list[int]] = generated.tolist()
    for row in rows:
        found = next((at for at, token in enumerate(row) if token in eos), len(row) - 1)
        ends.append(start + found + 1)
    return ends
