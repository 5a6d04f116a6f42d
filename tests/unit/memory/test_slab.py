"""The slab: one aligned, zeroed piece of memory that is lent and outlives its borrowers."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest

from kvlayer.errors import CapacityError, ClosedError
from kvlayer.memory.slab import Slab

PAGE = 4096
linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")


def address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_memory_is_zeroed_and_page_aligned() -> None:
    slab = Slab(3 * PAGE + 17)
    assert slab.nbytes == 3 * PAGE
    view = slab.view(0, slab.nbytes)
    assert view.nbytes == slab.nbytes
    assert view == bytes(slab.nbytes)
    assert address(slab.view(PAGE, PAGE)) % PAGE == 0
    slab.close()


def test_views_borrow_the_same_memory() -> None:
    slab = Slab(2 * PAGE)
    slab.view(PAGE, 4)[:] = b"kvkv"
    assert bytes(slab.view(PAGE - 2, 8)) == b"\0\0kvkv\0\0"
    slab.close()


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(-1, 1), (0, 2 * PAGE + 1), (2 * PAGE, 1), (-PAGE, 0), (PAGE, -1), (1 << 40, 0)],
)
def test_what_is_outside_cannot_be_borrowed(offset: int, nbytes: int) -> None:
    slab = Slab(2 * PAGE)
    with pytest.raises(ValueError, match="outside"):
        slab.view(offset, nbytes)
    slab.close()


def test_the_end_is_inside() -> None:
    slab = Slab(PAGE)
    assert slab.view(PAGE, 0).nbytes == 0
    slab.close()


@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1, -PAGE])
def test_less_than_a_page_is_refused_with_a_hint(nbytes: int) -> None:
    with pytest.raises(CapacityError) as caught:
        Slab(nbytes)
    assert caught.value.hint is not None
    assert "cpu://" in caught.value.hint


@linux
@pytest.mark.parametrize("nbytes", [1 << 61, (1 << 63) - 1, 1 << 64])
def test_memory_nobody_has_is_refused_and_leaves_no_descriptor(nbytes: int) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CapacityError) as caught:
        Slab(nbytes)
    assert caught.value.hint is not None
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_closed_slab_lends_nothing_and_closes_again() -> None:
    slab = Slab(PAGE)
    slab.close()
    slab.close()
    with pytest.raises(ClosedError):
        slab.view(0, 1)


def test_a_borrowed_view_outlives_the_slab() -> None:
    slab = Slab(PAGE)
    view = slab.view(0, 4)
    slab.close()
    view[:] = b"held"
    assert bytes(view) == b"held"


@linux
def test_another_process_maps_the_same_memory_by_descriptor() -> None:
    slab = Slab(PAGE, name="kvlayer-test")
    assert slab.fd >= 0
    assert not os.get_inheritable(slab.fd)  # passed on purpose or not at all
    with mmap.mmap(slab.fd, PAGE) as other:  # the kernel sees no difference
        slab.view(0, 2)[:] = b"kv"
        assert other[:2] == b"kv"
    slab.close()
    assert slab.fd == -1


def test_without_memfd_the_memory_is_anonymous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    slab = Slab(PAGE)
    assert slab.fd == -1
    slab.view(0, 1)[0] = 7
    assert slab.view(0, 1)[0] == 7
    slab.close()
