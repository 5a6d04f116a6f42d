"""What distinguishes a request from others with the same tokens: salt, LoRA adapter, media."""

from __future__ import annotations

from concurrent.futures import Future
from hashlib import sha256

from kvlayer import Content, Salt, Scope
from kvlayer.abc.offload import Threads
from kvlayer.errors import IdentityError
from kvlayer.identity.weights import weights_digest
from kvlayer_vllm.engine import Request
from kvlayer_vllm.wishes import Wishes

__all__ = ["Adapters", "scope_of"]

_NONE = Wishes()


class Adapters:
    """Digests of LoRA adapters' files, made off the scheduler's thread.

    Once for each adapter as the engine numbers them: another number at the same path is another
    adapter, whose files may have been replaced since. One that is replaced in place has no digest
    any more: vLLM names its blocks by number and path, and gives those of the old files to requests
    that come after it.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[int, str], Future[bytes]] = {}
        self._replaced: set[tuple[int, str]] = set()
        self._threads = Threads(1, "kvlayer-adapters")

    def replaced(self, number: int, path: str) -> None:
        """The files of an adapter change in place, some time: it is named no more."""
        self._replaced.add((number, path))

    def start_over(self) -> None:
        """vLLM has no blocks any more that were computed with the files of an adapter."""
        self._replaced.clear()
        self._digests.clear()

    def digest(self, number: int, path: str) -> bytes | None:
        """The digest; None while it is being made. Raises ``IdentityError`` where there is none."""
        if (number, path) in self._replaced:
            raise IdentityError(
                f"the files of adapter {path} were replaced in place, and vLLM may give a request "
                "blocks that were computed with the old ones",
                hint="it is computed; a reset of vLLM's prefix cache and of connectors ends that",
            )
        making = self._digests.get((number, path))
        if making is None:
            making = self._digests[number, path] = self._threads.submit(_digest, path)
        return making.result() if making.done() else None

    def close(self) -> None:
        """Wait for nothing."""
        self._threads.end(0)


def _digest(path: str) -> bytes:
    return bytes.fromhex(weights_digest(path).removeprefix("sha256:"))


def scope_of(request: Request, adapters: Adapters, wishes: Wishes = _NONE) -> Scope | None:
    """The scope of a request; None while its adapter's digest is being made.

    Raises ``IdentityError`` for a request whose KV nothing names: a prompt given as embeddings, an
    adapter whose files cannot be read, or one that was :meth:`Adapters.replaced`.
    """
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        raise IdentityError(
            "the prompt is given as embeddings, which no token names", hint="it is computed"
        )
    adapter = b""
    lora = request.lora_request
    if lora is not None:
        found = adapters.digest(lora.lora_int_id, lora.lora_path)
        if found is None:
            return None
        adapter = found
    salts = (Salt(request.cache_salt),) if request.cache_salt else ()
    contents = tuple(
        Content(sha256(feature.identifier.encode()).digest(), feature.mm_position.offset)
        for feature in request.mm_features
    )
    return Scope(
        salts=salts,
        adapter=adapter,
        contents=contents,
        owner="vllm",
        memory_only=wishes.memory_only,
    )
