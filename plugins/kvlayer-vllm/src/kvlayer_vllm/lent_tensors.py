"""A worker's KV tensors, lent to a scheduler of the same process, and taken back for a sleep."""

from __future__ import annotations

from typing import Any

from kvlayer_vllm.device_order import EngineStream
from kvlayer_vllm.moves import Load, Save

__all__ = ["LentTensors"]


class LentTensors:
    """The tensors of each KV group, and who copies from or to them. For the engine's thread.

    ``stream`` is what computes in them.
    """

    def __init__(self, caches: list[list[Any]], stream: EngineStream) -> None:
        self.caches = caches
        self.stream = stream
        self.are_there = True
        """Whether their memory may be touched."""
        self._borrowers: list[Save | Load] = []

    def lend(self, borrower: Save | Load) -> list[list[Any]]:
        """Until ``borrower`` is over."""
        self._borrowers = [each for each in self._borrowers if not each.is_over]
        self._borrowers.append(borrower)
        return self.caches

    def take_back(self) -> None:
        """Nobody touches them when this returns: as long as copying takes. Idempotent."""
        self.are_there = False
        for each in self._borrowers:
            each.wait()

    def give_out(self) -> None:
        """Their memory is there again, at the same place. What it held is gone. Idempotent."""
        self.are_there = True
