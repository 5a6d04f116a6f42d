"""A request is named once: what is looked up, and what is stored of it step by step, goes on."""

from __future__ import annotations

from array import array
from hashlib import sha256
from typing import Any

import pytest

from kvlayer import Scope
from kvlayer.identity.chain import ChunkChain
from kvlayer.identity.tokens import Tokens, token_bytes
from kvlayer_vllm.token_ids import TokenIds

CHUNK, TAIL = 64, 32
PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens


class Counted:
    """What was packed (in tokens) and hashed into links since the last look."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._packed = self._links = 0

        def packing(tokens: Tokens) -> bytes:
            packed = token_bytes(tokens)
            self._packed += len(packed) // 4
            return packed

        def hashing(data: bytes) -> Any:
            self._links += 1
            return sha256(data)

        patch.setattr("kvlayer.identity.chain.token_bytes", packing)
        patch.setattr("kvlayer.api.cache.token_bytes", packing)
        patch.setattr("kvlayer.identity.links.sha256", hashing)

    def look(self) -> tuple[int, int]:
        counts = self._packed, self._links
        self._packed = self._links = 0
        return counts


def name(tokens: Tokens, scope: Scope) -> ChunkChain:
    return ChunkChain(tokens, scope, tokens_per_chunk=CHUNK, tokens_per_tail=TAIL)


def test_a_request_is_packed_and_hashed_once(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up, stored when its prompt is computed, chunk by chunk while it is answered."""
    at = desk()
    counted = Counted(monkeypatch)
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, range(1, 12))
    assert counted.look() == (200, 6)
    at.run({request: 200})
    assert counted.look() == (0, 0)
    for _ in range(130):
        request.append_output_token_ids(11)
        at.run({request: 1})
    at.finish(request)
    at.rest()
    packed, hashed = counted.look()
    assert (packed, hashed) == (320 - 200, 10 - 6)  # 330 tokens; ten that no tail takes
    monkeypatch.undo()
    assert at.found([*PROMPT, *[11] * 130]) == 320


def test_a_preempted_request_keeps_its_names_and_stores_them_again(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk()
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, range(1, 8))
    at.run({request: 200})
    counted = Counted(monkeypatch)
    at.preempt(request)
    at.accept(at.begin(preempted=[request]))
    at.admit(request, range(11, 18))
    at.run({request: request.num_tokens - request.num_computed_tokens})
    at.finish(request)
    at.rest()
    assert counted.look() == (0, 0)
    monkeypatch.undo()
    assert at.found(PROMPT) == 192


@pytest.mark.parametrize("at", [0, 70, 199])
def test_a_text_that_was_changed_is_never_named_as_it_was(at: int) -> None:
    """vLLM's sessions cut what they had and go on otherwise; they are not shared, but who knows."""
    ids, scope = TokenIds(PROMPT), Scope()
    ids.chain(name, ids.upto(200), scope)
    other = array("i", PROMPT)
    other[at] = 999
    for tokens in (other, array("i", PROMPT), other[: at + 1], other):
        assert ids.chain(name, tokens, scope).links == name(tokens, scope).links


def test_a_source_that_was_cut_is_converted_anew() -> None:
    source = list(PROMPT)
    ids = TokenIds(source)
    assert ids.upto(200) == array("i", PROMPT)
    del source[100:]
    assert ids.upto(200) == array("i", PROMPT[:100])
    source += [9] * 50
    assert ids.upto(200) == array("i", source)


def test_names_under_one_scope_are_never_taken_for_another() -> None:
    ids = TokenIds(PROMPT)
    for scope in (Scope.private("a"), Scope.private("b"), Scope(), Scope(adapter=b"x" * 32)):
        tokens = ids.upto(200)
        assert ids.chain(name, tokens, scope).links == name(tokens, scope).links


@pytest.mark.asyncio
@pytest.mark.parametrize("stop", [0, 1, 65_536, 65_537, 200_000])
async def test_a_long_prompt_is_named_in_slices(stop: int) -> None:
    source = [n % 509 for n in range(stop)]
    ids = TokenIds(source)
    at_once: list[int] = []

    def naming(tokens: Tokens, scope: Scope) -> ChunkChain:
        at_once.append(len(tokens))
        return name(tokens, scope)

    chain = await ids.chain_in_slices(naming, stop, Scope())
    assert chain.links == name(source, Scope()).links
    assert max(at_once, default=0) <= 65_536
