"""Slots of device memory between kernels and copy engines, used in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle, islice

from kvlayer.staging.cuda.runtime import Event, Runtime

__all__ = ["Ring", "Slot"]


@dataclass(slots=True, eq=False)
class Slot:
    """Device memory, and the two events that order its writer and its reader."""

    address: int
    full: Event
    """Recorded behind what fills the slot; what empties it waits for it."""
    free: Event
    """Recorded behind what empties it; what fills it next waits for it."""


class Ring:
    """``count`` slots of ``nbytes`` bytes on the current device. Not thread-safe."""

    def __init__(self, runtime: Runtime, count: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self._runtime = runtime
        with ExitStack() as made:
            self._slots = [_slot(runtime, nbytes, made) for _ in range(count)]
            self._made = made.pop_all()
        self._turns: Iterator[Slot] = cycle(self._slots)

    def take(self, count: int) -> list[Slot]:
        """``count`` slots, the one used longest ago first; each one's ``free`` says when.

        Slots come again where there are more to take than slots.
        """
        return list(islice(self._turns, count))

    def hold(self, nbytes: int) -> None:
        """Make every slot at least this large. Rare: only a layer that is larger asks for it.

        Blocks until what uses the slots has ended. When it raises, the slots are as they were:
        another call may be using them.
        """
        if nbytes <= self.nbytes:
            return
        with ExitStack() as fresh:
            addresses = [_allocated(self._runtime, nbytes, fresh) for _ in self._slots]
            for slot in self._slots:
                slot.free.synchronize()
            fresh.pop_all()
        self.nbytes = nbytes
        with ExitStack() as stale:
            for slot, address in zip(self._slots, addresses, strict=True):
                stale.callback(self._runtime.free, slot.address)
                slot.address = address

    def close(self) -> None:
        """Free the memory. Nothing may be queued that uses it. Idempotent."""
        self._made.close()
        self._slots.clear()


def _slot(runtime: Runtime, nbytes: int, made: ExitStack) -> Slot:
    full, free = (made.enter_context(closing(Event(runtime))) for _ in range(2))
    slot = Slot(runtime.malloc(nbytes), full, free)
    made.callback(lambda: runtime.free(slot.address))  # where it lies by then
    return slot


def _allocated(runtime: Runtime, nbytes: int, made: ExitStack) -> int:
    address = runtime.malloc(nbytes)
    made.callback(runtime.free, address)
    return address
