"""Names of objects: which bytes of which tokens. Pure; imports no tensor library.

``chain.ChunkChain`` makes the hashes of a prompt; this module makes them into keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from kvlayer.errors import LayoutError
from kvlayer.identity.chain import ChunkChain, Span
from kvlayer.identity.tokens import Tokens, TokenSource, token_bytes, token_source
from kvlayer.scope import PUBLIC_ZONE, Content, Salt, Scope

__all__ = [
    "PUBLIC_ZONE",
    "RAW",
    "ChunkChain",
    "Content",
    "Encoding",
    "ObjectKey",
    "ObjectName",
    "Part",
    "Salt",
    "Scope",
    "Span",
    "TokenSource",
    "Tokens",
    "token_bytes",
    "token_source",
]


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


_KEY = re.compile(r"[0-9a-f]{64}/(?:0|[0-9a-f]{32})/[0-9a-f]{64}-([1-9][0-9]{0,8})/([a-z0-9_.:-]+)")


class ObjectKey(str):
    """Names an object: ``namespace/zone/end hash-tokens/part``, only ``[a-z0-9_.:/-]``.

    Whether, where and how its bytes are encoded is not in it.
    """

    __slots__ = ()

    @classmethod
    def of(
        cls, namespace: str, zone: str, end_hash: bytes, tokens: int, part: Part | str
    ) -> ObjectKey:
        """The key of one object. ``namespace`` is the digest; nothing is checked (hot path)."""
        return cls(f"{namespace}/{zone}/{end_hash.hex()}-{tokens}/{part}")

    @classmethod
    def parse(cls, text: str) -> ObjectKey:
        """Check a key that came from outside. Raises ``ValueError``."""
        match = _KEY.fullmatch(text)
        if match is None:
            raise ValueError(f"not an object key: {text!r}")
        Part.parse(match[2])
        return cls(text)

    def fields(self) -> tuple[str, str, bytes, int, Part]:
        """Namespace, zone, end hash, tokens, part: at the price of one. Raises ``ValueError``."""
        namespace, zone, name, part = self.split("/")
        return namespace, zone, bytes.fromhex(name[:64]), int(name[65:]), Part.parse(part)

    @property
    def namespace(self) -> str:
        """The namespace's digest, 64 hex digits."""
        return self.split("/", 1)[0]

    @property
    def zone(self) -> str:
        """``PUBLIC_ZONE`` or the 32 hex digits of a salt's zone."""
        return self.split("/", 2)[1]

    @property
    def end_hash(self) -> bytes:
        """The link at the end of its tokens, 32 bytes: names them and all that precedes them."""
        return bytes.fromhex(self.split("/", 3)[2][:64])

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return int(self.split("/", 3)[2][65:])

    @property
    def part(self) -> Part:
        """What the object holds of those tokens."""
        return Part.parse(self.rsplit("/", 1)[1])


_ENCODING = re.compile(
    r"([1-9][0-9]{0,3})\.([a-z0-9][a-z0-9_-]{0,31})(?:\.([a-z0-9][a-z0-9_-]{0,31}))?"
)


class Encoding(NamedTuple):
    """How an object's bytes lie on a tier: as text ``2.raw``, or ``2.zstd-1.aes``.

    The frame's version, the lossless codec of its segments, and the seal around those if any.
    """

    frame: int
    codec: str
    seal: str = ""

    def __str__(self) -> str:
        return ".".join(map(str, filter(None, self)))

    @classmethod
    def parse(cls, text: str) -> Encoding:
        """Inverse of ``str``. Raises ``ValueError`` for anything ``str`` cannot produce."""
        match = _ENCODING.fullmatch(text)
        if match is None:
            raise ValueError(f"not an encoding: {text!r}")
        return cls(int(match[1]), match[2], match[3] or "")


RAW = Encoding(2, "raw")
"""The payload as it lies in host memory."""
_RAW_TEXT = str(RAW)


class ObjectName(ObjectKey):
    """What a tier stores an object under: ``key/encoding``, the encoding last.

    To a backend it is a key like any other; the directory has the key alone. A name's bytes never
    change: an object is coded anew by putting it under the new name and deleting the old.
    """

    __slots__ = ()

    @classmethod
    def made(cls, key: ObjectKey, encoding: Encoding) -> ObjectName:
        """The name of one object; nothing is checked (hot path)."""
        return cls(f"{key}/{encoding}")

    @classmethod
    def raw(cls, key: ObjectKey) -> ObjectName:
        """Its name where it is stored as it lies in host memory."""
        return cls(f"{key}/{_RAW_TEXT}")

    @classmethod
    def parse(cls, text: str) -> ObjectName:
        """Check a name that came from outside. Raises ``ValueError``."""
        key, _, encoding = text.rpartition("/")
        ObjectKey.parse(key)
        Encoding.parse(encoding)
        return cls(text)

    @property
    def key(self) -> ObjectKey:
        """Which object it is."""
        return ObjectKey(self.rpartition("/")[0])

    @property
    def encoding(self) -> Encoding:
        """How its bytes lie."""
        return Encoding.parse(self.rpartition("/")[2])

    @property
    def part(self) -> Part:
        """What the object holds of its tokens."""
        return self.key.part
