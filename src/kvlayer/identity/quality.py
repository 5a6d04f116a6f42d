"""Qualities: exact KV, and approximations of it. Each has a namespace of its own. Pure."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from kvlayer.errors import IdentityError
from kvlayer.identity.namespace import Namespace

__all__ = ["EXACT", "Accepted", "accepted", "of_quality"]

EXACT = "exact"


class Accepted(NamedTuple):
    """A quality that a request accepts beside exact KV, and the namespace it lies in.

    It serves nothing before ``first_token``: that is exact.
    """

    quality: str
    namespace: str
    first_token: int = 0


def accepted(namespace: Namespace, qualities: tuple[str, ...]) -> tuple[Accepted, ...]:
    """What a request accepts, by names. Raises ``IdentityError`` as :func:`of_quality`."""
    return tuple([Accepted(name, of_quality(namespace, name)) for name in qualities])


@lru_cache(maxsize=256)
def of_quality(namespace: Namespace, quality: str) -> str:
    """The digest of the namespace in which a quality of exact KV lies.

    Raises ``IdentityError`` for what is no name, and where the namespace is not of exact KV:
    computed after another approximation, KV would be of neither.
    """
    if namespace.quality not in (EXACT, quality):
        raise IdentityError(
            f"this KV is {namespace.quality!r} itself, and cannot be mixed with {quality!r}",
            hint="open the cache for exact KV, and say with each request what it accepts",
        )
    return replace(namespace, quality=quality).digest
