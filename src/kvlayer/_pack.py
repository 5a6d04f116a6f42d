"""MessagePack for names and identity: the one seam to an untyped library. Pure.

Packing is canonical for what kvlayer packs: maps keep the order they are given in, integers and
strings take their shortest form, floats are always 64 bits wide. Unpacking is bounded.
"""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]

__all__ = ["as_list", "as_map", "is_count", "pack", "unpack"]

_packb: Any = cast("Any", msgpack.packb)  # pyright: ignore[reportUnknownMemberType]
_unpackb: Any = cast("Any", msgpack.unpackb)  # pyright: ignore[reportUnknownMemberType]

# An array's header alone makes the reader allocate; 1,024 nested headers are the most it follows.
_MAX_ENTRIES = 1024


def pack(value: object) -> bytes:
    """``value``: dicts, lists, tuples, str, bytes, int, float, bool and None.

    Raises ``TypeError``, ``OverflowError`` or ``ValueError`` for anything else.
    """
    packed: bytes = _packb(value)
    return packed


def unpack(packed: bytes) -> object:
    """Inverse of ``pack``, within bounds: at most 1,024 entries in a map or list, text keys only.

    Raises ``ValueError`` for anything that is not one such value.
    """
    try:
        value: object = _unpackb(
            packed,
            strict_map_key=True,
            max_array_len=_MAX_ENTRIES,
            max_map_len=_MAX_ENTRIES,
            max_ext_len=0,
        )
    except (ValueError, TypeError, BufferError, RecursionError) as exc:  # msgpack's are ValueErrors
        raise ValueError(f"not msgpack: {exc}") from None
    return value


def as_list(value: object) -> list[object] | None:
    """``value`` if it is a list, else None."""
    return cast("list[object]", value) if isinstance(value, list) else None


def as_map(value: object) -> dict[str, object] | None:
    """``value`` if it is a map, as ``unpack`` makes them (text keys), else None."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


def is_count(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer of at least 0 (and no ``bool``)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
