"""Names of KV: the same content has one name, other content never has it."""

from __future__ import annotations

import pickle
import re
from array import array
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.errors import IdentityError, LayoutError
from kvlayer.keys import PUBLIC_ZONE, ChunkChain, Content, ObjectKey, Part, Salt, Scope, Span

CHUNK, TAIL = 8, 2
MAX = 60

tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=MAX)
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
    """(start, stop) -> (hash, zone), for every chunk and every tail at every chunk."""
    chain = chain_of(tokens, scope)
    spans = [chain.span(index) for index in range(len(chain))]
    spans += [tail for index in range(len(chain) + 1) for tail in chain.tails(index)]
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
def test_names_within_a_prompt_are_all_different(tokens: list[int], scope: Scope) -> None:
    found = [name for name, _ in names(tokens, scope).values()]
    assert len(found) == len(set(found))


@settings(deadline=None)  # a busy machine is no failure
@given(tokens_lists.filter(bool), scopes, st.data())
def test_another_token_changes_the_names_of_the_spans_that_end_after_it_and_no_others(
    tokens: list[int], scope: Scope, data: Any
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens]
    other[at] ^= data.draw(st.integers(1, 2**32 - 1))
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
@given(st.lists(st.integers(0, 2**32 - 1), min_size=TAIL, max_size=MAX))
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
    assert chain.parent(2) == chain.hashes[1]
    assert chain.span(1) == Span(8, 16, chain.hashes[1])
    assert chain.span(1).tokens == 8
    assert chain.token_bytes(chain.span(1)) == np.array(range_[8:16], "<u4").tobytes()


def test_chunks_of_another_size_share_only_where_a_tail_or_chunk_of_the_same_tokens_ends() -> None:
    tokens = [*range(32)]
    small, large = chain_of(tokens, chunk=8), chain_of(tokens, chunk=16)
    assert large.hashes[0] not in small.hashes
    assert large.tails(0)[3].hash == small.hashes[0]  # both name tokens 0..8 and nothing before


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
        lambda: Content(b"x", np.int64(3)),  # type: ignore[arg-type]
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


# ---- Parts and keys ----

numbers = st.integers(0, 999_999_999)
ranges = st.tuples(st.integers(0, 999_999), st.integers(1, 999_999)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)
forms = st.just("canonical") | st.from_regex(r"native:[a-z0-9_:-]+", fullmatch=True)
parts = st.builds(Part, numbers, ranges, st.none() | ranges, forms)
digests = st.binary(min_size=32, max_size=32)
zones = st.just(PUBLIC_ZONE) | st.binary(min_size=16, max_size=16).map(bytes.hex)
keys = st.builds(ObjectKey.of, digests.map(bytes.hex), zones, digests, parts)


@settings(deadline=None)  # a busy machine is no failure
@given(parts)
def test_a_part_reads_back_from_its_text(part: Part) -> None:
    assert Part.parse(str(part)) == part


@settings(deadline=None)  # a busy machine is no failure
@given(digests, zones, digests, parts)
def test_a_key_reads_back_from_its_text(
    namespace: bytes, zone: str, chunk: bytes, part: Part
) -> None:
    key = ObjectKey.parse(str(ObjectKey.of(namespace.hex(), zone, chunk, part)))
    assert (key.namespace, key.zone, key.chunk, key.part) == (namespace.hex(), zone, chunk, part)
    assert pickle.loads(pickle.dumps(key)) == key  # noqa: S301  our own bytes


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(max_size=40) | st.text("g0123456789.l-hcanoil:tve_", max_size=40))
def test_text_that_is_no_part_is_refused(text: str) -> None:
    try:
        part = Part.parse(text)
    except ValueError:
        return
    assert str(part) == text


EDITS = "0123456789abcdefgABCDEFG/.:_-l h\n\0é٣"  # and a digit that is not ASCII


@settings(deadline=None)  # a busy machine is no failure
@given(keys, st.data())
def test_a_damaged_key_is_refused_or_is_another_key_that_reads_back(
    key: ObjectKey, data: Any
) -> None:
    at = data.draw(st.integers(0, len(key)))
    end = data.draw(st.integers(at, min(at + 2, len(key))))
    text = key[:at] + data.draw(st.text(EDITS, max_size=2)) + key[end:]
    try:
        found = ObjectKey.parse(text)
    except ValueError:
        return
    rebuilt = ObjectKey.of(found.namespace, found.zone, found.chunk, found.part)
    assert rebuilt == text
    assert re.fullmatch(r"[a-z0-9_.:/-]+", text)


PART = "g0.l0-2.h0-3.canonical"
KEY = f"{'a' * 64}/0/{'b' * 64}/{PART}"


@pytest.mark.parametrize(
    "text",
    [
        "", "g0", PART + "\n", PART.replace("g0", "g00"), PART.replace("l0-2", "l0-02"),
        PART.replace("l0-2", "l2-2"), PART.replace("l0-2", "l3-2"), PART.replace("h0-3", "h3-3"),
        PART.replace("h0-3", "h-1-3"), PART.replace("canonical", "native:"),
        PART.replace("canonical", "native:AMX"), PART.replace("canonical", "native:a.b"),
        PART.replace("canonical", "native:a/b"), PART.replace("canonical", "packed"),
        PART.replace("g0", "g٣"), PART.replace("g0", "g" + "9" * 5000), " " + PART,
    ],
)  # fmt: skip
def test_a_part_that_str_cannot_produce_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a part"):
        Part.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", KEY + "\n", "/" + KEY, KEY + "/", KEY.upper(), KEY.replace("/0/", "//"),
        KEY.replace("/0/", "/00/"), KEY.replace("/0/", "/1/"), KEY.replace("/0/", f"/{'c' * 31}/"),
        KEY.replace("/0/", f"/{'c' * 33}/"), KEY.replace("/0/", "/../"), KEY[1:],
        KEY.replace(f"/{'b' * 64}/", f"/{'b' * 63}/"), KEY.replace(PART, "g0.l2-1.canonical"),
    ],
)  # fmt: skip
def test_a_key_from_outside_that_is_none_is_refused(text: str) -> None:
    assert ObjectKey.parse(KEY)
    with pytest.raises(ValueError, match="not a"):
        ObjectKey.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Part(-1, (0, 1), None),
        lambda: Part(0, (1, 1), None),
        lambda: Part(0, (0, 1), (2, 1)),
        lambda: Part(0, (0, 1), None, "native:AMX"),
        lambda: Part(0, (0, 1), None, ""),
        lambda: Part(10**9, (0, 1), None),
    ],
)
def test_a_part_no_key_can_carry_cannot_be_made(make: Any) -> None:
    with pytest.raises(LayoutError) as caught:
        make()
    assert caught.value.hint


def test_no_two_parts_share_a_text() -> None:
    variants = [
        Part(0, (0, 1), None), Part(0, (0, 1), (0, 1)), Part(0, (0, 1), (0, 11)),
        Part(0, (0, 11), (0, 1)), Part(0, (0, 1), None, "native:h0-1"), Part(1, (0, 1), None),
    ]  # fmt: skip
    assert len(set(map(str, variants))) == len(variants)
