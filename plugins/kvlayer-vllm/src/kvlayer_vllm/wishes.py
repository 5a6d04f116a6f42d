"""What a request asks of connectors, by the names of vLLM's own: in its ``kv_transfer_params``.

========================  ========================================================================
``max_load_tokens``       at most so many tokens are loaded, beyond those that vLLM has itself
``max_offload_tokens``    nothing beyond the first so many tokens is stored
``kv_load_tiers``         where KV may be loaded from beside host memory, which always counts:
                          ``[{"medium": "STORAGE"}]``; ``[]`` is nowhere else
========================  ========================================================================

As with vLLM's own connectors, what is wrong is ignored, with a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from kvlayer_vllm.engine import Request

__all__ = ["Wishes"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it

_MEDIA = ("CPU", "STORAGE")
_LOCALITIES = ("LOCAL", "REMOTE")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What one request asks for; by default no bound and every tier."""

    most_loaded: int | None = None
    """Tokens beyond those that the engine has itself."""
    most_stored: int | None = None
    """Tokens from the prompt's start."""
    memory_only: bool = False
    """Lower tiers are left alone."""

    @classmethod
    def of(cls, request: Request) -> Wishes:
        """Read a request's parameters. Never raises."""
        given = _fields(request.kv_transfer_params)
        if not given:
            return cls()
        name = str(request.request_id)
        return cls(
            most_loaded=_bound(name, given, "max_load_tokens"),
            most_stored=_bound(name, given, "max_offload_tokens"),
            memory_only=_is_memory_only(name, given.get("kv_load_tiers")),
        )


def _bound(name: str, given: Mapping[str, Any], key: str) -> int | None:
    value = given.get(key)
    if value is None or (type(value) is int and value >= 0):
        return value
    _ignored(name, f"{key} must be a whole number of tokens, 0 or more", value)
    return None


def _is_memory_only(name: str, tiers: Any) -> bool:
    """Whether no entry takes a lower tier in, which is STORAGE at an unnamed place."""
    if tiers is None:
        return False
    entries = cast("Sequence[Any]", tiers) if isinstance(tiers, list) else None
    if entries is None:
        _ignored(name, "kv_load_tiers must be a list of objects", tiers)
        return False
    media: list[str | None] = []
    for each in entries:
        fields = _fields(each)
        if fields is not None and _is_matcher(fields):
            media.append(_word(fields, "medium"))
        else:
            expected = 'an entry of kv_load_tiers must be like {"medium": "STORAGE"}'
            _ignored(name, f"{expected} (or CPU; locality LOCAL or REMOTE)", each)
    if entries and not media:
        return False  # nothing in it was meant for anybody
    return not any(medium in (None, "STORAGE") for medium in media)


def _is_matcher(entry: Mapping[str, Any]) -> bool:
    is_medium = _word(entry, "medium") in (None, *_MEDIA)
    return is_medium and _word(entry, "locality") in (None, *_LOCALITIES)


def _word(entry: Mapping[str, Any], key: str) -> str | None:
    value = entry.get(key)
    return None if value is None else str(value).upper()


def _fields(given: Any) -> Mapping[str, Any] | None:
    """None for what has no fields."""
    return cast("Mapping[str, Any]", given) if isinstance(given, Mapping) else None


def _ignored(name: str, expected: str, found: Any) -> None:
    _log.warning("request %s: %s, found %.100r; ignored", name, expected, found)
