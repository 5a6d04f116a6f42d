"""A batch of prompts as transformers takes them: left-padded rows and where each one begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from kvlayer.errors import TokensError

__all__ = ["PromptIds", "Prompts", "passes", "reusable_columns"]

PromptIds: TypeAlias = Any
"""One prompt (a list of ints, a 1-D tensor) or a batch: an integer tensor ``(rows, columns)``."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Rows of equal length, padded on the left.

    ``ids`` is int64 ``(rows, columns)`` on the CPU. ``pads[r]`` columns of row r are padding, so
    its token t stands in column ``pads[r] + t``. Every row has at least one token.
    """

    ids: torch.Tensor
    pads: tuple[int, ...]

    @classmethod
    def of(
        cls, ids: PromptIds, attention_mask: Any = None, *, padding: frozenset[int] = frozenset()
    ) -> Prompts:
        """Raises ``TokensError`` for anything that is not integers in left-padded rows.

        Without a mask, ids in ``padding`` are taken for padding. The ids are copied: what the
        caller's tensor becomes later changes nothing.
        """
        tensor = _tensor("input_ids", ids)
        integers = not (tensor.is_floating_point() or tensor.dtype is torch.bool)
        if not integers or tensor.ndim not in (1, 2) or 0 in tensor.shape:
            raise TokensError(
                f"input_ids must be integers of shape (columns,) or (rows, columns), found shape "
                f"{tuple(tensor.shape)} of {tensor.dtype}",
                hint=_HINT,
            )
        tensor = tensor.to(torch.long, copy=True).reshape(-1, tensor.shape[-1])
        if attention_mask is None:
            return cls(tensor, _guessed_pads(tensor, padding))
        return cls(tensor, _pads(_tensor("attention_mask", attention_mask), tuple(tensor.shape)))

    @property
    def rows(self) -> int:
        return int(self.ids.shape[0])

    @property
    def columns(self) -> int:
        return int(self.ids.shape[1])

    def mask(self) -> torch.Tensor:
        """int64 ``(rows, columns)``: 0 on padding, 1 on tokens."""
        return self._columns_from(0, self.columns).ge(0).long()

    def padding(self, start: int, stop: int, device: torch.device) -> dict[str, torch.Tensor]:
        """What a forward pass over columns ``[start, stop)`` must be told; nothing if unpadded.

        As ``generate`` has it: a row's token t has position t wherever it stands, padding 0.
        """
        if not any(self.pads):
            return {}
        return {
            "attention_mask": self._columns_from(0, stop).ge(0).long().to(device),
            "position_ids": self._columns_from(start, stop).clamp(min=0).to(device),
        }

    def _columns_from(self, start: int, stop: int) -> torch.Tensor:
        """Position of every column in its row, negative on padding; ``(rows, stop - start)``."""
        return torch.arange(start, stop)[None] - torch.tensor(self.pads)[:, None]


_HINT = "pass one prompt's ids, or what a tokenizer with padding_side='left' returns"


def _tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor on the CPU from a tensor, an array or lists of equal length."""
    if isinstance(value, str):
        raise TokensError(
            f"{name} are text, expected token ids", hint=f"tokenize it first; {_HINT}"
        )
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as exc:
        ragged = "expected sequence of length" in str(exc)
        raise TokensError(
            f"{name} are not a tensor of integers: {exc}",
            hint="rows must have one length: tokenize with padding=True and padding_side='left'"
            if ragged
            else _HINT,
        ) from None


def _guessed_pads(ids: torch.Tensor, padding: frozenset[int]) -> tuple[int, ...]:
    """Padding as ``model.generate`` guesses it from the ids alone."""
    mask = ~torch.isin(ids, torch.tensor(sorted(padding), dtype=ids.dtype))
    if bool(mask.all()):
        return (0,) * len(ids)
    try:
        return _pads(mask, tuple(ids.shape))
    except TokensError as exc:
        raise TokensError(
            f"without an attention_mask transformers takes id {min(padding)} for padding: {exc}",
            hint="pass attention_mask=, all 1 if it is a token of the prompt",
        ) from None


def _pads(mask: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    found = tuple(mask.shape)
    mask = mask.reshape(-1, mask.shape[-1]) if mask.ndim in (1, 2) and 0 not in found else mask
    if tuple(mask.shape) != shape:
        raise TokensError(
            f"attention_mask has shape {found}, input_ids {shape}",
            hint="pass the mask that the tokenizer returned with the ids",
        )
    real = mask != 0
    if not bool((real == mask).all()):
        raise TokensError(
            "attention_mask has other values than 0 and 1",
            hint="packed sequences and weights cannot be stored: pass 1 for tokens, 0 for padding",
        )
    counts: Any = (~real).sum(dim=1)  # torch leaves the type of tolist() open
    pads: list[int] = counts.tolist()
    for row, pad in enumerate(pads):
        if pad == shape[1]:
            raise TokensError(f"row {row} is nothing but padding", hint="leave the row out")
        if not bool(real[row, pad:].all()):
            raise TokensError(
                f"row {row} is not padded on the left: its mask has a 0 after a 1", hint=_HINT
            )
    return tuple(pads)


def passes(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Columns ``[start, stop)`` in forward passes that end at multiples of ``width``.

    Where a pass ends depends on nothing but ``width``, so a run that starts at such a boundary
    computes the same passes as one that started at 0.
    """
    while start < stop:
        end = min(stop, (start // width + 1) * width)
        yield start, end
        start = end


def reusable_columns(pads: Sequence[int], tokens: Sequence[int], columns: int, step: int) -> int:
    """How many leading columns of a batch need no computing.

    Row r has KV for its first ``tokens[r]`` tokens; padding needs none. Every row must be covered,
    the last of ``columns`` is always left to compute, and the answer is a multiple of ``step``.
    """
    reach = min(pad + count for pad, count in zip(pads, tokens, strict=True))
    return min(reach, columns - 1) // step * step
