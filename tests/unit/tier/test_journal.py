"""The journal: what it remembers is right, and it never remembers more than it may."""

from __future__ import annotations

from array import array
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvlayer.identity.keys import ChunkChain, Salt, Scope, Span
from kvlayer.results import Cause
from kvlayer.tier.planner.journal import Journal, Loss

CHUNK, TAIL = 8, 2


def chain(tokens: list[int], scope: Scope | None = None) -> ChunkChain:
    return ChunkChain(
        array("i", tokens), scope or Scope(), tokens_per_chunk=CHUNK, tokens_per_tail=TAIL
    )


ANYBODY = chain(list(range(16)))
"""Asks without an owner or a salt."""


def spans(prompt: ChunkChain) -> list[Span]:
    return [prompt.span(i) for i in range(len(prompt))]


def loss(detail: str = "gone") -> Loss:
    return Loss(Cause.EVICTED, "host", 1.0, detail)


def test_the_last_loss_of_a_chunk_is_remembered_until_it_is_stored_again() -> None:
    journal, prompt = Journal(), chain(list(range(8)))
    journal.lost("", prompt.hashes[0], CHUNK, loss("first"))
    journal.lost("", prompt.hashes[0], CHUNK, loss("second"))
    found = journal.loss(prompt, prompt.span(0))
    assert found is not None
    assert found.detail == "second"
    journal.stored(prompt, spans(prompt))
    assert journal.loss(prompt, prompt.span(0)) is None


@given(limit=st.integers(1, 40), count=st.integers(0, 120))
def test_no_map_grows_beyond_its_limit(limit: int, count: int) -> None:
    journal = Journal(limit)
    for n in range(count):
        prompt = chain([n] * 16)
        journal.lost("", prompt.hashes[0], CHUNK, loss(str(n)))
        journal.stored(prompt, spans(prompt))
        journal.lost("", prompt.hashes[1], CHUNK, loss(str(n)))
    assert len(journal._losses._entries) <= limit
    assert len(journal._unscoped._entries) <= limit
    assert len(journal._children._entries) <= max(limit // 16, 1)
    if count:
        last = chain([count - 1] * 16)
        assert journal.loss(last, last.span(1)) is not None  # the newest stays


def test_the_oldest_entry_goes_first_and_a_renewed_one_stays() -> None:
    journal = Journal(2)
    a, b, c = (Span(0, 8, name) for name in (b"a", b"b", b"c"))
    for span in (a, b, a, c):
        journal.lost("", span.hash, span.tokens, loss())
    assert journal.loss(ANYBODY, b) is None
    assert journal.loss(ANYBODY, a) is not None


def test_two_spans_that_end_alike_are_lost_one_by_one() -> None:
    journal = Journal()
    journal.lost("", b"a", 8, loss())
    assert journal.loss(ANYBODY, Span(0, 8, b"a")) is not None
    assert journal.loss(ANYBODY, Span(4, 8, b"a")) is None


@given(common=st.integers(0, 7), index=st.integers(0, 2))
def test_divergence_is_the_first_token_that_differs(common: int, index: int) -> None:
    first = list(range(24))
    at = index * CHUNK + common
    second = [*first[:at], 999, *first[at + 1 :]]
    journal = Journal()
    one, two = chain(first), chain(second)
    journal.stored(one, spans(one))
    assert journal.divergence(two, index * CHUNK) == at
    assert journal.divergence(one, index * CHUNK) is None


def test_a_prompt_that_ends_inside_a_chunk_diverges_nowhere() -> None:
    journal, stored = Journal(), chain(list(range(16)))
    journal.stored(stored, spans(stored))
    assert journal.divergence(chain(list(range(12))), 8) is None
    assert journal.divergence(chain([*range(11), 99]), 8) == 11


def test_nothing_is_known_of_what_follows_an_unknown_chunk() -> None:
    assert Journal().divergence(chain(list(range(16))), 8) is None


def test_the_same_tokens_under_fewer_salts_are_found_and_the_secret_is_not_told() -> None:
    name = "tenant name"
    plain = chain(list(range(8)))
    outer = chain(list(range(8)), Scope(salts=(Salt(name),)))
    inner = chain(list(range(8)), Scope(salts=(Salt(name), Salt("session"))))
    journal = Journal()
    journal.stored(outer, spans(outer))
    words = journal.elsewhere(inner, 0)
    assert words is not None
    assert "salt of zone" in words
    assert name not in words
    assert journal.elsewhere(outer, 0) is None  # it is the same one
    assert journal.elsewhere(plain, 0) is None  # it has not the salt
    assert journal.elsewhere(chain(list(range(1, 9)), inner.scope), 0) is None
    assert journal.elsewhere(chain([]), 0) is None
    owned = chain(list(range(8)), Scope(salts=inner.scope.salts, owner="bob"))
    assert journal.elsewhere(owned, 0) is None


def test_what_nobody_is_known_to_have_stored_is_told_to_who_holds_its_salt() -> None:
    journal, scope = Journal(), Scope(salts=(Salt("s"),))
    for prompt in (chain(list(range(8))), chain(list(range(8)), scope)):
        journal.lost("", prompt.hashes[0], CHUNK, loss())
        for owner in ("", "bob"):
            asked = chain(list(range(8)), replace(prompt.scope, owner=owner))
            is_told = not owner or bool(prompt.scope.salts)
            assert (journal.loss(asked, asked.span(0)) is not None) is is_told


def test_a_store_without_scope_is_found_from_a_salted_lookup() -> None:
    plain = chain(list(range(8)))
    salted = chain(list(range(8)), Scope(salts=(Salt("s"),)))
    journal = Journal()
    journal.stored(plain, spans(plain))
    assert journal.elsewhere(salted, 0) == "no salt, adapter or content"


def test_a_stored_tail_is_what_followed_its_parent() -> None:
    prompt = chain(list(range(12)), Scope(salts=(Salt("s"),)))
    tail = prompt.tails(1)[0]
    journal = Journal()
    journal.stored(prompt, [prompt.span(0), tail])
    assert journal.divergence(chain([*range(9), 99, 99, 99]), 8) is None  # another parent


def test_a_span_of_any_number_of_owners_costs_each_of_them_the_same() -> None:
    """A system prompt is everybody's: who has stored it is remembered in as many entries."""
    limit = 64
    journal = Journal(limit)
    for number in range(10 * limit):
        prompt = chain(list(range(8)), Scope(owner=f"owner {number}"))
        journal.stored(prompt, [], spans(prompt))
        assert journal.is_own(prompt, prompt.span(0))
    assert len(journal._owners) == limit
    latest, first = (chain(list(range(8)), Scope(owner=f"owner {n}")) for n in (10 * limit - 1, 0))
    assert journal.is_own(latest, latest.span(0))
    assert not journal.is_own(first, first.span(0))  # forgotten; told too little, never too much
    stranger = chain(list(range(8)), Scope(owner="stranger"))
    assert not journal.is_own(stranger, stranger.span(0))
