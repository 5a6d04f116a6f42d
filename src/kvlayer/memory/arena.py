"""Scratch memory for what travels beside payloads: headers, padding, encoded bytes, copies.

It lies in the slab, so it is aligned, pinned and introduced to backends wherever the slab is. Reads
and writes have a half each: neither can starve the other. It is taken last and returned first:
nobody who holds some of it waits for a slot, or for more of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate, pairwise

from kvlayer.memory.extents import Extents
from kvlayer.payload import align

__all__ = ["Arena", "Scratch"]


class Scratch:
    """One stretch that was taken for a batch, until :meth:`give_back`.

    ``parts`` are whole pages, one part for each object that there was room for.
    """

    __slots__ = ("_arena", "_offset", "parts")

    def __init__(self, arena: Arena, offset: int, parts: Sequence[memoryview]) -> None:
        self._arena = arena
        self._offset = offset
        self.parts = parts

    def give_back(self) -> None:
        """Once, when nobody uses it any more."""
        for part in self.parts:
            with suppress(BufferError):  # a backend has made something of it that it keeps
                part.release()
        self._arena.take_back(self._offset)


class Arena:
    """Hands out pages of ``memory``, one direction's half of the scratch. On one loop."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._extents = Extents(memory.nbytes)
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def nbytes(self) -> int:
        """What it can hold at most."""
        return self._extents.capacity

    @property
    def used_nbytes(self) -> int:
        return self._extents.used

    def close(self) -> None:
        """Let go of the memory: what is out keeps its own part of it. Idempotent."""
        self._memory.release()

    def take(self, sizes: Sequence[int]) -> Scratch | None:
        """Room for as many objects, from the first on, as there is a stretch for now, or None.

        ``sizes`` in bytes, each rounded up to pages.
        """
        pages = [align(nbytes) for nbytes in sizes]
        while pages:
            offset = self._extents.allocate(sum(pages))
            if offset is not None:
                ends = list(accumulate(pages, initial=offset))
                return Scratch(self, offset, [self._memory[a:b] for a, b in pairwise(ends)])
            del pages[len(pages) // 2 :]  # half of it, and none where there is no room for one
        return None

    async def given_back(self) -> None:
        """Wait until something is given back. Only for who holds nothing of it.

        A return wakes all who wait, in the order they came: it may be enough for several. Who
        finds too little then waits again.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def take_back(self, offset: int) -> None:
        """For :meth:`Scratch.give_back` alone."""
        self._extents.release(offset)
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():  # cancelled
                waiter.set_result(None)
