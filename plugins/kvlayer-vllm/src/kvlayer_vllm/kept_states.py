"""Recurrent states that vLLM offers at a boundary, held until a store has taken them.

offered    in the step that computes up to the boundary: the state is in its block when the step has
           run, and vLLM promises it no longer than that. So the block is held from here on.
taken      by the store of the tokens that end there, which holds it itself: ``HeldBlocks``
given up   with the request, where it loses its blocks, when vLLM resets its prefix cache, and
           before vLLM would preempt a request for want of blocks: a state is worth less than that
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from kvlayer_vllm.tracked import Tracked

__all__ = ["KeptStates"]


class KeptStates:
    """The references, by request and boundary. For the scheduler's thread alone.

    ``sizes`` are the tokens of a block in each of vLLM's groups that keep states. ``on_cut`` is
    told of each boundary that is given up, or that there was no room for.
    """

    def __init__(self, sizes: Mapping[int, int], on_cut: Callable[[], None]) -> None:
        self._sizes = dict(sizes)
        self._on_cut = on_cut
        self._pool: Any = None
        self._kept: dict[Tracked, None] = {}
        self.blocks = 0
        """How many references there are."""

    @property
    def tables(self) -> Collection[int]:
        """Those of vLLM's groups that keep states."""
        return self._sizes.keys()

    def bind(self, pool: Any) -> None:
        """``pool`` is vLLM's ``BlockPool``."""
        self._pool = pool

    def offered(self, tracked: Tracked, offers: Iterable[tuple[int, int, int]], room: int) -> None:
        """A step computes states of a request: ``(group, block, tokens)`` each.

        Boundaries that take more than ``room`` blocks are not kept.
        """
        found: dict[int, dict[int, int]] = {}
        for table, block, tokens in offers:
            size = self._sizes.get(table)
            if size is not None and tokens % size == 0:  # else inside of a block: no chunk ends so
                found.setdefault(tokens, {})[table] = block
        for end, blocks in found.items():
            if len(blocks) < len(self._sizes):
                continue  # half a set restores nothing
            self._release(tracked, [end])
            if len(blocks) > room:
                self._on_cut()
                continue
            room -= len(blocks)
            self._pool.touch([self._pool.blocks[number] for number in blocks.values()])
            self.blocks += len(blocks)
            tracked.states[end] = blocks
            self._kept[tracked] = None

    def taken(self, tracked: Tracked, stop: int) -> None:
        """A store of the request holds what it reads up to token ``stop``."""
        self._release(tracked, [end for end in tracked.states if end <= stop])

    def dropped(self, tracked: Tracked) -> None:
        """The request is over, or has lost its blocks."""
        self._release(tracked, [*tracked.states])

    def give_up(self) -> bool:
        """All of them. Whether vLLM has got a block back that nobody else holds."""
        mine = [
            self._pool.blocks[number]
            for tracked in self._kept
            for blocks in tracked.states.values()
            for number in blocks.values()
        ]
        for tracked in [*self._kept]:
            for _ in tracked.states:
                self._on_cut()
            self.dropped(tracked)
        return any(not block.ref_cnt for block in mine)

    def _release(self, tracked: Tracked, ends: Sequence[int]) -> None:
        for end in ends:
            blocks = tracked.states.pop(end, {})
            self.blocks -= len(blocks)
            if blocks:
                self._pool.free_blocks([self._pool.blocks[number] for number in blocks.values()])
        if not tracked.states:
            self._kept.pop(tracked, None)
