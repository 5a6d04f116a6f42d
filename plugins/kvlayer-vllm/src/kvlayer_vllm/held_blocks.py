"""vLLM's blocks that a store reads, held by reference as a request holds its own.

    planned    the blocks are touched while the request that computed them still has them
    read       the request ends, is preempted, or its window moves on: vLLM lets go of them as ever,
               gives them to nobody else, and finds them in its prefix cache meanwhile
    gathered   they are let go of in the scheduler's thread, with the next hook of vLLM's

What vLLM does not get back is missing in its pool: so a share of it is the most that is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from kvlayer_vllm.moves import Save

__all__ = ["HeldBlocks"]


class HeldBlocks:
    """The references. For the scheduler's thread alone.

    ``share``: of the pool's blocks, how many are held at most; a block that two stores read counts
    twice.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._pool: Any = None
        self._most = 0
        self._held: dict[Save, list[Any]] = {}
        self.blocks = 0
        """How many references there are."""

    def __len__(self) -> int:
        """Stores that still read, as far as :meth:`let_go` has seen."""
        return len(self._held)

    def bind(self, pool: Any) -> None:
        """``pool`` is vLLM's ``BlockPool``."""
        self._pool = pool
        self._most = max(1, int(self._share * (pool.num_gpu_blocks - 1)))  # one is the null block

    @property
    def room(self) -> int:
        """How many more blocks may be held."""
        return self._most - self.blocks

    def hold(self, save: Save, block_ids: Iterable[int]) -> None:
        """Nobody writes to these blocks before ``save`` is over. Somebody has them now.

        The order is that of the tokens. Raises ``IndexError`` for what is no block.
        """
        blocks = [self._pool.blocks[number] for number in block_ids]
        self._pool.touch(blocks)
        self._held[save] = blocks
        self.blocks += len(blocks)

    def let_go(self) -> bool:
        """Of the blocks of stores that are over by now. Whether there were any."""
        over = [save for save in self._held if save.is_over]
        for save in over:
            blocks = self._held.pop(save)
            self.blocks -= len(blocks)
            self._pool.free_blocks(reversed(blocks))  # a prompt's end is evicted first
        return bool(over)

    def will_free(self) -> bool:
        """Whether vLLM gets blocks back without taking them from a request, now or soon.

        Soon: stores read blocks that nobody else has.
        """
        if self.let_go():
            return True
        mine = Counter(block.block_id for blocks in self._held.values() for block in blocks)
        return any(self._pool.blocks[number].ref_cnt == n for number, n in mine.items())

    def wait(self) -> None:
        """Until no store reads, as long as copying takes, and let go of all."""
        for save in self._held:
            save.wait()
        self.let_go()
