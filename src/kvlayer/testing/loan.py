"""Memory that is lent to a backend, and the means to find out what became of it."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from itertools import accumulate, pairwise
from random import Random

from kvlayer.payload import ALIGNMENT, align
from kvlayer.testing.promise import broken, same_bytes

__all__ = ["PAGE", "Loan", "noise", "only_young"]

PAGE = ALIGNMENT
_GUARD = 0xA5
_POISON = 0x5A


def noise(seed: int, nbytes: int) -> bytes:
    """Bytes that no other seed has, the same every time."""
    return Random(seed).randbytes(nbytes)  # noqa: S311  # not a secret


@contextmanager
def only_young() -> Generator[None]:
    """Keep garbage young, so that a quick collection finds all of it.

    A cycle of an exception and its frames is nobody's intent and no use of memory. A full
    collection would take so long that a thread which does use it ends meanwhile, unseen.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Loan:
    """``nbytes`` of memory between guard bytes, a page before it and more than one after it.

    It begins ``shift`` bytes into a page. :meth:`regions` hands it out, in whole pages;
    :meth:`pieces` cuts it anywhere. After the call it was lent to, :meth:`poison` changes it, so
    that who reads it late reads garbage and who writes it late is seen, and :meth:`take_back`
    ends it.
    """

    def __init__(self, nbytes: int, content: bytes | None = None, *, shift: int = 0) -> None:
        self.nbytes = nbytes
        self._memory = mmap.mmap(-1, align(nbytes + shift) + 2 * PAGE)
        whole = memoryview(self._memory)
        self._at = slice(PAGE + shift, PAGE + shift + nbytes)
        whole[: self._at.start] = bytes([_GUARD]) * self._at.start
        whole[self._at.stop :] = bytes([_GUARD]) * (len(whole) - self._at.stop)
        self._view = whole[self._at]
        self._own = (whole, self._view)
        self._lent: list[weakref.ref[memoryview]] = []
        if content is not None:
            self._view[:] = content

    def regions(self, pages: Iterable[int] = ()) -> tuple[memoryview, ...]:
        """The memory as consecutive regions of so many pages, and one for what is left."""
        regions: list[memoryview] = []
        at = 0
        for count in pages:
            regions.append(self._view[at : at + count * PAGE])
            at += count * PAGE
        if at < self.nbytes:
            regions.append(self._view[at:])
        self._lent += map(weakref.ref, regions)
        return tuple(regions)

    def pieces(self, sizes: Iterable[int]) -> tuple[memoryview, ...]:
        """The memory as consecutive regions of so many bytes, and one for what is left."""
        cuts = [0, *accumulate(sizes)]
        cuts.append(max(self.nbytes, cuts[-1]))
        regions = [self._view[at:end] for at, end in pairwise(cuts) if end > at]
        self._lent += map(weakref.ref, regions)
        return tuple(regions)

    def content(self, nbytes: int | None = None) -> bytes:
        """The first ``nbytes`` bytes, by default all."""
        return bytes(self._view[:nbytes])

    def holds(self, content: bytes, what: str) -> None:
        """Raise ``Broken`` unless the memory begins with these bytes."""
        same_bytes(self._view[: len(content)], content, what)

    def poison(self) -> None:
        """Overwrite it all: from here on it is somebody else's."""
        self._memory[self._at] = bytes([_POISON]) * self.nbytes

    def is_poisoned_still(self) -> None:
        """Raise ``Broken`` when somebody wrote after :meth:`poison`."""
        found = self._memory[self._at]
        same_bytes(found, bytes([_POISON]) * self.nbytes, "memory after it was given back")

    def guards_stand(self) -> None:
        """Raise ``Broken`` when bytes around the lent memory were written."""
        for guard in (self._memory[: self._at.start], self._memory[self._at.stop :]):
            same_bytes(guard, bytes([_GUARD]) * len(guard), "memory beside what was lent")

    def take_back(self) -> None:
        """End the loan. Raises ``Broken`` when a region is still referred to, or a view of it.

        The memory stays mapped, so that native code with a bare address is seen and not a crash.
        """
        if not self._is_free():
            gc.collect(1)  # see only_young
            if not self._is_free():
                broken(
                    "nobody to hold lent memory once the call has returned",
                    f"somebody holds a view of {self.nbytes} bytes that were lent",
                )

    def _is_free(self) -> bool:
        if any(region() is not None for region in self._lent):
            return False
        try:
            for view in reversed(self._own):
                view.release()
            self._memory.resize(len(self._memory))  # refused while a view is exported
        except BufferError:
            return False
        return True
