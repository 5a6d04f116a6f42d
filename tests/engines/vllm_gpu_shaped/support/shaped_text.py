"""What a request says, and the bytes that its KV must be: a model that can be looked up.

Every row of a token's KV follows from all tokens up to it, from the layer and from the head, as in
a real model; so does the next token. A row of another prefix, layer, head or position is never the
same, and neither is a block that nobody has written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from shaped_setting import HEAD_SIZE, HEADS, STATE_NBYTES

__all__ = ["Text"]

_COLUMNS = np.arange(2 * HEAD_SIZE, dtype=np.uint32) * np.uint32(0x9E3779B1)
_WORDS = 300
_AHEAD = 32


class Text:
    """A prompt and the answer that follows from it, as far as anybody has looked."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt = tuple(prompt)
        self._tokens: list[int] = []
        self._digests: list[bytes] = []
        self._rows: dict[int, NDArray[np.uint32]] = {}
        """By layer, of all heads."""
        for token in prompt:
            self._add(token)

    def _add(self, token: int) -> None:
        before = self._digests[-1] if self._digests else b""
        self._tokens.append(token)
        said = before + token.to_bytes(4, "little")
        self._digests.append(hashlib.blake2b(said, digest_size=8).digest())

    def upto(self, count: int) -> list[int]:
        """The first ``count`` tokens."""
        while len(self._tokens) < count:
            self._add(self._digests[-1][0] * 7 % _WORDS)
        return self._tokens[:count]

    def state(self, layer: int, count: int) -> NDArray[np.uint8]:
        """A layer's recurrent state after ``count`` tokens."""
        self.upto(count)
        said = self._digests[count - 1] + layer.to_bytes(4, "little")
        return np.frombuffer(hashlib.blake2b(said, digest_size=STATE_NBYTES).digest(), np.uint8)

    def rows(self, layer: int, heads: range, first: int, stop: int) -> NDArray[np.uint32]:
        """KV of tokens ``first .. stop``: ``[head, token, K then V]``."""
        known = self._rows.get(layer)
        if known is None or known.shape[1] < stop:
            self.upto(stop + _AHEAD)
            words = np.frombuffer(b"".join(self._digests), np.uint32).reshape(1, -1, 2)
            places = np.arange(1, HEADS + 1, dtype=np.uint32)[:, None, None] + np.uint32(64 * layer)
            mixed = (words[..., :1] ^ places * np.uint32(0x85EBCA6B)) + _COLUMNS
            known = self._rows[layer] = mixed * np.uint32(0xC2B2AE35) ^ words[..., 1:]
        found: NDArray[np.uint32] = known[heads.start : heads.stop, first:stop]
        return found
