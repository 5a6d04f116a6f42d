"""The slab: one aligned, zeroed piece of memory that is lent and outlives its borrowers."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from descriptors import descriptors

from kvlayer.errors import CapacityError, ClosedError, UnsupportedError
from kvlayer.memory.extents import Extents
from kvlayer.memory.handle import SlabHandle
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
    before = descriptors()
    with pytest.raises(CapacityError) as caught:
        Slab(nbytes)
    assert caught.value.hint is not None
    assert descriptors() == before


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


# -- other processes ------------------------------------------------------------------------------


@linux
def test_an_attached_slab_is_the_same_memory_and_asks_for_no_descriptor_of_its_own() -> None:
    slab = Slab(3 * PAGE)
    before = descriptors()
    copy = os.dup(slab.fd)
    other = Slab.attach(copy)
    os.close(copy)  # the caller's own, at once
    assert (other.nbytes, other.fd) == (slab.nbytes, -1)
    slab.view(PAGE, 2)[:] = b"kv"
    other.view(PAGE + 2, 2)[:] = b"kv"
    assert slab.view(PAGE, 4) == other.view(PAGE, 4) == b"kvkv"
    other.close()
    other.close()
    assert descriptors() == before
    with pytest.raises(ClosedError):
        other.view(0, 1)
    assert bytes(slab.view(PAGE, 4)) == b"kvkv"
    slab.close()


@linux
def test_a_handle_finds_the_slab_from_another_process() -> None:
    slab = Slab(2 * PAGE)
    code = """
import sys
from kvlayer.memory.extents import Extents
from kvlayer.memory.handle import SlabHandle
from kvlayer.memory.slab import Slab
slab = Slab.attach_to(SlabHandle(*map(int, sys.argv[1:])))
assert bytes(slab.view(0, 4)) == b"from"
slab.view(4096, 4)[:] = b"back"
"""
    slab.view(0, 4)[:] = b"from"
    numbers = map(str, slab.handle.to_wire())
    subprocess.run([sys.executable, "-c", code, *numbers], check=True)
    assert bytes(slab.view(PAGE, 4)) == b"back"
    slab.close()


@linux
@pytest.mark.parametrize("by_handle", [False, True])
def test_who_only_reads_maps_the_slab_so_that_nothing_can_be_written(by_handle: bool) -> None:
    slab = Slab(3 * PAGE)
    before = descriptors()
    if by_handle:
        other = Slab.attach_to(slab.handle, is_writable=False)
    else:
        fd = os.open(f"/proc/self/fd/{slab.fd}", os.O_RDONLY)
        other = Slab.attach(fd, is_writable=False)
        with pytest.raises(UnsupportedError):
            Slab.attach(fd)  # nor can it be mapped otherwise
        os.close(fd)
    slab.view(PAGE, 2)[:] = b"kv"
    slab.generations()[1] = 7
    assert other.view(PAGE, 2) == b"kv" and other.generations()[1] == 7
    lent = [other.view(0, 1), other.scratch(0, 1), other.whole(), other.generations()]
    assert [view.readonly for view in lent] == [True] * 4
    del lent
    other.close()
    assert descriptors() == before
    slab.close()


@linux
def test_memory_lives_until_its_last_process_lets_go() -> None:
    slab = Slab(PAGE)
    other = Slab.attach_to(slab.handle)
    slab.view(0, 1)[0] = 9
    slab.close()
    assert other.view(0, 1)[0] == 9
    other.close()


@linux
def test_a_handle_of_what_is_gone_is_refused_and_leaves_nothing_open() -> None:
    slab = Slab(PAGE)
    handle = slab.handle
    before = descriptors()
    for wrong in (
        handle._replace(pid=1 << 22),  # more than Linux counts to
        handle._replace(fd=1 << 19),
        handle._replace(inode=handle.inode + 1),
    ):
        with pytest.raises(UnsupportedError) as caught:
            Slab.attach_to(wrong)
        assert caught.value.hint
    assert descriptors() == before
    slab.close()
    with pytest.raises(UnsupportedError):
        _ = slab.handle
    with pytest.raises(UnsupportedError):
        Slab.attach_to(handle)


@linux
def test_only_memory_whose_size_is_fixed_is_mapped(tmp_path: Path) -> None:
    """Another process could shrink it: touching what is gone ends this process."""
    slab = Slab(PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(slab.fd, 0)
    with pytest.raises(PermissionError):
        os.ftruncate(slab.fd, 2 * PAGE)
    slab.close()
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, PAGE)
    plain = os.open(path, os.O_RDWR)
    for fd in (loose, plain, -1):
        with pytest.raises(UnsupportedError) as caught:
            Slab.attach(fd)
        assert caught.value.hint
    os.close(loose)
    os.close(plain)


def test_without_a_descriptor_there_is_no_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    slab = Slab(PAGE)
    with pytest.raises(UnsupportedError) as caught:
        _ = slab.handle
    assert caught.value.hint
    slab.close()


@linux
def test_a_handle_survives_the_wire_and_nothing_else_is_one() -> None:
    handle = SlabHandle(1, 2, 3, 4096)
    assert SlabHandle.from_wire(handle.to_wire()) == handle
    for wire in (None, [], [1, 2, 3], [1, 2, 3, -4], [1, 2, 3, "4"], [1, 2, 3, True], [1] * 5):
        with pytest.raises(ValueError, match="not a slab's handle"):
            SlabHandle.from_wire(wire)


@linux
def test_memory_lent_past_closing_goes_with_the_last_view_though_somebody_keeps_the_slab() -> None:
    before = descriptors()
    slab = Slab(PAGE, name="kvlayer-test")
    view = slab.view(0, 4)
    slab.close()
    assert descriptors() > before  # the map has a descriptor of its own
    view.release()
    del view
    assert descriptors() == before
    slab.close()


def test_a_slot_that_changes_hands_says_so_to_who_maps_the_slab() -> None:
    slab = Slab(8 * PAGE)
    other = Slab.attach(slab.fd) if slab.fd >= 0 else slab
    theirs = other.generations()
    extents = Extents(slab.nbytes, slab.generations())
    assert theirs.nbytes == 8 * 8 and not any(theirs)
    slot = extents.allocate(2 * PAGE)
    assert slot is not None
    seen = theirs[slot // PAGE]  # what its owner tells a reader once the bytes are there
    assert seen == extents.generation(slot) != 0
    kept = extents.allocate(PAGE)
    assert kept is not None and theirs[slot // PAGE] == seen
    extents.release(slot)
    assert theirs[slot // PAGE] != seen
    for nbytes in (PAGE, 2 * PAGE, 4 * PAGE):  # whoever has the bytes next, in whatever cut
        again = extents.allocate(nbytes)
        assert again is not None and theirs[slot // PAGE] != seen
        extents.release(again)
    assert theirs[kept // PAGE] == extents.generation(kept)
    slab.view(0, slab.nbytes)[:] = b"\xff" * slab.nbytes  # no slot reaches them
    assert theirs[kept // PAGE] == extents.generation(kept)
    theirs.release()
    extents.detach()
    extents.release(kept)  # nobody counts any more
    assert extents.generation(kept) == 0
    slab.close()


def test_a_generation_never_runs_out() -> None:
    words = memoryview(bytearray(b"\xff" * 8)).cast("Q")
    extents = Extents(PAGE, words)
    assert extents.allocate(PAGE) == 0
    assert words[0] == 0
