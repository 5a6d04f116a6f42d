"""A conversation is named once: what a turn packs and hashes is what is new in it."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
import torch
from xxhash import xxh3_128

from kvlayer import Scope
from kvlayer.identity.chain import ChunkChain
from kvlayer.identity.tokens import Tokens, token_bytes
from kvlayer_transformers import Session
from kvlayer_transformers.chains import Chains

CHUNK, TAIL = 16, 2


class Counted:
    """What was packed (in tokens), hashed into links and fingerprinted, since the last look."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._packed = self._links = self._prints = 0

        def packing(tokens: Tokens) -> bytes:
            packed = token_bytes(tokens)
            self._packed += len(packed) // 4
            return packed

        def hashing(data: bytes) -> Any:
            self._links += 1
            return sha256(data)

        def printing(data: bytes) -> Any:
            self._prints += 1
            return xxh3_128(data)

        patch.setattr("kvlayer.identity.chain.token_bytes", packing)
        patch.setattr("kvlayer.api.naming.token_bytes", packing)
        patch.setattr("kvlayer.identity.links.sha256", hashing)
        patch.setattr("kvlayer.identity.chain.xxh3_128", printing)

    def look(self) -> tuple[int, int, int]:
        counts = self._packed, self._links, self._prints
        self._packed = self._links = self._prints = 0
        return counts


def named(ids: list[int], scope: Scope = Scope()) -> ChunkChain:  # noqa: B008  # immutable
    return ChunkChain(ids, scope, tokens_per_chunk=CHUNK, tokens_per_tail=TAIL)


def chains() -> Chains:
    return Chains(
        lambda tokens, scope: ChunkChain(
            tokens, scope, tokens_per_chunk=CHUNK, tokens_per_tail=TAIL
        )
    )


@pytest.mark.parametrize("scope", [Scope(), Scope.private("me", owner="x")])
def test_a_turn_of_a_conversation_names_only_what_is_new(
    llama: Any,
    open_session: Callable[..., Session],
    prompt: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
    scope: Scope,
) -> None:
    session = open_session(llama, exact=False)
    counted = Counted(monkeypatch)
    ids, known = prompt(100), 0
    folds = len(scope.salts)
    for turn in range(4):
        answer = session.generate(ids, scope=scope, max_new_tokens=9, do_sample=False)
        fed = answer.sequences.shape[1] - 1  # the last token was never fed, so it is not stored
        packed, hashed, printed = counted.look()
        assert packed == fed - known
        assert hashed == fed // TAIL - known // TAIL + (0 if known else folds)
        assert printed == fed // CHUNK - known // CHUNK
        assert answer.loaded >= known // TAIL * TAIL
        ids = [*answer.sequences[0].tolist(), *prompt(20, seed=turn + 2)]
        known = fed


def test_rows_of_a_batch_find_their_own_conversation(
    llama: Any,
    open_session: Callable[..., Session],
    prompt: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = open_session(llama)
    rows = torch.tensor([prompt(40, seed=n) for n in range(5)])
    session.generate(rows, max_new_tokens=2, do_sample=False)
    counted = Counted(monkeypatch)
    session.generate(rows.flip(0), max_new_tokens=2, do_sample=False)
    assert counted.look() == (0, 0, 0)


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 199])
def test_a_prompt_that_leaves_another_is_named_for_what_it_is(at: int) -> None:
    known, ids = chains(), torch.arange(200)
    known.chain(ids, Scope())
    other = ids.clone()
    other[at] = 999
    for row in (other, ids, other[: at + 1], other, ids[:at]):
        assert known.chain(row, Scope()).links == named(row.tolist()).links


def test_ids_changed_in_place_are_named_as_they_are_now() -> None:
    known, ids = chains(), torch.arange(64)
    first = known.chain(ids, Scope()).links
    ids[3] = 7
    assert known.chain(ids, Scope()).links == named(ids.tolist()).links != first


def test_names_of_one_tenant_are_never_anothers() -> None:
    known, ids = chains(), torch.arange(64)
    for scope in (Scope.private("a"), Scope.private("b"), Scope(), Scope.private("a", owner="o")):
        chain = known.chain(ids, scope)
        assert (chain.scope, chain.links) == (scope, named(ids.tolist(), scope).links)


def test_ids_that_have_no_name_end_the_names_wherever_they_come() -> None:
    known, ids = chains(), torch.arange(64)
    ids[40] = 2**30
    assert known.chain(ids[:40], Scope()).unnamed is None
    for _ in range(2):
        assert known.chain(ids, Scope()).unnamed == 40
    assert len(known.chain(ids, Scope()).links) == 20


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    known = chains()
    for n in range(200):
        known.chain(torch.arange(n, n + 40), Scope())
    assert len(known._known) == 64
    monkeypatch.setattr("kvlayer_transformers.chains._MOST_TOKENS", 100)
    known.chain(torch.arange(500, 560), Scope())
    assert [c.num_tokens for c in known._known] == [40, 60]
    known.chain(torch.arange(1000, 1300), Scope())
    assert [c.num_tokens for c in known._known] == [300]
