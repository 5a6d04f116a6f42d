"""Names of prompts: the same content has one name, other content never has it."""

from __future__ import annotations

import itertools
import re
import struct
from array import array
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer._steps import finish
from kvlayer.errors import ArgumentError, IdentityError, TokensError
from kvlayer.identity import links
from kvlayer.identity.chain import ChunkChain, Span
from kvlayer.identity.tokens import MAX_NAMED, token_bytes
from kvlayer.scope import PUBLIC_ZONE, Content, Salt, Scope

CHUNK, TAIL = 8, 2
MAX = 60

tokens_lists = st.lists(st.integers(0, MAX_NAMED), max_size=MAX)
positions = st.integers(0, MAX + CHUNK)
salts = st.builds(Salt, st.text("abc", min_size=1, max_size=3), positions)
contents = st.builds(Content, st.binary(min_size=1, max_size=4), positions)
scopes = st.builds(
    Scope,
    salts=st.lists(salts, max_size=3).map(tuple),
    adapter=st.binary(max_size=2),
    contents=st.lists(contents, max_size=3).map(tuple),
)


def chain_of(tokens: Any, scope: Scope = Scope(), *, chunk: int = CHUNK) -> ChunkChain:  # noqa: B008
    return ChunkChain(tokens, scope, tokens_per_chunk=chunk, tokens_per_tail=TAIL)


def names(tokens: Any, scope: Scope = Scope()) -> dict[tuple[int, int], tuple[bytes, str]]:  # noqa: B008
    """(start, stop) -> (hash, zone), for every span that may be stored."""
    chain = chain_of(tokens, scope)
    spans = [span for start in range(0, len(tokens) + 1, TAIL) for span in chain.ends(start)]
    return {(span.start, span.stop): (span.hash, chain.zone(span)) for span in spans}


def assert_changes_from(
    token: int,
    before: dict[tuple[int, int], tuple[bytes, str]],
    after: dict[tuple[int, int], tuple[bytes, str]],
) -> None:
    """Exactly the names of spans that end after ``token`` differ."""
    assert before.keys() == after.keys()
    hashes = {span: name[0] for span, name in before.items()}
    changed = {span for span in after if after[span][0] != hashes[span]}
    assert changed == {span for span in before if span[1] > token}


# ---- Chains ----


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes)
def test_the_same_tokens_and_scope_have_the_same_names(tokens: list[int], scope: Scope) -> None:
    assert names(tokens, scope) == names(np.array(tokens, np.int64), scope)


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes)
def test_spans_of_a_prompt_share_a_hash_only_where_they_end_together(
    tokens: list[int], scope: Scope
) -> None:
    found = names(tokens, scope)
    ends: dict[bytes, int] = {}
    for (_, stop), (name, _) in found.items():
        assert ends.setdefault(name, stop) == stop
    assert len(ends) == len(tokens) // TAIL


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists.filter(bool), scopes, st.data())
def test_another_token_changes_the_names_of_the_spans_that_end_after_it_and_no_others(
    tokens: list[int], scope: Scope, data: Any
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[at] ^= data.draw(st.integers(1, MAX_NAMED))
    assert_changes_from(at, names(tokens, scope), names(other, scope))


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes, st.integers(0, MAX))
def test_a_prefix_keeps_its_names_when_the_prompt_goes_on(
    tokens: list[int], scope: Scope, cut: int
) -> None:
    whole = names(tokens, scope)
    for span, name in names(tokens[:cut], scope).items():
        assert whole[span] == name


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes, st.binary(min_size=3, max_size=4))
def test_an_adapter_changes_every_name(tokens: list[int], scope: Scope, adapter: bytes) -> None:
    other = Scope(salts=scope.salts, adapter=adapter, contents=scope.contents)
    assert_changes_from(0, names(tokens, scope), names(tokens, other))


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes, st.binary(min_size=5, max_size=6), positions)
def test_a_content_changes_the_names_of_the_spans_that_reach_into_it_and_no_others(
    tokens: list[int], scope: Scope, digest: bytes, at: int
) -> None:
    more = (*scope.contents, Content(digest, at))
    other = Scope(salts=scope.salts, adapter=scope.adapter, contents=more)
    assert_changes_from(at, names(tokens, scope), names(tokens, other))


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes, positions)
def test_a_salt_changes_the_names_of_the_spans_that_reach_into_it_and_no_others(
    tokens: list[int], scope: Scope, at: int
) -> None:
    more = (*scope.salts, Salt("another", at))
    other = Scope(salts=more, adapter=scope.adapter, contents=scope.contents)
    assert_changes_from(at, names(tokens, scope), names(tokens, other))


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes, contents, st.integers(1, 2**20))
def test_an_extra_is_named_by_where_it_starts(
    tokens: list[int], scope: Scope, content: Content, step: int
) -> None:
    moved = Content(content.digest, content.first_token + step)
    here, there = (
        Scope(salts=scope.salts, adapter=scope.adapter, contents=(only,))
        for only in (content, moved)
    )
    assert_changes_from(content.first_token, names(tokens, here), names(tokens, there))


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes)
def test_the_order_in_which_contents_are_listed_names_nothing(
    tokens: list[int], scope: Scope
) -> None:
    other = Scope(salts=scope.salts, adapter=scope.adapter, contents=scope.contents[::-1])
    assert names(tokens, scope) == names(tokens, other)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.integers(0, MAX_NAMED), min_size=TAIL, max_size=MAX))
def test_a_salt_an_adapter_and_a_content_of_the_same_bytes_are_three_things(
    tokens: list[int],
) -> None:
    variants = [
        Scope(),
        Scope(adapter=b"x"),
        Scope(salts=(Salt("x"),)),
        Scope(contents=(Content(b"x", 0),)),
    ]
    assert len({chain_of(tokens, scope).tails(0)[-1].hash for scope in variants}) == len(variants)


def test_the_owner_is_part_of_no_name() -> None:
    tokens = list(range(30))
    assert names(tokens, Scope(owner="me")) == names(tokens, Scope(owner="you"))


def test_a_chain_keeps_its_names_when_the_caller_reuses_the_buffer() -> None:
    tokens = np.arange(30, dtype=np.int32)
    chain = chain_of(tokens)
    tails, copied = chain.tails(3), chain.token_bytes(Span(0, 2, b""))
    tokens[:] = 0
    assert chain.tails(3) == tails
    assert chain.token_bytes(Span(0, 2, b"")) == copied


def test_a_chain_leaves_the_callers_array_free_to_grow() -> None:
    tokens = array("I", range(30))
    chain = chain_of(tokens)
    tokens.append(30)  # BufferError while somebody holds a view of it
    assert chain.num_tokens == 30


def test_a_chain_tells_its_parents_spans_and_bytes() -> None:
    chain = chain_of(range_ := [*range(20)])
    assert len(chain) == 2
    assert chain.num_tokens == 20
    assert chain.parent(0) == b""
    assert chain.parent(16) == chain.hashes[1]
    assert chain.parent(10) == chain.links[4]
    assert chain.span(1) == Span(8, 16, chain.hashes[1], chain.hashes[0])
    assert chain.span(1).tokens == 8
    assert chain.token_bytes(chain.span(1)) == np.array(range_[8:16], "<u4").tobytes()


def test_chunks_only_group_links() -> None:
    tokens = [*range(32)]
    small, large = chain_of(tokens, chunk=8), chain_of(tokens, chunk=16)
    assert large.links == small.links
    assert large.hashes == small.hashes[1::2]


def test_links_of_another_size_share_nothing() -> None:
    tokens = [*range(64)]
    found = [
        ChunkChain(tokens, Scope(), tokens_per_chunk=64, tokens_per_tail=size).links
        for size in (1, 2, 4, 8, 16, 32, 64)
    ]
    whole = [link for chain in found for link in chain]
    assert len(set(whole)) == len(whole)


def test_names_end_before_an_id_that_text_could_spell() -> None:
    for at, bad in itertools.product(range(20), (MAX_NAMED + 1, 2**31, 2**32 - 1)):
        tokens = [*range(20)]
        tokens[at] = bad
        chain = chain_of(tokens)
        assert chain.unnamed == at
        assert chain.links == chain_of(range_array(20)).links[: at // TAIL]
        assert chain.named_tokens == at // TAIL * TAIL
        assert chain.num_tokens == 20
        assert chain.grown([1] * 8).links == chain.links
        assert chain.until(at).unnamed is None
        assert chain.until(at + 1).unnamed == at
        assert chain_of(tokens[:at]).grown(tokens[at:]).links == chain.links
        assert chain_of(tokens[:at]).grown(tokens[at:]).unnamed == at
    assert chain_of([MAX_NAMED] * 4).unnamed is None


# ---- Tails ----


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes)
def test_tails_are_whole_steps_shorter_than_a_chunk_longest_first(
    tokens: list[int], scope: Scope
) -> None:
    chain = chain_of(tokens, scope)
    for index in range(len(chain) + 1):
        sizes = [tail.tokens for tail in chain.tails(index)]
        room = min(len(tokens) - index * CHUNK, CHUNK - 1)
        assert sizes == list(range(TAIL, room + 1, TAIL))[::-1]
        assert all(tail.start == index * CHUNK for tail in chain.tails(index))


def test_after_a_short_span_the_next_runs_to_the_next_multiple_of_a_chunk() -> None:
    chain = chain_of([*range(30)])
    for start, stops in {0: [8, 6, 4, 2], 2: [8, 6, 4], 14: [16], 24: [30, 28, 26], 30: []}.items():
        assert [span.stop for span in chain.ends(start)] == stops
        assert all(span.hash == chain.links[span.stop // TAIL - 1] for span in chain.ends(start))


def test_with_an_eighth_of_a_chunk_there_are_at_most_seven_tails() -> None:
    chain = ChunkChain(range_array(1000), Scope(), tokens_per_chunk=256, tokens_per_tail=32)
    assert len(chain.tails(0)) == 7


def test_a_tail_as_long_as_a_chunk_is_no_tail() -> None:
    chain = ChunkChain(range_array(1000), Scope(), tokens_per_chunk=256, tokens_per_tail=256)
    assert chain.tails(0) == []


def range_array(count: int) -> Any:
    return array("I", range(count))


# ---- Zones ----


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes)
def test_the_zone_is_that_of_the_latest_salt_the_span_reaches_into(
    tokens: list[int], scope: Scope
) -> None:
    for (_, stop), (_, zone) in names(tokens, scope).items():
        inside = [salt for salt in scope.salts if salt.first_token < stop]
        latest = max((salt.first_token for salt in inside), default=None)
        owners = [salt.zone for salt in inside if salt.first_token == latest]
        assert zone == (owners[-1] if owners else PUBLIC_ZONE)
        assert zone == scope.zone(stop)


@pytest.mark.parametrize("at", range(8, 16))
def test_the_chunk_in_which_a_salt_starts_is_private_and_those_before_are_not(at: int) -> None:
    tokens = [*range(32)]
    public, private = names(tokens), names(tokens, Scope.private("s", first_token=at))
    zone = Salt("s").zone
    assert private[0, 8] == public[0, 8]
    assert private[8, 16][1] == private[16, 24][1] == private[24, 32][1] == zone
    assert not {name for name, _ in public.values()} & {
        name for name, owner in private.values() if owner == zone
    }


@pytest.mark.parametrize("at", range(8, 16))
def test_a_tail_that_ends_before_the_salt_stays_public(at: int) -> None:
    tokens = [*range(32)]
    public, private = names(tokens), names(tokens, Scope.private("s", first_token=at))
    for stop in (10, 12, 14):
        assert (private[8, stop] == public[8, stop]) is (stop <= at)


def test_of_two_salts_at_one_token_the_last_listed_owns() -> None:
    first, second = Salt("first", 4), Salt("second", 4)
    assert Scope(salts=(first, second)).zone(5) == second.zone
    assert Scope(salts=(second, first)).zone(5) == first.zone


def test_a_zone_does_not_show_the_salt() -> None:
    assert re.fullmatch("[0-9a-f]{32}", Salt("tenant").zone)
    assert Salt("tenant", 5).zone == Salt("tenant").zone
    assert Salt("tenant").zone != sha256(b"tenant").hexdigest()[:32]


# ---- Scopes that would name nothing ----


@pytest.mark.parametrize(
    "make",
    [
        lambda: Salt(""),
        lambda: Salt("\ud800"),
        lambda: Salt("s", -1),
        lambda: Salt("s", True),
        lambda: Salt("s", 1.0),  # type: ignore[arg-type]
        lambda: Content(b"", 0),
        lambda: Content("abc", 0),  # type: ignore[arg-type]
        lambda: Content(b"x", -1),
        lambda: Content(b"x", np.float64(3)),  # type: ignore[arg-type]
        lambda: Scope(salts="alice"),  # type: ignore[arg-type]
        lambda: Scope(contents=[b"x" * 32]),  # type: ignore[arg-type]
        lambda: Salt(b"secret"),  # type: ignore[arg-type]
        lambda: Scope(adapter="my-lora"),  # type: ignore[arg-type]
        lambda: Scope.private(""),
    ],
)
def test_an_extra_that_could_be_left_out_of_a_name_is_refused(make: Any) -> None:
    with pytest.raises(IdentityError) as caught:
        make()
    assert caught.value.hint


def test_a_refused_salt_is_not_printed() -> None:
    with pytest.raises(IdentityError) as caught:
        Salt("hunter2\ud800")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


# ---- Attacks: a prompt made so that its names are another's ----


def preimages(
    tokens: list[int], scope: Scope, size: int, monkeypatch: pytest.MonkeyPatch
) -> list[bytes]:
    """What was hashed to name a prompt, in order."""
    hashed: list[bytes] = []

    def spy(data: bytes) -> Any:
        hashed.append(data)
        return sha256(data)

    with monkeypatch.context() as patch:
        patch.setattr(links, "sha256", spy)
        ChunkChain(tokens, scope, tokens_per_chunk=64, tokens_per_tail=size)
    return hashed


def spelt(data: bytes) -> list[int]:
    """Bytes as the tokens that would be hashed as them."""
    return list(struct.unpack(f"<{len(data) // 4}I", data))


def raw_links(packed: bytes, size: int) -> set[bytes]:
    """The links of packed ids, as if any id were allowed."""
    found = bytearray()
    links.extend(found, packed, len(packed) // 4 // size, size, {})
    return set(links.Links(found))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 9, 16, 32])
def test_a_prompt_that_spells_a_hash_is_another_prompt(size: int) -> None:
    """The first tokens are a hash, the rest what follows it: the same bytes would be hashed."""
    victim = [*range(1000, 1128)]
    packed = struct.pack("<128I", *victim)
    theirs = ChunkChain(victim, Scope(), tokens_per_chunk=64, tokens_per_tail=size)
    for at, parent in enumerate(theirs.links):
        mine = raw_links(parent + packed[4 * size * (at + 1) :], size)
        assert mine or size > 8
        assert not mine & set(theirs.links)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 24), tokens_lists.filter(bool), scopes)
def test_no_two_kinds_of_preimage_can_be_the_same_bytes(
    size: int, tokens: list[int], scope: Scope
) -> None:
    """By length alone: a first link, a link, and a fold. Whatever the tokens and extras are."""
    with pytest.MonkeyPatch.context() as patch:
        hashed = preimages(tokens, scope, size, patch)
    plain = [each for each in hashed if not each.startswith(b"kvlayer: a fold")]
    folds = [each for each in hashed if each.startswith(b"kvlayer: a fold")]
    assert len(plain) == len(tokens) // size
    assert all(len(each) % 4 == 1 for each in folds)
    first = 32 + 4 * size if scope_starts(scope, size) else 4 * size
    assert [len(each) for each in plain] == [first, *[32 + 4 * size] * 64][: len(plain)]


def scope_starts(scope: Scope, size: int) -> bool:
    """Whether something folds into the first link."""
    starts = [c.first_token for c in scope.contents] + [s.first_token for s in scope.salts]
    return bool(scope.adapter) or any(at < size for at in starts)


def test_what_engines_hash_beside_pages_is_none_of_our_preimages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SGLang hashes the text of a namespace, and pages with an id above 32 bits, into the chain."""
    scope = Scope(adapter=b"a", salts=(Salt("s", 40),), contents=(Content(b"c", 70),))
    for size in (1, 4, 7, 16):
        for hashed in preimages([*range(128)], scope, size, monkeypatch):
            assert not hashed.startswith(b"sglang-cache-namespace-v1")
            assert hashed[0] != 0xFF or len(hashed) % 4 == 0  # a wide first page is 1 mod 4 long
            if len(hashed) % 4 == 1:
                # A wide page after a link opens with a digest: it would have to spell 32 bytes.
                assert hashed.startswith(b"kvlayer: a fold of extras, v2...")
    assert chain_of(spelt(b"sglang-cache-namespace-v1\0\0\0")).links == []


EXTRAS = [
    Scope(),
    Scope(adapter=b"x"),
    Scope(salts=(Salt("x"),)),
    Scope(contents=(Content(b"x", 0),)),
    Scope(contents=(Content(b"x", 1),)),
    Scope(salts=(Salt("x", 1),)),
    Scope(salts=(Salt("x"), Salt("x"))),
    Scope(contents=(Content(b"x", 0), Content(b"x", 0))),
    Scope(salts=(Salt("xx"),)),
    Scope(salts=(Salt("x"), Salt("x", 1))),
    Scope(salts=(Salt("A"), Salt("B"))),
    Scope(salts=(Salt("B"), Salt("A"))),
    Scope(salts=(Salt("AB"),)),
    Scope(adapter=b"A", salts=(Salt("B"),)),
    Scope(adapter=b"A", contents=(Content(b"B", 0),)),
    Scope(adapter=b"AB"),
    Scope(adapter=b"x", salts=(Salt("x"),), contents=(Content(b"x", 0),)),
    Scope(contents=(Content(b"x\0", 0),)),
    Scope(contents=(Content(b"x\0\0\0\0", 0),)),
    Scope(contents=(Content(b"x" + links._FIELD.pack(3, 0, 1) + b"y", 0),)),
    Scope(contents=(Content(b"x", 0),), salts=(Salt("y"),)),
]


@pytest.mark.parametrize("size", [2, 8])
def test_no_two_scopes_name_anything_alike(size: int) -> None:
    chains = [
        ChunkChain([*range(16)], scope, tokens_per_chunk=8, tokens_per_tail=size)
        for scope in EXTRAS
    ]
    for (one, mine), (other, theirs) in itertools.combinations(enumerate(chains), 2):
        assert not set(mine.links) & set(theirs.links), (EXTRAS[one], EXTRAS[other])


def test_a_plain_link_that_spells_the_preimage_of_a_fold_is_not_that_fold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for size in (1, 2, 8):
        hashed = preimages([*range(64)], Scope.private("s"), size, monkeypatch)
        folds = {sha256(each).digest() for each in hashed if len(each) % 4 == 1}
        assert folds
        theirs = ChunkChain(
            [*range(64)], Scope.private("s"), tokens_per_chunk=64, tokens_per_tail=size
        )
        for preimage in hashed:
            assert not folds & raw_links(preimage, size)
        for fold in folds:  # a prompt that goes on from a fold as if it were a link
            mine = raw_links(fold + struct.pack("<64I", *range(64)), size)
            assert not mine & set(theirs.links)


@settings(deadline=None, max_examples=300)  # a busy machine is no failure
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=12),
    st.lists(st.integers(0, 1), min_size=1, max_size=12),
    scopes,
    scopes,
)
def test_equal_hashes_mean_equal_tokens_extras_zones_and_ends(
    one: list[int], other: list[int], scope: Scope, another: Scope
) -> None:
    """Of prompts and scopes so alike that many names are shared."""
    mine, theirs = chain_of(one, scope), chain_of(other, another)
    for i, j in itertools.product(range(len(mine.links)), range(len(theirs.links))):
        same = (
            i == j
            and one[: (i + 1) * TAIL] == other[: (j + 1) * TAIL]
            and reaching(scope, (i + 1) * TAIL) == reaching(another, (j + 1) * TAIL)
        )
        assert (mine.links[i] == theirs.links[j]) == same
        if same:  # so a directory may keep one zone for each hash
            stop = (i + 1) * TAIL
            assert mine.zone_before(stop) == theirs.zone_before(stop)


def reaching(scope: Scope, stop: int) -> Any:
    """What of a scope shapes the KV before ``stop``: contents are a set, salts have an order."""
    salts = sorted((s for s in scope.salts if s.first_token < stop), key=lambda s: s.first_token)
    contents = sorted((c.first_token, c.digest) for c in scope.contents if c.first_token < stop)
    return scope.adapter, contents, [(s.first_token, s.value) for s in salts]


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes, st.data())
def test_any_way_to_cut_a_prompt_into_spans_ends_in_the_same_names(
    tokens: list[int], scope: Scope, data: Any
) -> None:
    """Chunks, tails and cuts only group links."""
    chain, at = chain_of(tokens, scope), 0
    while spans := chain.ends(at):
        span = data.draw(st.sampled_from(spans))
        assert span.hash == chain.links[span.stop // TAIL - 1]
        assert span.tokens % TAIL == 0
        assert at // CHUNK == (span.stop - 1) // CHUNK  # none reaches into the next chunk
        assert chain.parent(span.stop) == span.hash
        at = span.stop
    assert at == chain.named_tokens == len(tokens) // TAIL * TAIL


# ---- Chains that grow, are cut, or are made of links ----


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, tokens_lists, tokens_lists, scopes)
def test_a_chain_that_has_grown_is_the_chain_of_the_whole(
    first: list[int], second: list[int], third: list[int], scope: Scope
) -> None:
    grown = chain_of(first, scope).grown(second).grown(np.array(third, np.int64))
    whole = chain_of([*first, *second, *third], scope)
    assert (grown.links, grown.hashes) == (whole.links, whole.hashes)
    assert (grown.num_tokens, grown.scope) == (whole.num_tokens, scope)
    everything = Span(0, whole.num_tokens, b"")
    assert grown.token_bytes(everything) == whole.token_bytes(everything)
    assert grown.fingerprints() == whole.fingerprints()


def test_growing_hashes_and_packs_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[bytes] = []

    def spy(data: bytes) -> Any:
        hashed.append(data)
        return sha256(data)

    chain = chain_of([*range(400)])
    monkeypatch.setattr(links, "sha256", spy)
    monkeypatch.setattr(
        "kvlayer.identity.chain.token_bytes", lambda tokens: packed.append(len(tokens)) or sent
    )
    packed: list[int] = []
    sent = struct.pack("<3I", 400, 401, 402)
    longer = chain.grown([400, 401, 402])
    assert packed == [3]
    assert len(hashed) == 1  # tokens 400 and 401; 402 is no link yet
    assert longer.links[:200] == chain.links
    assert chain.num_tokens == 400
    longer.until(399)
    assert len(hashed) == 1


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists, scopes, st.integers(0, MAX + 1))
def test_a_chain_cut_short_is_the_chain_of_the_beginning(
    tokens: list[int], scope: Scope, stop: int
) -> None:
    chain, expected = chain_of(tokens, scope).until(stop), chain_of(tokens[:stop], scope)
    assert (chain.links, chain.hashes) == (expected.links, expected.hashes)
    assert chain.num_tokens == expected.num_tokens
    assert chain.fingerprints() == expected.fingerprints()
    assert chain.grown([7] * 9).links == expected.grown([7] * 9).links


def test_a_chain_is_made_from_the_links_that_an_engine_hashed() -> None:
    whole = chain_of([*range(21)])
    chain = ChunkChain.from_links(
        whole.links, Scope(owner="me"), tokens_per_chunk=CHUNK, tokens_per_tail=TAIL
    )
    assert (chain.links, chain.hashes) == (whole.links, whole.hashes)
    assert chain.num_tokens == chain.named_tokens == 20
    assert chain.tails(2) == whole.tails(2)
    assert chain.zone(chain.span(0)) == PUBLIC_ZONE
    assert chain.token_bytes(chain.span(0)) == b""
    assert chain.fingerprints() == []
    assert chain.until(9).links == whole.links[:4]
    with pytest.raises(TokensError, match="no tokens"):
        chain.grown([1, 2])


@pytest.mark.parametrize(
    ("given_links", "scope"),
    [
        ([b"short"], Scope()),
        (["ab" * 32], Scope()),
        ([bytes(32)], Scope.private("s")),
        ([bytes(32)], Scope(adapter=b"x")),
        ([bytes(32)], Scope(contents=(Content(b"x", 3),))),
    ],
)
def test_links_that_name_less_than_they_should_are_refused(given_links: Any, scope: Scope) -> None:
    with pytest.raises(IdentityError) as caught:
        ChunkChain.from_links(given_links, scope, tokens_per_chunk=CHUNK, tokens_per_tail=TAIL)
    assert caught.value.hint


def test_fingerprints_tell_prompts_apart_and_know_nothing_of_scopes() -> None:
    one, other = chain_of([*range(32)]), chain_of([*range(31), 99])
    assert one.fingerprints() == chain_of([*range(32)], Scope.private("s")).fingerprints()
    assert one.fingerprints()[:3] == other.fingerprints()[:3]
    assert one.fingerprints()[3] != other.fingerprints()[3]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_prompt_that_is_named_in_steps_has_the_same_names(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 200))
    tokens = data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    if tokens and data.draw(st.booleans()):
        tokens[data.draw(st.integers(0, count - 1))] = 2**30
    salts = tuple(Salt(f"s{at}", at) for at in sorted(data.draw(st.sets(st.integers(0, 200)))))
    scope, sizes = Scope(salts=salts), {"tokens_per_chunk": 16, "tokens_per_tail": 4}
    packed = token_bytes(tokens)
    step = data.draw(st.integers(1, 250))
    given_as: Any = data.draw(st.sampled_from([token_bytes, list, tuple, _ids, _wide]))
    source = given_as(tokens)
    steps = ChunkChain.in_steps(source, scope, **sizes, tokens_per_step=step)
    turns = 0
    while True:
        try:
            next(steps)
            turns += 1
        except StopIteration as named:
            chain = named.value
            break
    whole = ChunkChain.from_bytes(packed, scope, **sizes)
    assert (chain.links, chain.hashes, chain.unnamed) == (whole.links, whole.hashes, whole.unnamed)
    assert chain.num_tokens == count and turns <= -(-count // step) + 1
    assert chain.fingerprints(2) == whole.fingerprints()[:2]
    assert chain.fingerprints() == whole.fingerprints()
    assert chain.packed[:] == packed and chain.until(count // 2).packed == packed[: count // 2 * 4]
    for span in chain.spans(len(chain)):
        assert chain.token_bytes(span) == packed[4 * span.start : 4 * span.stop]
    grown, longer = chain.grown([7] * 30), whole.grown([7] * 30)
    assert (grown.links, grown.packed, grown.unnamed) == (
        longer.links,
        longer.packed,
        whole.unnamed,
    )


def _ids(tokens: list[int]) -> memoryview:
    return memoryview(array("I", tokens))


def _wide(tokens: list[int]) -> Any:
    return np.array(tokens, dtype="<i8")


@pytest.mark.parametrize("wrong", [-1, 2**32, 1.5, "a", None])
def test_a_prompt_read_in_steps_is_refused_where_it_is_none(wrong: Any) -> None:
    tokens = [*range(40), wrong]
    steps = ChunkChain.in_steps(
        tokens, Scope(), tokens_per_chunk=16, tokens_per_tail=4, tokens_per_step=16
    )
    with pytest.raises(TokensError, match=r"tokens must be integers in 0\.\.2\^32-1"):
        finish(steps)


def test_tokens_that_are_taken_away_while_they_are_read_name_nothing() -> None:
    tokens = [*range(40)]
    steps = ChunkChain.in_steps(
        tokens, Scope(), tokens_per_chunk=16, tokens_per_tail=4, tokens_per_step=16
    )
    next(steps)
    del tokens[20:]
    with pytest.raises(TokensError, match="token 31 was there, and is not any more"):
        finish(steps)


def test_links_are_a_sequence_like_any_other() -> None:
    made = [bytes([at]) * 32 for at in range(5)]
    found = links.Links(b"".join(made))
    assert found == made == [*found] and found == links.Links(bytearray(b"".join(made)))
    assert found != made[:4] and found != links.Links() and found != 5
    assert (len(found), found[0], found[-1], found.index(made[3])) == (5, made[0], made[4], 3)
    for part in (slice(1, 3), slice(None, None, 2), slice(None, None, -1), slice(4, 1), slice(9)):
        assert found[part] == made[part]
    assert hash(found) == hash(links.Links(bytearray(b"".join(made)))) and "5 links" in repr(found)
    for outside in (5, -6):
        with pytest.raises(IndexError):
            found[outside]


@pytest.mark.parametrize("stop", [-1, -8, True, 1.5, None])
def test_a_chain_ends_at_no_number_that_is_none(stop: object) -> None:
    chain = ChunkChain(list(range(64)), Scope(), tokens_per_chunk=16, tokens_per_tail=4)
    with pytest.raises(ArgumentError, match="stop must be a whole number"):
        chain.until(stop)  # type: ignore[arg-type]
