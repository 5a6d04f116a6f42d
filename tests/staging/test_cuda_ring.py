"""The ring keeps what it has when the device gives it no more."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import fake_cupy
import pytest
from fake_cupy import Calls
from gpu_sim import FakeCudaError, Gpu

from kvlayer.staging.cuda.ring import Ring
from kvlayer.staging.cuda.tables import Arena


class Scarce:
    """A runtime that gives ``left`` allocations more, and knows what is out."""

    def __init__(self, runtime: Any, left: int) -> None:
        self._runtime = runtime
        self.left = left
        self.out: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def _give(self, address: int) -> int:
        self.out.add(address)
        return address

    def malloc(self, size: int) -> int:
        if not self.left:
            raise FakeCudaError("out of memory")
        self.left -= 1
        return self._give(self._runtime.malloc(size))

    def hostAlloc(self, size: int, flags: int) -> int:  # noqa: N802
        return self._give(self._runtime.hostAlloc(size, flags))

    def free(self, address: int) -> None:
        self.out.remove(address)
        self._runtime.free(address)

    def freeHost(self, address: int) -> None:  # noqa: N802
        self.out.remove(address)
        self._runtime.freeHost(address)


def test_a_ring_that_cannot_grow_is_what_it_was_and_one_that_cannot_be_made_leaves_nothing() -> (
    None
):
    with fake_cupy.install(Gpu("eager"), calls=Calls()):
        scarce = Scarce(import_module("cupy.cuda.runtime"), left=5)
        ring = Ring(scarce, 3, 4096)
        before = [slot.address for slot in ring.take(3)]
        with pytest.raises(FakeCudaError):
            ring.hold(8192)  # two of three
        assert ([slot.address for slot in ring.take(3)], ring.nbytes) == (before, 4096)
        assert scarce.out == set(before)
        scarce.left = 3
        ring.hold(8192)
        assert ({slot.address for slot in ring.take(3)}, ring.nbytes) == (scarce.out, 8192)
        ring.close()
        assert scarce.out == set()
        scarce.left = 2
        with pytest.raises(FakeCudaError):
            Ring(scarce, 3, 4096)
        assert scarce.out == set()


def test_tables_that_cannot_be_made_leave_no_pinned_memory() -> None:
    with fake_cupy.install(Gpu("eager"), calls=Calls()):
        scarce = Scarce(import_module("cupy.cuda.runtime"), left=0)
        arena = Arena(scarce)
        with pytest.raises(FakeCudaError):
            arena._room(100)
        assert scarce.out == set()
