"""How another process finds a slab: a value that crosses a process boundary. Pure."""

from __future__ import annotations

from typing import NamedTuple, Self

from kvlayer._pack import as_list, is_count

__all__ = ["SlabHandle"]


class SlabHandle(NamedTuple):
    """Where another process of this host finds a slab: a descriptor of process ``pid``.

    Opening it takes the rights of that process's user, and its process ids: not across containers.
    ``inode`` tells the slab from whatever a later process of that number has open.
    """

    pid: int
    fd: int
    inode: int
    nbytes: int

    def to_wire(self) -> list[int]:
        return list(self)

    @classmethod
    def from_wire(cls, wire: object) -> Self:
        """Raises ``ValueError`` for anything ``to_wire`` cannot have made."""
        listed = as_list(wire) or []
        numbers = [number for number in listed if is_count(number)]
        if len(listed) != 4 or len(numbers) != 4:
            raise ValueError(f"not a slab's handle: {wire!r}")
        return cls(*numbers)
