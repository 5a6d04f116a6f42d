"""The recurrent states of one rank: where a runner of vLLM's reads them, copies and writes them.

As ``v1/worker/mamba_utils.py`` has it: a request's state is in the last block of its table that a
step reaches. Where a step reaches another block than the one before, the state is copied there
first; of a request that was just admitted it lies in the block of its last computed token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from shaped_setting import BLOCK, STATE_NBYTES, name_of

if TYPE_CHECKING:
    from shaped_rank import Batch, Work

__all__ = ["States"]


class States:
    """``groups`` are vLLM's, by their numbers, and ``layers`` those of each."""

    def __init__(self, groups: Sequence[int], layers: Sequence[Sequence[int]], blocks: int) -> None:
        self._layers = [
            (group, layer) for group, each in zip(groups, layers, strict=True) for layer in each
        ]
        self.tensors = {
            name_of(layer): torch.zeros((blocks, 1, 1, STATE_NBYTES), dtype=torch.int8)
            for _, layer in self._layers
        }
        self._bytes = {
            name: each.numpy().view("uint8").reshape(blocks, STATE_NBYTES)
            for name, each in self.tensors.items()
        }
        self._at: dict[str, int] = {}
        """By request, the entry of its table that has its state."""
        self._moves: dict[int, list[tuple[Work, int, int]]] = {}
        """By step, which entries of whose tables are copied."""

    def moves_on(self, batch: Batch) -> None:
        """The runner gets to know the step's requests: where their states go."""
        output = batch.output
        for name in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self._at.pop(name, None)
        for name in getattr(output.scheduled_cached_reqs, "resumed_req_ids", ()):
            self._at.pop(name, None)
        moves = self._moves[batch.number] = []
        for work in batch.works:
            before = self._at.get(work.request_id, (work.first - 1) // BLOCK)
            now = self._at[work.request_id] = -(-work.stop // BLOCK) - 1
            if before not in (-1, now):
                moves.append((work, before, now))

    def copied(self, batch: Batch) -> None:
        for work, before, now in self._moves.pop(batch.number):
            for group, layer in self._layers:
                held, table = self._bytes[name_of(layer)], work.tables[group]
                held[table[now]] = held[table[before]]

    def wrong(self, batch: Batch, work: Work) -> Iterator[tuple[int, int, int]]:
        """Layer, token and group of each state that a share of a step goes on from wrongly."""
        if not work.first:
            return
        for group, layer in self._layers:
            block = work.tables[group][-(-work.stop // BLOCK) - 1]
            found = self._bytes[name_of(layer)][block]
            if not np.array_equal(found, work.text.state(layer, work.first)):
                yield layer, work.first - 1, group

    def computed(self, batch: Batch, work: Work, *, is_wrong: bool) -> None:
        """The state after the share, in the block where it began."""
        for group, layer in self._layers:
            block = work.tables[group][-(-work.stop // BLOCK) - 1]
            state = work.text.state(layer, work.stop)
            self._bytes[name_of(layer)][block] = ~state if is_wrong else state
