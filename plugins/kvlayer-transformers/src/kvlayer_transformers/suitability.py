"""Whether a model's KV may be stored under its name: tried when a session opens, watched after."""

from __future__ import annotations

from typing import Any

import torch

from kvlayer.errors import TokensError, UnsupportedError
from kvlayer_transformers.adapters import Adapters
from kvlayer_transformers.engine import Model
from kvlayer_transformers.prompts import Prompts
from kvlayer_transformers.proof import Verdict, zeros_mean_nothing
from kvlayer_transformers.verdicts import verdict_of
from kvlayer_transformers.watch import Watch

__all__ = ["Suitability"]


class Suitability:
    """One model's. All of it raises ``UnsupportedError``, naming what stands in the way."""

    def __init__(self, model: Model, adapters: Adapters, *, prove: bool) -> None:
        """With ``prove``, tries the model unless one of its class and configuration was tried."""
        self._model = model
        self._adapters = adapters
        self._prove = prove
        self._verdicts: dict[bytes, Verdict] = {}
        self._zeros: dict[str, bool] = {}
        self._verdict = self._tried()
        """Of the model with the adapters that were active at the last check."""
        self._watch = Watch(model)
        self._vocabulary = _vocabulary(model)

    def check(self) -> None:
        """Before each use: the model is the one the session was opened for, and is ready."""
        self._watch.check()
        self._verdict = self._tried()

    def check_prompts(self, prompts: Prompts) -> None:
        """After :meth:`check`, whether these rows may be computed and stored.

        Raises ``TokensError`` for unknown ids.
        """
        padding = self._verdict.padding
        if any(prompts.pads) and padding is not None:
            raise UnsupportedError(
                f"{_name(self._model)} cannot share KV of rows padded on the left: {padding}",
                hint="pass prompts of one length together, or one prompt at a time",
            )
        low, high = int(prompts.ids.min()), int(prompts.ids.max())
        if low < 0 or (self._vocabulary is not None and high >= self._vocabulary):
            raise TokensError(
                f"token id {low if low < 0 else high} is not in the model's vocabulary of "
                f"{self._vocabulary} ids",
                hint="tokenize with the tokenizer of this model",
            )

    def check_zeros(self, name: str) -> None:
        """Whether token types of this name that are all 0 are the same as none: tried once."""
        if name not in self._zeros:
            self._zeros[name] = zeros_mean_nothing(self._model, name)
        if not self._zeros[name]:
            raise UnsupportedError(
                f"{_name(self._model)} computes another answer with {name}=<zeros> than without",
                hint=f"leave {name} out, or call model.generate() without the session",
            )

    def _tried(self) -> Verdict:
        if not self._prove:
            return Verdict()
        state = self._adapters.active()
        if state not in self._verdicts:
            verdict = verdict_of(self._model)
            if verdict.pieces is not None:
                raise UnsupportedError(
                    f"{_name(self._model)} cannot reuse KV: {verdict.pieces}",
                    hint="kvlayer carries decoders whose attention is causal: a prefix alone must "
                    "determine its KV. prove=False switches this trial off",
                )
            self._verdicts[state] = verdict
        return self._verdicts[state]


def _name(model: Model) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"


def _vocabulary(model: Model) -> int | None:
    """How many ids the model has an embedding for; None where it does not say."""
    try:
        table: Any = model.get_input_embeddings()
    except NotImplementedError:
        return None
    weight = getattr(table, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
