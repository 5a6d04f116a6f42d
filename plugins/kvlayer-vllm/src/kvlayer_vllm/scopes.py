"""What tells a request from others with the same tokens: salt, LoRA adapter, media, embeddings."""

from __future__ import annotations

from concurrent.futures import Future
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

import torch

from kvlayer import Content, Salt, Scope
from kvlayer.abc.offload import Threads
from kvlayer.errors import IdentityError
from kvlayer.identity.weights import weights_digest
from kvlayer_vllm.engine import Request
from kvlayer_vllm.wishes import Wishes

__all__ = ["Digests", "scope_of"]

_NONE = Wishes()
_ROWS = 32  # of embeddings, by one digest: prompts share what they have in common in steps of it


class Digests:
    """Digests of what is long to read, made off the scheduler's thread: files of LoRA adapters, and
    embeddings that are given for a prompt.

    Once for each adapter as the engine numbers them: another number at the same path is another
    adapter, whose files may have been replaced since. One that is replaced in place has no digest
    any more: vLLM names its blocks by number and path, and gives those of the old files to requests
    that come after it.
    """

    def __init__(self) -> None:
        self._adapters: dict[tuple[int, str], Future[bytes]] = {}
        self._replaced: set[tuple[int, str]] = set()
        self._embeddings: WeakKeyDictionary[Any, Future[tuple[Content, ...]]] = WeakKeyDictionary()
        self._threads = Threads(1, "kvlayer-digests")

    def replaced(self, number: int, path: str) -> None:
        """The files of an adapter change in place, some time: it is named no more."""
        self._replaced.add((number, path))

    def start_over(self) -> None:
        """vLLM has no blocks any more that were computed with the files of an adapter."""
        self._replaced.clear()
        self._adapters.clear()

    def adapter(self, number: int, path: str) -> bytes | None:
        """The digest; None while it is being made. Raises ``IdentityError`` where there is none."""
        if (number, path) in self._replaced:
            raise IdentityError(
                f"the files of adapter {path} were replaced in place, and vLLM may give a request "
                "blocks that were computed with the old ones",
                hint="it is computed; a reset of vLLM's prefix cache and of connectors ends that",
            )
        making = self._adapters.get((number, path))
        if making is None:
            making = self._adapters[number, path] = self._threads.submit(_adapter, path)
        return making.result() if making.done() else None

    def embeddings(self, request: Request) -> tuple[Content, ...] | None:
        """Names of the rows that a request gives in place of tokens; None while they are made."""
        making = self._embeddings.get(request)
        if making is None:
            given = request.prompt_embeds, request.prompt_is_token_ids
            making = self._embeddings[request] = self._threads.submit(_embeddings, *given)
        return making.result() if making.done() else None

    def close(self) -> None:
        """Wait for nothing."""
        self._threads.end(0)


def _adapter(path: str) -> bytes:
    return bytes.fromhex(weights_digest(path).removeprefix("sha256:"))


def _embeddings(rows: Any, is_token: list[bool] | None) -> tuple[Content, ...]:
    """For each few rows a digest of their bytes, and of which of them stand for tokens instead."""
    found: list[Content] = []
    for first in range(0, len(rows), _ROWS):
        some = rows[first : first + _ROWS].detach().cpu().contiguous()
        tokens = None if is_token is None else is_token[first : first + _ROWS]
        named = sha256(f"{some.dtype} {tuple(some.shape)} {tokens}\n".encode())
        named.update(some.flatten().view(torch.uint8).numpy())
        found.append(Content(named.digest(), first))
    return tuple(found)


def scope_of(request: Request, digests: Digests, wishes: Wishes = _NONE) -> Scope | None:
    """The scope of a request; None while a digest of it is being made.

    Raises ``IdentityError`` for a request whose KV nothing names: an adapter whose files cannot be
    read, or one that was :meth:`Digests.replaced`.
    """
    adapter = b""
    lora = request.lora_request
    if lora is not None:
        found = digests.adapter(lora.lora_int_id, lora.lora_path)
        if found is None:
            return None
        adapter = found
    salts = (Salt(request.cache_salt),) if request.cache_salt else ()
    contents = tuple(
        Content(sha256(feature.identifier.encode()).digest(), feature.mm_position.offset)
        for feature in request.mm_features
    )
    if request.prompt_embeds is not None:
        rows = digests.embeddings(request)
        if rows is None:
            return None
        contents += rows
    return Scope(
        salts=salts,
        adapter=adapter,
        contents=contents,
        owner="vllm",
        memory_only=wishes.memory_only,
    )
