"""Which arguments of ``model.generate`` go together with stored KV, and where answers end.

A list of what is harmless, not of what harms: what a new release of transformers adds is refused
by name until it has been looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

import torch

from kvlayer.errors import UnsupportedError
from kvlayer_transformers.engine import GenerationConfig, Model

__all__ = ["answer_ends", "checked_arguments", "eos_ids", "guessed_padding", "zero_types"]

# Fields of a generation config that choose the next token or say when to stop. They read the KV.
_FREE: Final = frozenset(
    {
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"),
        *("stop_strings", "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h"),
        *("typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
        *("no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "sequence_bias"),
        *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        *("watermarking_config", "pad_token_id", "bos_token_id", "eos_token_id"),
        # Read the prompt's ids, which are passed whole.
        *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
        # Only for beams, encoders, static caches, or assistants, each of which is refused.
        *("early_stopping", "length_penalty", "decoder_start_token_id", "max_cache_len"),
        *("cache_config", "compile_config", "disable_compile", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("max_matching_ngram_size", "diversity_penalty", "low_memory"),
        # Without return_dict_in_generate nothing comes of them.
        *("output_scores", "output_logits"),
        *("transformers_version",),
    }
)

_ROLLS_BACK: Final = "assisted generation rolls the past back and forth"
_SEQUENCES_ONLY: Final = "generate() answers with sequences; use load() and save() for more"
# Fields with the values that are harmless, None and the default of transformers apart.
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "use_cache": (True,),
    "num_beams": (1,),
    "num_beam_groups": (1, 0),
    "num_return_sequences": (1,),
    "return_dict_in_generate": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "is_assistant": (False,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "guidance_scale": (1, 1.0),
    "penalty_alpha": (0, 0.0),
    # transformers sets "hybrid" aside, which older files publish; "dynamic" is what a session has.
    "cache_implementation": ("dynamic", "hybrid"),
}
_REASONS: Final[Mapping[str, str]] = {
    "use_cache": "without it there is no KV to reuse",
    "cache_implementation": "only a DynamicCache of plain layers can be carried",
    "prefill_chunk_size": "the session cuts the prompt itself: see pass_tokens",
    "assistant_model": _ROLLS_BACK,
    "assistant_early_exit": _ROLLS_BACK,
    "assistant_tokenizer": _ROLLS_BACK,
    "prompt_lookup_num_tokens": _ROLLS_BACK,
    "use_mtp": _ROLLS_BACK,
    "speculation_type": _ROLLS_BACK,
    "is_assistant": _ROLLS_BACK,
    "num_beams": "beams reorder the rows of the past",
    "num_beam_groups": "beams reorder the rows of the past",
    "constraints": "beams reorder the rows of the past",
    "force_words_ids": "beams reorder the rows of the past",
    "num_return_sequences": "a row of the past must belong to one prompt",
    "token_healing": "it changes the end of the prompt after it was named",
    "guidance_scale": "it computes a second, negative prompt with a past of its own",
    "return_dict_in_generate": _SEQUENCES_ONLY,
    "output_attentions": _SEQUENCES_ONLY,
    "output_hidden_states": _SEQUENCES_ONLY,
    "past_key_values": "the session provides it; load() and save() leave it to you",
    "cache_position": "the session counts positions itself",
    "position_ids": "the session counts positions itself: a row's first token has position 0",
    "token_type_ids": "only types that are all 0 leave KV to the tokens",
    "inputs_embeds": "prompts are token ids",
    "adapter_names": "activate one adapter with set_adapter() and name it in the scope",
    "custom_generate": "the session knows what transformers' own decoding does with a past",
}
# Arguments of generate() beside the fields above. They see logits and ids, and never the past.
_CALLS: Final = frozenset(
    {
        *("generation_config", "logits_processor", "stopping_criteria", "streamer", "tokenizer"),
        *("prefix_allowed_tokens_fn",),
    }
)
_UNUSED: Final = frozenset({"synced_gpus", "trust_remote_code"})
"""Harmless while they are False or None."""


def checked_arguments(model: Model, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for ``model.generate``; raises ``UnsupportedError`` for the first that harms.

    Looks at the arguments, at ``generation_config`` and at the model's own generation config,
    which fills what both leave open. What is None or all zeros and means nothing is left out;
    that zeros mean nothing is for the caller to know: see :func:`zero_types`.
    """
    given: dict[str, Any] = GenerationConfig().__dict__
    kept: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "use_cache" and value is None:
            _refuse(
                name, value
            )  # transformers takes it for False, and feeds a past all of it again
        if name in _CALLS or name in given:
            kept[name] = value
        elif not (value is None or (name in _UNUSED and value is False) or _is_blank(name, value)):
            _refuse(name, value)
    stated = kept.get("generation_config")
    if stated is not None and not isinstance(stated, GenerationConfig):
        raise UnsupportedError(
            f"generation_config must be a GenerationConfig, found {type(stated).__name__}",
            hint="pass transformers.GenerationConfig(...), or its fields as arguments",
        )
    for name in given:
        if not name.startswith("_") and name not in _FREE:
            value = _merged(name, kept, stated, model.generation_config)
            if value is not None and value not in _NEUTRAL.get(name, ()):
                _refuse(name, value)
    if _merged("cache_implementation", kept, stated, model.generation_config) is not None:
        # With a past that is given, transformers takes even "dynamic" for a contradiction.
        if stated is not None:
            stated = copy.deepcopy(stated)
            stated.cache_implementation = None
            kept["generation_config"] = stated
        kept["cache_implementation"] = None
    return kept


def zero_types(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of token types that are all 0. Some families (GPT-2) add an embedding for them."""
    return tuple(name for name, value in arguments.items() if _is_blank(name, value))


def eos_ids(model: Model, arguments: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end an answer, as ``model.generate`` with these arguments sees them."""
    return _ids("eos_token_id", model, arguments)


def guessed_padding(model: Model, arguments: Mapping[str, Any]) -> frozenset[int]:
    """The ids that ``model.generate`` takes for padding where it is given no mask; mostly none."""
    padding = _ids("pad_token_id", model, arguments)
    return frozenset() if padding & eos_ids(model, arguments) else padding


def answer_ends(sequences: torch.Tensor, start: int, eos: frozenset[int]) -> list[int]:
    """Per row, the column after its first end token from ``start`` on; padding follows it."""
    ends: list[int] = []
    generated: Any = sequences[:, start:]  # torch leaves the type of tolist() open
    rows: list[list[int]] = generated.tolist()
    for row in rows:
        found = next((at for at, token in enumerate(row) if token in eos), len(row) - 1)
        ends.append(start + found + 1)
    return ends


def _ids(name: str, model: Model, arguments: Mapping[str, Any]) -> frozenset[int]:
    stated = arguments.get("generation_config")
    found = _merged(name, arguments, stated, model.generation_config)
    if found is None:
        return frozenset()
    ids: Any = torch.as_tensor(found).view(-1)  # torch leaves the type of tolist() open
    return frozenset(ids.tolist())


def _merged(name: str, arguments: Mapping[str, Any], stated: Any, published: Any) -> Any:
    """A field as transformers merges it: an argument wins even as None."""
    if name in arguments:
        return arguments[name]
    value = getattr(stated, name, None)
    return getattr(published, name, None) if value is None else value


def _is_blank(name: str, value: object) -> bool:
    """Token types that are all 0, which tokenizers return and models take for absent."""
    return (
        name.endswith("token_type_ids")
        and isinstance(value, torch.Tensor)
        and not bool(value.any())
    )


def _refuse(name: str, value: object) -> None:
    shown = "<tensor>" if isinstance(value, torch.Tensor) else repr(value)
    shown = shown if len(shown) <= 60 else f"<{type(value).__name__}>"
    known = hasattr(GenerationConfig(), name)
    reason = _REASONS.get(name, "it is not known to leave KV as the token ids say")
    neutral = next((each for each in _NEUTRAL.get(name, ()) if each != "dynamic"), None)
    without = f"pass {name}={neutral}" if known else f"leave {name} out"
    raise UnsupportedError(
        f"generate with {name}={shown} does not go together with stored KV",
        hint=f"{reason}; {without}, or call model.generate() without the session",
    )
