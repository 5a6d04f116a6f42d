"""Prompts to measure with, and the least that naming one can cost."""

from __future__ import annotations

import random
from array import array
from hashlib import sha256

__all__ = ["bare_chain", "prompt"]


def prompt(tokens: int, seed: int) -> array[int]:
    """``tokens`` random ids under 2^16, as int32; the same ones for the same seed."""
    rng = random.Random(seed)  # noqa: S311  # tokens, not keys
    return array("i", array("H", rng.randbytes(2 * tokens)))


def bare_chain(packed: bytes, chunk_nbytes: int) -> None:
    """sha256 over the digest so far and the next chunk, to the end, and nothing else."""
    parent = b""
    for start in range(0, len(packed), chunk_nbytes):
        state = sha256(parent)
        state.update(packed[start : start + chunk_nbytes])
        parent = state.digest()
