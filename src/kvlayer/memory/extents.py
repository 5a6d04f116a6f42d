"""Which bytes of a slab are free: a two-level segregated-fit allocator. Pure arithmetic.

Every call takes constant time whatever the number of extents, neighbours are merged at once, and
a freed extent is found again by the next request of the same size. After M. Masmano et al.,
"TLSF: a new dynamic memory allocator for real-time systems" (ECRTS 2004), section 3.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from kvlayer.payload import ALIGNMENT, align

__all__ = ["Extents"]

_SUB_BITS = 4  # 16 size classes per power of two: at most 1/16 of a request is searched past
_SUB = 1 << _SUB_BITS
_SAME_CLASS_TRIES = 8
_WORD = (1 << 64) - 1
_NOTHING: OrderedDict[int, None] = OrderedDict()


def _size_class(pages: int) -> int:
    """Class of an extent; larger classes hold only larger extents."""
    if pages < _SUB:
        return pages
    power = pages.bit_length() - 1
    return (power - _SUB_BITS + 1) * _SUB + ((pages >> (power - _SUB_BITS)) & (_SUB - 1))


class Extents:
    """Hands out 4 KiB-aligned ranges of ``[0, capacity)``.

    ``generations`` has a word for each page. That of a range's first page changes when the range is
    handed out and when it is given back: as long as it is what it was, the bytes have one owner.
    """

    def __init__(self, capacity: int, generations: memoryview | None = None) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._generations = generations
        self.used = 0
        self._taken: dict[int, int] = {}  # start page -> pages
        self._free: dict[int, int] = {}
        self._free_ends: dict[int, int] = {}  # end page -> start page
        # Members of each class, most lately freed last. A dict would walk over its deleted entries.
        self._classes: dict[int, OrderedDict[int, None]] = {}
        self._bitmap = 0
        if self.capacity:
            self._add(0, self.capacity // ALIGNMENT)

    def __len__(self) -> int:
        return len(self._taken)

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a free range of at least ``nbytes``, or None when none was found.

        A range that would do is overlooked only where many others of its size class would not,
        and then at most 1/16 larger than the request.
        """
        pages = align(max(nbytes, 1)) // ALIGNMENT
        start = self._find(pages)
        if start is None:
            return None
        size = self._remove(start)
        if size > pages:
            self._add(start + pages, size - pages)
        self._taken[start] = pages
        self._changes_hands(start)
        self.used += pages * ALIGNMENT
        return start * ALIGNMENT

    def release(self, offset: int) -> None:
        """Give a range back. Raises ``KeyError`` for one that is not allocated."""
        start = offset // ALIGNMENT
        pages = self._taken.pop(start)
        self._changes_hands(start)
        self.used -= pages * ALIGNMENT
        before = self._free_ends.get(start)
        if before is not None:
            pages += self._remove(before)
            start = before
        if start + pages in self._free:
            pages += self._remove(start + pages)
        self._add(start, pages)

    def generation(self, offset: int) -> int:
        """The word of the page at ``offset``; 0 where nobody counts."""
        return 0 if self._generations is None else self._generations[offset // ALIGNMENT]

    def detach(self) -> None:
        """Count no more: the memory of the words is about to go. Idempotent."""
        if self._generations is not None:
            self._generations.release()
            self._generations = None

    def _changes_hands(self, page: int) -> None:
        if self._generations is not None:
            self._generations[page] = (self._generations[page] + 1) & _WORD

    def _find(self, pages: int) -> int | None:
        own = _size_class(pages)
        for start in islice(reversed(self._classes.get(own, _NOTHING)), _SAME_CLASS_TRIES):
            if self._free[start] >= pages:
                return start
        larger = self._bitmap >> (own + 1)
        if not larger:
            return None
        index = own + 1 + (larger & -larger).bit_length() - 1
        return next(reversed(self._classes[index]))

    def _add(self, start: int, pages: int) -> None:
        self._free[start] = pages
        self._free_ends[start + pages] = start
        index = _size_class(pages)
        self._classes.setdefault(index, OrderedDict())[start] = None
        self._bitmap |= 1 << index

    def _remove(self, start: int) -> int:
        pages = self._free.pop(start)
        del self._free_ends[start + pages]
        index = _size_class(pages)
        members = self._classes[index]
        del members[start]
        if not members:
            self._bitmap &= ~(1 << index)
        return pages
