"""What a session answers: KV that was found, or text that was generated with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvlayer import StoreReport
from kvlayer.results import Failure
from kvlayer_transformers.engine import Past

__all__ = ["Generation", "Loaded"]


class Loaded(NamedTuple):
    """``past`` holds the first ``columns`` columns of the prompts, padding included."""

    past: Past
    columns: int


@dataclass(frozen=True, slots=True)
class Generation:
    """What :meth:`Session.generate` answers.

    ``sequences`` is int64 ``(rows, prompt + new)``, as ``model.generate`` returns it. The first
    ``loaded`` columns of the prompts were not computed; ``failed`` says what shortened a load
    after the lookup had found more. ``stored`` has one report per row.
    """

    sequences: torch.Tensor
    loaded: int
    failed: tuple[Failure, ...] = ()
    stored: tuple[StoreReport, ...] = ()
