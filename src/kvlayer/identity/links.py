"""Links: the hash chain that names tokens and all that precedes them. Pure.

A link is ``sha256(parent || L tokens as u32le)`` for a fixed number L of tokens; the parent is the
link before, and empty at the start. What else shaped the KV folds into the parent of the link in
which it starts. ``docs/object-format.md`` says why equal links mean equal prefixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from mmap import mmap
from struct import Struct
from typing import overload

from kvlayer.scope import Extra, Scope

__all__ = ["LINK_NBYTES", "Folds", "Links", "extend", "folds_of", "link_size"]

LINK_NBYTES = 32

_LONGEST = 32
"""Longer links would be named faster, but a hit already spends less than 2% of its time on it."""

_TAG = b"kvlayer: a fold of extras, v2..."
"""Opens the preimage of a fold. 32 bytes: a digest that spells it cannot be found."""

_FIELD = Struct("<BIQ")
"""Before each extra: its kind, its token counted in the link, and its length in bytes."""

Folds = Mapping[int, bytes]
"""By number of the link: the encoded extras that start in it."""


def link_size(tokens_per_chunk: int) -> int:
    """Tokens of a link where nobody chose them: at most an eighth of a chunk, and at most 32.

    The largest power of two that divides the chunk and is no larger: blocks of engines are such.
    """
    most = min(tokens_per_chunk // 8, _LONGEST)
    sizes = (1 << power for power in range(_LONGEST.bit_length()))
    return max((size for size in sizes if size <= most and tokens_per_chunk % size == 0), default=1)


def folds_of(scope: Scope, tokens_per_link: int) -> Folds:
    """What a scope folds into the chain, by the link in which it starts."""
    folds: dict[int, bytes] = {}
    for kind, first_token, value in scope.extras():
        link, inside = divmod(first_token, tokens_per_link)
        field = _FIELD.pack(_KINDS[kind], inside, len(value)) + value
        folds[link] = folds.get(link, b"") + field
    return folds


_KINDS: Mapping[Extra, int] = {Extra.ADAPTER: 1, Extra.CONTENT: 2, Extra.SALT: 3}


class Links(Sequence[bytes]):
    """Links one after the other, as one object: a long prompt's are made and freed in one go."""

    __slots__ = ("packed",)

    def __init__(self, packed: bytes | bytearray = b"") -> None:
        """``packed`` is kept, and does not change any more."""
        self.packed = packed

    def __len__(self) -> int:
        return len(self.packed) // LINK_NBYTES

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Links: ...
    def __getitem__(self, index: int | slice) -> bytes | Links:
        count = len(self)
        if isinstance(index, slice):
            start, stop, step = index.indices(count)
            if step != 1:
                return Links(b"".join([self[at] for at in range(start, stop, step)]))
            return Links(self.packed[LINK_NBYTES * start : LINK_NBYTES * max(start, stop)])
        if not -count <= index < count:
            raise IndexError(f"link {index} of {count}")
        start = LINK_NBYTES * (index % count)
        return bytes(self.packed[start : start + LINK_NBYTES])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Links):
            return self.packed == other.packed
        return [*self] == [*other] if isinstance(other, (list, tuple)) else NotImplemented

    def __hash__(self) -> int:
        return hash((*self,))

    def __repr__(self) -> str:
        return f"<{len(self)} links>"


def extend(
    links: bytearray, packed: bytes | mmap, count: int, tokens_per_link: int, folds: Folds
) -> None:
    """Append what ``links`` lacks of the first ``count`` links of the prompt ``packed`` (u32le)."""
    done, nbytes = len(links) // LINK_NBYTES, 4 * tokens_per_link
    if done >= count:
        return
    parent = bytes(links[-LINK_NBYTES:])
    made: list[bytes] = []
    for start, stop in pairwise([done, *sorted(n for n in folds if done < n < count), count]):
        if start in folds:
            parent = _fold(parent, folds[start])
        # One call cuts the prompt: slices would cost a tenth of the hashing.
        for link in Struct(f"{nbytes}s" * (stop - start)).unpack_from(packed, start * nbytes):
            parent = sha256(parent + link).digest()
            made.append(parent)
    links += b"".join(made)


def _fold(parent: bytes, fields: bytes) -> bytes:
    """The parent of a link in which extras start. Its preimage is 1 mod 4 bytes long."""
    preimage = b"".join(
        (_TAG, bytes([len(parent)]), parent, Struct("<Q").pack(len(fields)), fields)
    )
    return sha256(preimage + bytes((1 - len(preimage)) % 4)).digest()
