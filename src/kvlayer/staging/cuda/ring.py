"""Slots of device memory between kernels and copy engines, used in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

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
        self._slots = [
            Slot(address, Event(runtime), Event(runtime))
            for address in _allocated(runtime, count, nbytes)
        ]
        self._turns: Iterator[Slot] = cycle(self._slots)

    def next(self) -> Slot:
        """The slot that was used longest ago; its ``free`` says when."""
        return next(self._turns)

    def hold(self, nbytes: int) -> None:
        """Make every slot at least this large. Rare: only a layer that is larger asks for it.

        Blocks until what uses the slots has ended. When it raises, the slots are as they were:
        another call may be using them.
        """
        if nbytes <= self.nbytes:
            return
        addresses = _allocated(self._runtime, len(self._slots), nbytes)
        for slot, address in zip(self._slots, addresses, strict=True):
            slot.free.synchronize()
            self._runtime.free(slot.address)
            slot.address = address
        self.nbytes = nbytes

    def close(self) -> None:
        """Free the memory. Nothing may be queued that uses it."""
        for slot in self._slots:
            self._runtime.free(slot.address)
            slot.full.close()
            slot.free.close()
        self._slots.clear()


def _allocated(runtime: Runtime, count: int, nbytes: int) -> list[int]:
    """Addresses of ``count`` times ``nbytes`` bytes of device memory: all of them, or none."""
    addresses: list[int] = []
    try:
        for _ in range(count):
            addresses.append(runtime.malloc(nbytes))  # noqa: PERF401  # known when one fails
    except BaseException:
        for address in addresses:
            runtime.free(address)
        raise
    return addresses
