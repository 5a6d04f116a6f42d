"""How an object lies on a lower tier: in which encoding, in how many bytes. As numbers. Pure.

A *copy* is one number of 56 bits: the bytes, and in the lowest 8 the encoding's place among those
of its tier, from 1 on, 0 where that is not known. All that is 0 is not known. ``copies`` has those
of all tiers in one number, each in its place. So a million objects cost the garbage collector
nothing, and those that nothing is known of no memory either.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

__all__ = ["Copy", "copy_of", "of_tier", "with_copy"]

_BITS = 56
_COPY = (1 << _BITS) - 1
_ENCODINGS = 0xFF
_MOST = _COPY >> 8


class Copy(NamedTuple):
    """What a copy says. ``encoding``: its place among those of the tier, from 1 on; 0: any."""

    encoding: int
    nbytes: int

    @classmethod
    def read(cls, copy: int) -> Copy:
        """What one number says."""
        return cls(copy & _ENCODINGS, copy >> 8)


def copy_of(encoding: int, nbytes: object) -> int:
    """A copy of so many bytes. What others say of theirs is cut to what a number holds."""
    if not 0 <= encoding <= _ENCODINGS:
        encoding = 0
    if not isinstance(nbytes, int):
        return encoding  # foreign code: it may be anything
    return min(max(nbytes, 0), _MOST) << 8 | encoding


def of_tier(copies: int, tier: int) -> int:
    """The copy on a lower tier, which are counted from 1 on."""
    return copies >> (tier - 1) * _BITS & _COPY


@lru_cache(maxsize=1024)  # objects of one shape, as they are, share one number
def with_copy(copies: int, tier: int, copy: int) -> int:
    """All copies, of which that on ``tier`` is another now."""
    at = (tier - 1) * _BITS
    return copies & ~(_COPY << at) | copy << at
