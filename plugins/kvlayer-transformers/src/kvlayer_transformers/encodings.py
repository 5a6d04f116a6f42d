"""What callers pass as prompts: tensors, lists, or what a tokenizer returned, as one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from kvlayer.errors import TokensError
from kvlayer_transformers.prompts import PromptIds, Prompts

__all__ = ["read_prompts"]

_HINT = "pass the ids once: as input_ids, or the whole of what the tokenizer returned"


def read_prompts(
    input_ids: PromptIds,
    attention_mask: Any,
    arguments: Mapping[str, Any],
    padding: Callable[[Mapping[str, Any]], frozenset[int]] | None = None,
) -> tuple[Prompts, dict[str, Any]]:
    """The prompts, and the arguments that are none of theirs.

    ``input_ids`` may be what a tokenizer returned (a mapping with ``input_ids``), whose further
    fields count as arguments; ``inputs`` is another name for it, as in transformers. Where no
    mask is given, ``padding(arguments)`` says which ids are padding. Raises ``TokensError``.
    """
    rest = dict(arguments)
    inputs = rest.pop("inputs", None)
    if inputs is not None:
        if input_ids is not None:
            raise TokensError("both inputs and input_ids were passed", hint=_HINT)
        input_ids = inputs
    if isinstance(input_ids, Mapping):
        fields = dict(cast("Mapping[str, Any]", input_ids))
        if "input_ids" not in fields:
            raise TokensError(
                f"the encoding has no input_ids, only {sorted(map(str, fields))}", hint=_HINT
            )
        input_ids = fields.pop("input_ids")
        mask = fields.pop("attention_mask", None)
        twice = sorted(fields.keys() & rest.keys())
        if mask is not None and attention_mask is not None:
            twice = ["attention_mask", *twice]
        if twice:
            raise TokensError(f"{twice[0]} was passed beside an encoding that has one", hint=_HINT)
        attention_mask = mask if attention_mask is None else attention_mask
        rest.update(fields)
    elif hasattr(input_ids, "ids") and hasattr(input_ids, "attention_mask"):
        # One text's encoding from the tokenizers library.
        attention_mask = input_ids.attention_mask if attention_mask is None else attention_mask
        input_ids = input_ids.ids
    guessed = frozenset[int]() if padding is None else padding(rest)
    return Prompts.of(input_ids, attention_mask, padding=guessed), rest
