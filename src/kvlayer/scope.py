"""What distinguishes requests with the same tokens: salts, an adapter, images. Pure values.

``keys.ChunkChain`` folds them into names; ``keys`` exports them beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256

from kvlayer._values import flag, given, instance, items, text, whole
from kvlayer.errors import ConfigError, IdentityError
from kvlayer.retention import ORDINARY, Retention

__all__ = ["PUBLIC_ZONE", "Content", "Extra", "Salt", "Scope", "zone_at"]

_PRIVATE = 'pass (Salt("..."),), or use Scope.private("...")'
_QUALITIES = "pass names of qualities, ('int8-1',), or leave it out for exact KV only"
_CONTENT = "pass (Content(digest, first_token),) for each image"

PUBLIC_ZONE = "0"
"""The zone of KV no salt owns."""


@dataclass(frozen=True, slots=True)
class Salt:
    """A secret or tenant name that makes KV private from token ``first_token`` on.

    The chunk or tail in which it starts is private as a whole; everything before stays shared.
    Raises ``IdentityError`` for an empty value, one that is no valid text, or a negative start.
    """

    value: str = field(repr=False)
    first_token: int = 0

    def __post_init__(self) -> None:
        value = given(self.value)
        if not isinstance(value, str):
            raise IdentityError(
                f"a salt must be text, found a {type(value).__name__}",
                hint="a tenant's name or a secret as str; bytes as their hex digits",
            )
        if not value:
            raise IdentityError("a salt cannot be empty", hint="leave it out to share KV")
        try:
            self.value.encode()
        except UnicodeEncodeError:
            raise IdentityError(
                "a salt must be valid Unicode text, found a lone surrogate",
                hint="decode it strictly, or pass its hex digest",
            ) from None
        object.__setattr__(self, "first_token", _start("a salt", self.first_token))

    @property
    def zone(self) -> str:
        """32 hex digits naming what this salt owns. Guessable when the salt is."""
        return sha256(b"zone" + self.value.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Content:
    """Something other than a token id that shapes KV from ``first_token`` on: an image, say."""

    digest: bytes
    first_token: int

    def __post_init__(self) -> None:
        _check_digest("a content", self.digest)
        if not self.digest:
            raise IdentityError("a content's digest is empty", hint="leave the content out")
        object.__setattr__(self, "first_token", _start("a content", self.first_token))


# Callers pass what an engine gave them, types unchecked; hence ``object``.


def _check_digest(what: str, digest: object) -> None:
    if not isinstance(digest, bytes):
        raise IdentityError(
            f"{what} is named by a digest in bytes, found a {type(digest).__name__}",
            hint="a served name is not identity; pass hashlib.sha256(content).digest()",
        )


def _start(what: str, first_token: object) -> int:
    """A start that matches no chunk would leave the extra out of every name: wrong bytes."""
    return whole(f"the first token of {what}", first_token, error=IdentityError)


class Extra(Enum):
    """A kind of what folds into the names of tokens."""

    ADAPTER = "adapter"
    CONTENT = "content"
    SALT = "salt"


@dataclass(frozen=True, slots=True)
class Scope:
    """What distinguishes one request from another with the same tokens, and what it wishes.

    ``salts`` make KV private (see :class:`Salt`), the later ones inside the earlier; of two that
    start at one token the last listed is the later. ``adapter`` is the digest of a LoRA adapter's
    files. ``contents`` are extra content hashes. ``owner`` is who asks, for leases and reports;
    ``retention`` is how long what the request stores is worth keeping. ``accepts`` names qualities
    that may serve the request after exact KV, which is always accepted: by default none. With
    ``memory_only`` the request gets what lies in host memory, and no lower tier is asked or read
    for it. None of these is part of any name.
    """

    salts: tuple[Salt, ...] = ()
    adapter: bytes = b""
    contents: tuple[Content, ...] = ()
    owner: str = ""
    retention: Retention = ORDINARY
    accepts: tuple[str, ...] = ()
    memory_only: bool = False

    def __post_init__(self) -> None:
        _check_digest("an adapter", self.adapter)
        salts = items("salts", self.salts, Salt, hint=_PRIVATE, error=IdentityError)
        contents = items("contents", self.contents, Content, hint=_CONTENT, error=IdentityError)
        owner = given(self.owner)
        hint = "pass a name as text, or leave it out"
        owner = text("owner", "" if owner is None else owner, hint=hint)
        hint = "pass kvlayer.Retention(priority=1), or leave it out"
        instance("a scope's retention", self.retention, Retention, hint=hint, error=ConfigError)
        flag("memory_only", self.memory_only)
        accepts = items("accepts", self.accepts, str, hint=_QUALITIES, error=IdentityError)
        accepts = tuple(dict.fromkeys(name for name in accepts if name != "exact"))
        checked = (("salts", salts), ("contents", contents), ("owner", owner))
        for name, value in (*checked, ("accepts", accepts)):
            object.__setattr__(self, name, value)

    @classmethod
    def private(
        cls,
        salt: str,
        *,
        first_token: int = 0,
        owner: str = "",
        retention: Retention = ORDINARY,
        accepts: tuple[str, ...] = (),
    ) -> Scope:
        """The scope of one tenant or session."""
        salts = (Salt(salt, first_token),)
        return cls(salts=salts, owner=owner, retention=retention, accepts=accepts)

    def extras(self) -> list[tuple[Extra, int, bytes]]:
        """What folds into the chain, as (kind, first token, bytes): adapter, contents, salts.

        Contents are sorted, so the order in which they are listed names nothing. Salts keep theirs,
        because the last one owns: the links then say whose a span is.
        """
        found = [(Extra.ADAPTER, 0, self.adapter)] if self.adapter else []
        contents = sorted((c.first_token, c.digest) for c in self.contents)
        found += [(Extra.CONTENT, first, digest) for first, digest in contents]
        found += [(Extra.SALT, s.first_token, s.value.encode()) for s in self._salts_in_order()]
        return found

    def zones(self) -> list[tuple[int, str]]:
        """The salts' (first token, zone), earliest first."""
        return [(s.first_token, s.zone) for s in self._salts_in_order()]

    def _salts_in_order(self) -> list[Salt]:
        return sorted(self.salts, key=lambda s: s.first_token)  # stable: ties keep their order

    def zone(self, stop: int) -> str:
        """The zone of a span that ends before token ``stop``."""
        return zone_at(self.zones(), stop)


def zone_at(zones: list[tuple[int, str]], stop: int) -> str:
    """The last of ``zones`` (see ``Scope.zones``) that starts before token ``stop``."""
    return next((zone for first, zone in reversed(zones) if first < stop), PUBLIC_ZONE)
