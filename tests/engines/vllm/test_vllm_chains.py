"""A request is named once: what is looked up, and what is stored of it step by step, goes on."""

from __future__ import annotations

import asyncio
from array import array
from functools import partial
from hashlib import sha256
from typing import Any, cast

import pytest

from kvlayer import KVView, Portal, Scope
from kvlayer.identity.chain import ChunkChain
from kvlayer.identity.tokens import Tokens, token_bytes
from kvlayer_vllm.device_order import NOTHING
from kvlayer_vllm.moves import Save
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
        patch.setattr("kvlayer.api.naming.token_bytes", packing)
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
async def test_a_long_prompt_is_named_in_slices(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = [n % 509 for n in range(stop)]
    ids = TokenIds(source)
    counted, turns = Counted(monkeypatch), list[int]()

    async def others() -> None:
        while True:
            turns.append(counted.look()[1])
            await asyncio.sleep(0)

    other = asyncio.ensure_future(others())
    chain = await ids.chain_in_slices(name, await ids.upto_in_slices(stop), Scope())
    other.cancel()
    turns.append(counted.look()[1])
    assert max(turns) * TAIL <= 65_536
    assert sum(turns) == stop // TAIL
    # A text that was named is not named again, however it is asked for.
    assert (await ids.chain_in_slices(name, ids.upto(stop), Scope())).links == chain.links
    assert counted.look()[1] == 0
    monkeypatch.undo()
    assert chain.links == name(source, Scope()).links


@pytest.mark.asyncio
async def test_a_store_lets_others_run_while_it_names_a_long_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody looked it up before: the whole prompt is named by its first save."""
    ids, turns = TokenIds([n % 509 for n in range(200_000)]), list[int]()
    counted = Counted(monkeypatch)

    class Stored:
        chain = staticmethod(name)

        async def store(self, chain: ChunkChain, view: object, **_: object) -> None:
            turns.append(-len(chain.links))

    class OnLoop:
        def submit(self, run: Any, *args: Any, **options: Any) -> None:
            self.work = run(Stored(), *args, **options)

    async def others() -> None:
        while True:
            turns.append(counted.look()[1])
            await asyncio.sleep(0)

    save, portal = Save("r"), OnLoop()
    naming = partial(ids.chain_in_slices, tokens=ids.upto(200_000), scope=Scope())
    save.begin(
        cast("Portal", portal), naming, cast("KVView", None), NOTHING, first_token=0, tail=True
    )
    other = asyncio.ensure_future(others())
    await portal.work
    other.cancel()
    assert min(turns) == -(200_000 // TAIL)
    assert max(turns) * TAIL <= 65_536
    assert save.is_over
