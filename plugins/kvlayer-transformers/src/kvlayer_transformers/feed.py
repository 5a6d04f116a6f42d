"""What ids a model was really fed: callbacks of ``generate`` are handed the ids themselves."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch

from kvlayer_transformers.contents import called
from kvlayer_transformers.engine import Model, Past
from kvlayer_transformers.prompts import Prompts

__all__ = ["Feed"]


class Feed:
    """Names the columns of a past by the ids of the passes that computed them.

    A logits processor, a streamer or whatever else is handed ids may write to them, before or
    after they are computed; the ids that ``generate`` returns then name other KV. Inside ``with``
    each forward pass that continues the past is noted. Callbacks may call the model as they like.
    """

    def __init__(self, model: Model, prompts: Prompts, past: Past) -> None:
        """Until the ``with`` block, the columns of ``past`` are those of ``prompts``."""
        self._model = called(model)
        self._prompts = prompts
        self._past = past
        self._before = prompts.columns
        self._passes: list[torch.Tensor] = []
        self._known = True

    def __enter__(self) -> Self:
        self._before = self._past.get_seq_length()

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs.get("past_key_values") is not self._past:
                return
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, torch.Tensor) and ids.ndim == 2:
                self._passes.append(ids.detach().clone())
            else:
                self._known = False

        self._handle = self._model.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self._handle.remove()

    @property
    def ids(self) -> torch.Tensor | None:
        """int64 ``(rows, columns)`` on the CPU, ids of begun passes included; None if unknown."""
        rows = {len(ids) for ids in self._passes}
        if not self._known or rows - {self._prompts.rows}:
            return None
        before = self._prompts.ids[:, : self._before]
        if not self._passes:
            return before.to(torch.long)
        fed = torch.cat(self._passes, dim=1).cpu()  # once, whatever device they are on
        return torch.cat((before, fed), dim=1).to(torch.long)
