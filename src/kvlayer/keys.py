"""Names of KV: tokens in, chunk hashes and object keys out. Pure; imports no tensor library.

A chunk hash names a chunk *and everything before it*: ``sha256(parent || u32le(tokens))``, with an
empty parent at the start, so a plain prompt's chunks are named exactly like SGLang's pages of the
same size. What else shaped the KV (a LoRA adapter, an image, a salt) first folds into the parent:
``sha256("extra" || parent || msgpack(extras))``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from struct import Struct
from typing import NamedTuple

from kvlayer._pack import pack
from kvlayer.errors import LayoutError
from kvlayer.scope import PUBLIC_ZONE, Content, Salt, Scope, zone_at
from kvlayer.tokens import Tokens, token_bytes

__all__ = [
    "PUBLIC_ZONE",
    "ChunkChain",
    "Content",
    "ObjectKey",
    "Part",
    "Salt",
    "Scope",
    "Span",
    "Tokens",
    "token_bytes",
]


class Span(NamedTuple):
    """A chunk's or tail's token range ``[start, stop)`` in one prompt, and its hash."""

    start: int
    stop: int
    hash: bytes

    @property
    def tokens(self) -> int:
        """How many tokens it covers."""
        return self.stop - self.start


_NUMBER = "(0|[1-9][0-9]{0,8})"
_PART = re.compile(
    rf"g{_NUMBER}\.l{_NUMBER}-{_NUMBER}(?:\.h{_NUMBER}-{_NUMBER})?"
    r"\.(canonical|native:[a-z0-9_:-]+)"
)


@dataclass(frozen=True, slots=True)
class Part:
    """What one object holds of a chunk, never who wrote it.

    ``layers`` is a half-open range of positions in the group's layers, ``heads`` a range of the
    model's KV heads (None where heads mean nothing: MLA and state groups). ``form`` is
    ``canonical`` or ``native:<form>`` in ``[a-z0-9_:-]``. Raises ``LayoutError`` for an empty
    range or a form that no key can carry.
    """

    group: int
    layers: tuple[int, int]
    heads: tuple[int, int] | None
    form: str = "canonical"

    def __post_init__(self) -> None:
        (l0, l1), (h0, h1) = self.layers, self.heads or (0, 1)
        if l0 >= l1 or h0 >= h1 or _PART.fullmatch(str(self)) is None:
            raise LayoutError(
                f"not a part: {str(self)!r}",
                hint="ranges are half-open and not empty; a form is 'canonical' or "
                "'native:<form>' in a-z, 0-9, '_', ':' and '-'",
            )

    def __str__(self) -> str:
        heads = "" if self.heads is None else f".h{self.heads[0]}-{self.heads[1]}"
        return f"g{self.group}.l{self.layers[0]}-{self.layers[1]}{heads}.{self.form}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Inverse of ``str``. Raises ``ValueError`` for anything ``str`` cannot produce."""
        return _part(text)


@lru_cache(maxsize=1024)  # a model has a handful, and every move of every object asks for one
def _part(text: str) -> Part:
    match = _PART.fullmatch(text)
    if match is None:
        raise ValueError(f"not a part: {text!r}")
    heads = None if match[4] is None else (int(match[4]), int(match[5]))
    return Part(int(match[1]), (int(match[2]), int(match[3])), heads, match[6])


_KEY = re.compile(r"[0-9a-f]{64}/(?:0|[0-9a-f]{32})/[0-9a-f]{64}/([a-z0-9_.:-]+)")


class ObjectKey(str):
    """What a backend stores under: ``namespace/zone/chunk hash/part``, only ``[a-z0-9_.:/-]``."""

    __slots__ = ()

    @classmethod
    def of(cls, namespace: str, zone: str, chunk: bytes, part: Part | str) -> ObjectKey:
        """The key of one object. ``namespace`` is the digest; nothing is checked (hot path)."""
        return cls(f"{namespace}/{zone}/{chunk.hex()}/{part}")

    @classmethod
    def parse(cls, text: str) -> ObjectKey:
        """Check a key that came from outside. Raises ``ValueError``."""
        match = _KEY.fullmatch(text)
        if match is None:
            raise ValueError(f"not an object key: {text!r}")
        Part.parse(match[1])
        return cls(text)

    @property
    def namespace(self) -> str:
        """The namespace's digest, 64 hex digits."""
        return self.split("/", 1)[0]

    @property
    def zone(self) -> str:
        """``PUBLIC_ZONE`` or the 32 hex digits of a salt's zone."""
        return self.split("/", 2)[1]

    @property
    def chunk(self) -> bytes:
        """The chunk hash, 32 bytes."""
        return bytes.fromhex(self.split("/", 3)[2])

    @property
    def part(self) -> Part:
        """What the object holds of the chunk."""
        return Part.parse(self.rsplit("/", 1)[1])


class ChunkChain:
    """The names of one prompt: a hash per full chunk, and of the tails that may end it.

    ``hashes[i]`` names tokens ``[0, (i + 1) * tokens_per_chunk)`` under ``scope``. The tokens are
    copied: the caller may reuse the buffer at once. Raises ``TokensError`` as ``token_bytes``.
    """

    __slots__ = ("_bytes", "_folds", "_zones", "chunk_step", "hashes", "num_tokens", "scope",
                 "tail_step")  # fmt: skip

    def __init__(
        self, tokens: Tokens, scope: Scope, *, tokens_per_chunk: int, tokens_per_tail: int
    ) -> None:
        self._bytes = token_bytes(tokens)
        self.num_tokens = len(self._bytes) // 4
        self.scope = scope
        self.chunk_step = tokens_per_chunk
        self.tail_step = tokens_per_tail
        self._zones = scope.zones()
        self._folds: dict[int, list[tuple[int, str, bytes]]] = {}
        """First token of a chunk -> what starts in it, with positions counted in the chunk."""
        for at, kind, what in scope.extras():
            inside = at % tokens_per_chunk
            self._folds.setdefault(at - inside, []).append((inside, kind, what))
        self.hashes: list[bytes] = self._chain()

    def __len__(self) -> int:
        return len(self.hashes)

    def _chain(self) -> list[bytes]:
        nbytes, folds, digest = 4 * self.chunk_step, self._folds, sha256
        count = len(self._bytes) // nbytes
        # One call cuts the prompt: slices would cost a tenth of the hashing.
        chunks = Struct(f"{nbytes}s" * count).unpack_from(self._bytes)
        parent = b""
        hashes: list[bytes] = []
        for chunk in chunks:
            if folds and (start := len(hashes) * self.chunk_step) in folds:
                parent = _fold(parent, folds[start])
            state = digest(parent)
            state.update(chunk)
            parent = state.digest()
            hashes.append(parent)
        return hashes

    @property
    def named_tokens(self) -> int:
        """How many tokens spans can name: all but a rest shorter than the smallest tail."""
        rest = self.num_tokens - len(self.hashes) * self.chunk_step
        return self.num_tokens - rest % self.tail_step

    def parent(self, index: int) -> bytes:
        """The hash chunk ``index`` continues; empty at the start."""
        return self.hashes[index - 1] if index else b""

    def span(self, index: int) -> Span:
        """Full chunk ``index`` as a span."""
        start = index * self.chunk_step
        return Span(start, start + self.chunk_step, self.hashes[index])

    def spans(self, count: int) -> list[Span]:
        """The first ``count`` full chunks as spans."""
        step = self.chunk_step
        starts, stops = range(0, count * step, step), range(step, (count + 1) * step, step)
        return [*map(Span._make, zip(starts, stops, self.hashes, strict=False))]

    def tails(self, index: int) -> list[Span]:
        """Tails that may stand where chunk ``index`` (0 to ``len``) would, longest first.

        A tail is a multiple of ``tokens_per_tail`` tokens, shorter than a chunk: with an eighth of
        a chunk there are at most seven. One that ends before an extra starts is named without it.
        """
        start, packed = index * self.chunk_step, self._bytes
        stop_at = min(self.num_tokens, start + self.chunk_step - 1)
        parent, inside = self.parent(index), self._folds.get(start, [])
        state, done, folded = sha256(parent), start, 0
        spans: list[Span] = []
        for stop in range(start + self.tail_step, stop_at + 1, self.tail_step):
            count = sum(at < stop - start for at, _, _ in inside)
            if count > folded:
                state, done, folded = sha256(_fold(parent, inside[:count])), start, count
            state.update(packed[4 * done : 4 * stop])
            done = stop
            spans.append(Span(start, stop, state.digest()))
        spans.reverse()
        return spans

    def zone(self, span: Span) -> str:
        """Who owns the span."""
        return zone_at(self._zones, span.stop) if self._zones else PUBLIC_ZONE

    def token_bytes(self, span: Span) -> bytes:
        """The span's tokens as packed little-endian u32."""
        return self._bytes[4 * span.start : 4 * span.stop]


def _fold(parent: bytes, extras: list[tuple[int, str, bytes]]) -> bytes:
    """The parent of a chunk in which ``extras`` (position in the chunk, kind, bytes) start."""
    return sha256(b"extra" + parent + pack(extras)).digest()
