"""How vLLM's CPU attention packs a block, and back: pure, exact, on tensors of any dtype.

A block of one head is ``tokens x head_size`` elements of K and as many of V, each in an order that
suits the processor's instructions (``csrc/cpu/cpu_attn*.hpp`` of vLLM):

======== =================================== ===================================
isa      K                                   V
======== =================================== ===================================
amx      ``[token/16, dim/2, 16, 2]``        ``[dim/16, token/2, 16, 2]``
others   ``[dim, token]``                    ``[token, dim]``
======== =================================== ===================================

The tests compare both with what vLLM's own write op leaves in memory.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from kvlayer.errors import UnsupportedError

__all__ = ["ISAS", "check_isa", "pack_k", "pack_v", "unpack_k", "unpack_v"]

Tensor: TypeAlias = Any

ISAS = ("amx", "vec", "vec16")
"""Packings that were compared with the engine's."""


def check_isa(isa: str) -> None:
    """Raise ``UnsupportedError`` for a packing nobody has compared."""
    if isa not in ISAS:
        raise UnsupportedError(
            f"the packing {isa!r} of this processor is not known",
            hint='store blocks as they are: form = "native"',
        )


def pack_k(k: Tensor, isa: str) -> Tensor:
    """``[..., token, dim]`` -> ``[..., token * dim]``, the elements as the engine keeps them."""
    *outer, tokens, dim = k.shape
    if isa == "amx":
        k = k.reshape(*outer, tokens // 16, 16, dim // 2, 2).transpose(-3, -2)
    else:
        k = k.transpose(-1, -2)
    return k.reshape(*outer, tokens * dim)


def pack_v(v: Tensor, isa: str) -> Tensor:
    """As :func:`pack_k`, for V."""
    *outer, tokens, dim = v.shape
    if isa == "amx":
        at = len(outer)
        v = v.reshape(*outer, tokens // 2, 2, dim // 16, 16)
        v = v.permute(*range(at), at + 2, at, at + 3, at + 1)
    return v.reshape(*outer, tokens * dim)


def unpack_k(packed: Tensor, isa: str, tokens: int) -> Tensor:
    """Inverse of :func:`pack_k` for blocks of ``tokens`` tokens."""
    *outer, size = packed.shape
    dim = size // tokens
    if isa == "amx":
        k = packed.reshape(*outer, tokens // 16, dim // 2, 16, 2).transpose(-3, -2)
        return k.reshape(*outer, tokens, dim)
    return packed.reshape(*outer, dim, tokens).transpose(-1, -2)


def unpack_v(packed: Tensor, isa: str, tokens: int) -> Tensor:
    """Inverse of :func:`pack_v` for blocks of ``tokens`` tokens."""
    *outer, size = packed.shape
    dim = size // tokens
    if isa == "amx":
        at = len(outer)
        v = packed.reshape(*outer, dim // 16, tokens // 2, 16, 2)
        v = v.permute(*range(at), at + 1, at + 3, at, at + 2)
        return v.reshape(*outer, tokens, dim)
    return packed.reshape(*outer, tokens, dim)
