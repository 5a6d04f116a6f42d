"""Shows by computing that a model may be computed in pieces, which reuse of KV rests on.

A prefix determines its KV only where attention is causal, where positions are counted from the
tokens and not from the columns, and where nothing depends on the length of the whole. Families
break each of these without an error. So a family is tried before its KV is stored: the whole
prompt at once, as the model answers by itself, against passes that continue another prompt's KV.
"""

# transformers' caches are not typed.
# pyright: reportUnknownVariableType=false

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from kvlayer_transformers.contents import called
from kvlayer_transformers.engine import DynamicCache, GenerationConfig, Model, Past, quiet
from kvlayer_transformers.prefill import generate, last_start, prefill
from kvlayer_transformers.prompts import Prompts
from kvlayer_transformers.twin import PROMPT_IDS, twin_of

__all__ = ["RECIPE", "TooSlow", "Verdict", "of_family", "of_model", "zeros_mean_nothing"]

RECIPE: Final = 1
"""Raise it whenever a trial would judge otherwise."""

_WIDTH: Final = 16
_SHARED: Final = 3 * _WIDTH
_ANSWER: Final = 4
# Relative to the size of what is compared. Rounding gives 1e-6 in float32, another attention 1.
_TOLERANCE: Final = 1e-3
_LOOSE: Final = 0.15
"""For a user's own model, whose rounding nobody knows: bfloat16 gives some hundredths."""


_SECONDS: Final = 60.0
"""What a user's own model may take for its trial: most take less than one."""


class TooSlow(Exception):  # noqa: N818  # no error of the model's: it was not tried
    """A trial of the model itself was given up after its time."""


class _Timed(DynamicCache):  # type: ignore[misc]  # Any: see engine
    """A past that ends its pass, at the next layer, when the time is over."""

    def __init__(self, until: float) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._until = until

    def update(self, *args: Any, **arguments: Any) -> Any:
        self.check()
        moved: Any = super().update(*args, **arguments)  # pyright: ignore[reportUnknownMemberType]
        return moved

    def check(self) -> None:
        if time.monotonic() >= self._until:
            raise TooSlow(f"not done within {_SECONDS:g} s")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong, in words that end a sentence; None where nothing is.

    ``pieces``: prompts computed in pieces. ``padding``: rows padded on the left.
    """

    pieces: str | None = None
    padding: str | None = None


def of_family(model: Model) -> Verdict:
    """Try a small float32 twin of the model's class.

    Some 30 passes of a model with few layers; prompts are longer than its window. Raises
    ``ValueError`` when there is no twin, or none that answers by itself.
    """
    twin = twin_of(model)
    with torch.inference_mode(False), torch.no_grad(), quiet():
        return _judge(twin)


def of_model(model: Model, *, padding: bool) -> Verdict:
    """Try the model itself, with two passes of at most 64 tokens and a tolerance.

    With ``padding``, the pieces are padded on the left, which tries both at once. Raises what the
    model raises when it answers by itself, and :class:`TooSlow` after a minute: looked at before
    each layer.
    """
    pad = _WIDTH if padding else 0
    ids = _ids(model, 4 * _WIDTH - pad, seed=1)
    padded = Prompts(torch.nn.functional.pad(ids, (pad, 0)), (pad,))
    with torch.no_grad(), quiet():
        until = time.monotonic() + _SECONDS
        whole, past = _Timed(until), _Timed(until)
        expected = _answer(model, Prompts(ids, (0,)), whole, tokens=1)
        try:
            prefill(model, padded, past, 0, width=2 * _WIDTH)
            found = _answer(model, padded, past, tokens=1)
        except TooSlow:
            raise
        except Exception as exc:  # noqa: BLE001  # somebody else's model: anything may come
            return Verdict(pieces=_raised(exc))
        kv = _typical(_columns(past, 0, pad), _columns(whole, 0, 0))
        apart = max(kv, _worst(found, expected))
    if apart <= _LOOSE:
        return Verdict()
    where = "in two padded passes" if padding else "in two passes"
    return Verdict(pieces=f"what is computed {where} differs by {apart:.0%} from one pass")


def zeros_mean_nothing(model: Model, name: str) -> bool:
    """Whether ``name=zeros`` leaves what a model computes as it is, or is nothing it knows.

    Two passes of 16 tokens. Raises what the model raises.
    """
    accepted = inspect.signature(called(model).forward).parameters
    if name not in accepted:
        return True
    ids = _ids(model, _WIDTH, seed=3).to(model.device)
    with torch.no_grad(), quiet():
        without = model(input_ids=ids, use_cache=False).logits[0]
        given = model(input_ids=ids, use_cache=False, **{name: torch.zeros_like(ids)}).logits[0]
    return _worst([given.float()], [without.float()]) <= _TOLERANCE


def _judge(twin: Model) -> Verdict:
    """Every trial of a family, on a twin."""
    shared, first, second = (_ids(twin, n, seed) for seed, n in enumerate((_SHARED, 40, 27)))
    one = Prompts(torch.cat([shared, first], dim=1), (0,))
    two = Prompts(torch.cat([shared, second], dim=1), (0,))
    try:
        one_alone, two_alone = _answer(twin, one, None), _answer(twin, two, None)
    except Exception as exc:
        raise ValueError(f"a twin does not answer: {type(exc).__name__}: {exc}") from exc
    past = DynamicCache()
    try:
        prefill(twin, one, past, 0, width=_WIDTH)
        if past.get_seq_length() != last_start(one.columns, _WIDTH):
            return Verdict(pieces="a past has not one column per token")
        if _worst(_answer(twin, one, past), one_alone) > _TOLERANCE:
            return Verdict(pieces="a prompt computed in passes is answered otherwise than at once")
        reused = _first_columns(past, _SHARED)
        prefill(twin, two, reused, _SHARED, width=_WIDTH)
        if _worst(_answer(twin, two, reused), two_alone) > _TOLERANCE:
            return Verdict(pieces="the KV of a prefix depends on what follows it")
    except Exception as exc:  # noqa: BLE001  # somebody else's model: anything may come
        return Verdict(pieces=_raised(exc))
    try:
        return Verdict(padding=_judge_padding(twin, two, reused))
    except Exception as exc:  # noqa: BLE001  # somebody else's model: anything may come
        return Verdict(padding=_raised(exc))


def _judge_padding(twin: Model, long: Prompts, past_of_long: Past) -> str | None:
    """What is wrong with a batch of ``long`` and a shorter row padded to its length."""
    short = Prompts(_ids(twin, 37, seed=7), (0,))
    pad = long.columns - short.columns
    padded = torch.nn.functional.pad(short.ids, (pad, 0))
    batch = Prompts(torch.cat([long.ids, padded]), (0, pad))
    past, alone = DynamicCache(), DynamicCache()
    prefill(twin, batch, past, 0, width=_WIDTH)
    if _worst(_answer(twin, batch, past), _answer(twin, batch, None)) > _TOLERANCE:
        return "a padded batch computed in passes is answered otherwise than at once"
    _answer(twin, short, alone)
    if (
        _worst(_columns(past, 1, pad), _columns(alone, 0, 0)) > _TOLERANCE
        or _worst(_columns(past, 0, 0), _columns(past_of_long, 0, 0)) > _TOLERANCE
    ):
        return "the KV of a padded row is not that of the same prompt alone"
    return None


def _raised(exc: Exception) -> str:
    return f"a pass that continues a past raises {type(exc).__name__}: {exc}"


def _answer(
    model: Model, prompts: Prompts, past: Past | None, tokens: int = _ANSWER
) -> list[torch.Tensor]:
    """The logits of a greedy answer: per token ``(rows, vocabulary)``."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
    )
    said = generate(
        model,
        prompts,
        past,
        generation_config=config,
        return_dict_in_generate=True,
        output_logits=True,
        **({} if past is None else {"use_cache": True}),
    )
    return [step.float() for step in said.logits]


def _ids(model: Model, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = PROMPT_IDS
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", high)
    return torch.randint(low, min(high, vocabulary), (1, count), generator=generator)


def _first_columns(past: Past, columns: int) -> Past:
    """A new past with the first columns of another."""
    first: Past = DynamicCache()
    for index, layer in enumerate(past.layers):
        first.update(
            layer.keys[:, :, :columns].clone(), layer.values[:, :, :columns].clone(), index
        )
    return first


def _columns(past: Past, row: int, start: int) -> list[torch.Tensor]:
    """K and V of one row, each ``(columns, heads * size)`` from column ``start`` on."""
    planes = [plane for layer in past.layers for plane in (layer.keys, layer.values)]
    return [plane[row, :, start:].transpose(0, 1).flatten(1).float() for plane in planes]


def _worst(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest relative difference of any token's vectors; infinite where it is no number."""
    return max(float(_relative(a, b).max()) for a, b in zip(found, expected, strict=True))


def _typical(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The same of the median token: one that a near-tie sent to another expert proves nothing."""
    return max(float(_relative(a, b).median()) for a, b in zip(found, expected, strict=True))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Per token, of as many tokens as both have: some families leave their past aside later."""
    both = min(len(found), len(expected))
    found, expected = found[:both], expected[:both]
    size = expected.square().sum(dim=-1).clamp(min=1e-12)
    apart = ((found - expected).square().sum(dim=-1) / size).sqrt()
    return torch.nan_to_num(apart, nan=float("inf"))
