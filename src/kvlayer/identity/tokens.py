"""Token ids, however an engine holds them, as packed u32: the bytes that ``keys`` hashes.

The first step of every store and lookup, so no Python loop; imports no tensor library.
"""

from __future__ import annotations

import re
import sys
from array import array
from typing import Any, TypeAlias, cast

from kvlayer.errors import TokensError

__all__ = ["MAX_NAMED", "TokenSource", "Tokens", "first_unnamed", "token_bytes", "token_source"]

Tokens: TypeAlias = Any
"""Token ids: a 1-D int32, uint32 or int64 buffer (numpy, torch, ``array``) or a list of ints."""

TokenSource: TypeAlias = Any
"""What ``token_source`` returns: slices of it are tokens, too."""

MAX_NAMED = 2**30 - 1
"""The largest id that is named. Larger ones could spell text that engines hash into such chains;
no vocabulary has them."""

_NAMED_TOPS = bytes(range((MAX_NAMED >> 24) + 1))
"""What the highest byte of a named id may be."""
_UNNAMED_TOP = re.compile(rb"[^\x00-\x3f]")

_TOKEN_FORMATS = frozenset({"i", "I", "l", "L", "q", "Q"})
_MAX_TOKEN = 2**32 - 1
_RANGE_HINT = "a placeholder id (an image's, say) must be replaced before naming"


def token_bytes(tokens: Tokens) -> bytes:
    """Tokens as packed little-endian u32, copied once: the caller may reuse its buffer at once.

    No Python loop when they come as a buffer. Raises ``TokensError`` for floats, bools, ids that
    are negative or above 2^32-1, bytes, and anything not 1-D.
    """
    tokens = token_source(tokens)
    if isinstance(tokens, (list, tuple)):
        return _from_list(cast("list[int]", tokens))
    view = memoryview(tokens)
    if sys.byteorder == "big":
        return _from_list(view.tolist())
    wide, signed = view.itemsize == 8, view.format in ("i", "l", "q")
    if hasattr(tokens, "astype"):  # numpy's own loops: 20x faster than slices of bytes
        if view.nbytes and ((signed and tokens.min() < 0) or (wide and tokens.max() > _MAX_TOKEN)):
            raise _out_of_range()
        return cast(bytes, (tokens.astype("<u4") if wide else tokens).tobytes())
    packed = view.tobytes()
    if wide:
        return _narrowed(packed)
    if signed and not packed[3::4].isascii():  # the byte that holds the sign
        raise _out_of_range()
    return packed


def token_source(tokens: Tokens) -> TokenSource:
    """Tokens as a list, a tuple or a 1-D buffer, for whoever packs them a slice at a time.

    Nothing is copied, but from a tensor's device. Raises ``TokensError`` for what is none of these.
    """
    if hasattr(tokens, "detach"):
        tokens = _from_tensor(tokens)
    if isinstance(tokens, (list, tuple)):
        return cast("list[int]", tokens)
    try:
        view = memoryview(tokens)
    except (TypeError, ValueError, BufferError):
        raise TokensError(
            f"cannot read tokens from {type(tokens).__name__}",
            hint="pass a list of ints, an array, a numpy array or a torch tensor",
        ) from None
    if view.ndim != 1 or view.format not in _TOKEN_FORMATS:
        raise TokensError(
            f"tokens must be 1-D int32, uint32 or int64, found {view.ndim}-D format "
            f"{view.format!r}",
            hint="pass one prompt's row, for example input_ids[0]",
        )
    return tokens if hasattr(tokens, "astype") else view


def first_unnamed(packed: bytes) -> int | None:
    """Where in packed ids the first above ``MAX_NAMED`` stands; None, at a quarter of a copy's
    price, where there is none."""
    tops = packed[3::4]
    if not tops.translate(None, _NAMED_TOPS):
        return None
    found = _UNNAMED_TOP.search(tops)
    assert found is not None
    return found.start()


def _narrowed(packed: bytes) -> bytes:
    """Little-endian u64 as u32, a byte of every number at a time: slices of single bytes are fast.

    Raises ``TokensError`` for a number that does not fit.
    """
    zeros = bytes(len(packed) // 8)
    if any(packed[place::8] != zeros for place in range(4, 8)):
        raise _out_of_range()
    narrow = bytearray(len(packed) // 2)
    for place in range(4):
        narrow[place::4] = packed[place::8]
    return bytes(narrow)


def _out_of_range() -> TokensError:
    return TokensError(
        "tokens must be in 0..2^32-1, found a negative or larger id", hint=_RANGE_HINT
    )


def _from_list(tokens: list[int]) -> bytes:
    try:
        packed = array("I", tokens)
    except (TypeError, OverflowError) as exc:
        raise TokensError(
            f"tokens must be integers in 0..2^32-1: {exc}",
            hint="pass one prompt's token ids; for a batch call once per row",
        ) from None
    if sys.byteorder == "big":
        packed.byteswap()
    words = packed.tobytes()
    # Looking at every type would double the cost. A mask passed by mistake is all 0 and 1.
    if not words.strip(b"\0\1") and bool in map(type, tokens):
        raise TokensError("tokens must be integers, found bools", hint="is this a mask?")
    return words


def _from_tensor(tensor: Any) -> Any:
    """A torch tensor as something token_bytes reads (torch itself is never imported)."""
    try:
        host = tensor.detach().cpu()
        if host.ndim == 1 and not host.is_floating_point():
            return _from_host(host)
    except Exception as exc:  # without values (meta), sparse, or lost with its device
        raise TokensError(
            f"cannot read tokens from {type(tensor).__name__}: {type(exc).__name__}",
            hint="pass one prompt's row of plain integers, for example input_ids[0]",
        ) from exc
    raise TokensError(
        f"tokens must be a 1-D integer tensor, found shape {tuple(host.shape)} of {host.dtype}",
        hint="pass one prompt's row, for example input_ids[0]",
    )


def _from_host(host: Any) -> Any:
    try:
        return host.numpy()
    except RuntimeError:  # torch without numpy has no buffer protocol
        return host.tolist()
