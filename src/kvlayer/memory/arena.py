"""Scratch memory for what travels beside payloads: headers, padding, encoded bytes, copies.

It lies in the slab, so it is aligned, pinned and introduced to backends wherever the slab is. Reads
and writes have a half each: neither can starve the other. It is taken last and returned first:
nobody who holds some of it waits for a slot, or for more of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from kvlayer.memory.extents import Extents
from kvlayer.payload import ALIGNMENT

__all__ = ["Arena", "Scratch"]


class Scratch:
    """Memory that was taken, until :meth:`give_back`. ``memory`` is whole pages."""

    __slots__ = ("_arena", "_offset", "memory")

    def __init__(self, arena: Arena, offset: int, memory: memoryview) -> None:
        self._arena = arena
        self._offset = offset
        self.memory = memory

    def give_back(self) -> None:
        """Once, when nobody uses it any more."""
        with suppress(BufferError):  # a backend has made something of it that it keeps
            self.memory.release()
        self._arena.take_back(self._offset)


class Arena:
    """Hands out pages of ``memory``, one direction's half of the scratch. On one loop."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._extents = Extents(memory.nbytes)
        self._waiting: deque[asyncio.Future[None]] = deque()

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

    def take(self, nbytes: int) -> Scratch | None:
        """``nbytes`` rounded up to pages, or None when there is no such stretch now."""
        offset = self._extents.allocate(nbytes)
        if offset is None:
            return None
        pages = -(-nbytes // ALIGNMENT) * ALIGNMENT
        return Scratch(self, offset, self._memory[offset : offset + pages])

    def take_some(self, sizes: Sequence[int]) -> list[Scratch]:
        """As many of ``sizes``, from the first on, as fit now."""
        taken: list[Scratch] = []
        for nbytes in sizes:
            scratch = self.take(nbytes)
            if scratch is None:
                break
            taken.append(scratch)
        return taken

    async def given_back(self) -> None:
        """Wait until something is given back. Only for who holds nothing of it.

        Those who wait are woken in the order they came, one for each return; who finds too little
        then waits again.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._wake()  # it was another's turn as well
            raise
        finally:
            if not waiter.done():
                self._waiting.remove(waiter)

    def take_back(self, offset: int) -> None:
        """For :meth:`Scratch.give_back` alone."""
        self._extents.release(offset)
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
