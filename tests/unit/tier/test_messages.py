"""Messages between Planner and ranks survive the wire; what is no message is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlayer._pack import pack, unpack
from kvlayer.errors import MessageError
from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.memory.handle import SlabHandle
from kvlayer.results import Cause
from kvlayer.retention import ORDINARY
from kvlayer.tier.messages import (
    MAX_PIECES,
    VERSION,
    Completion,
    Greeting,
    Order,
    Outcome,
    Piece,
    Verb,
)

KEY = ObjectKey.of("ab" * 32, "0", bytes(32), 16, Part(0, (0, 4), (0, 2)))
NUMBERS = st.integers(0, (1 << 63) - 1)
KEYS = st.builds(
    lambda chunk, zone, heads: ObjectKey.of(
        "cd" * 32, zone, chunk, 16, Part(1, (0, 4), (0, 2) if heads else None, "native:x")
    ),
    st.binary(min_size=32, max_size=32),
    st.sampled_from(["0", "ef" * 16]),
    st.booleans(),
)
# A rank has no use for what a request wishes to be kept: it does not travel.
PIECE = st.builds(Piece, KEYS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.just(ORDINARY), st.just(b""))
JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10)
    | st.just(str(KEY)),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(piece=PIECE)
def test_a_piece_survives_the_wire(piece: Piece) -> None:
    again = Piece.from_wire(unpack(pack(piece.to_wire())))  # type: ignore[arg-type]
    assert again == piece
    assert type(again.key) is ObjectKey


@given(
    outcome=st.builds(
        Outcome,
        KEYS,
        st.none() | st.sampled_from(Cause),
        st.text(st.characters(exclude_categories=["Cs"])),
        NUMBERS,
        st.floats(0, 1e9),
        st.none(),  # the version is of this process alone
    )
)
def test_an_outcome_survives_the_wire(outcome: Outcome) -> None:
    again = Outcome.from_wire(unpack(pack(outcome.to_wire())))  # type: ignore[arg-type]
    assert again == outcome
    assert again.ok == (outcome.cause is None)
    assert type(again.key) is ObjectKey


def is_number(value: object) -> bool:
    return type(value) is int and value >= 0


@given(wire=JUNK | st.tuples(st.just(str(KEY)), JUNK, JUNK, JUNK, JUNK).map(list))
def test_garbage_is_refused_as_a_piece(wire: Any) -> None:
    try:
        piece = Piece.from_wire(wire)
    except ValueError:
        return
    assert isinstance(wire, list)
    assert wire[0] == str(KEY)
    assert all(is_number(n) for n in wire[1:])
    assert piece.to_wire() == wire


@given(
    wire=JUNK
    | st.tuples(
        st.just(str(KEY)), st.none() | st.sampled_from(Cause).map(str) | JUNK, JUNK, JUNK, JUNK
    ).map(list)
)
def test_garbage_is_refused_as_an_outcome(wire: Any) -> None:
    try:
        outcome = Outcome.from_wire(wire)
    except ValueError:
        return
    assert isinstance(wire, list)
    assert outcome.to_wire() == wire


GOOD: list[Any] = [str(KEY), None, "", 0, 0.0]


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize(
    "value", [[], {}, b"x", True, -1, math.inf, math.nan, -0.5, 1 << 70, "never-heard-of", ["x"]]
)
def test_one_wrong_field_spoils_an_outcome(at: int, value: object) -> None:
    wire = [*GOOD[:at], value, *GOOD[at + 1 :]]
    if at == 2 and isinstance(value, str):
        assert Outcome.from_wire(wire).detail == value
    elif at == 3 and value == 1 << 70:
        assert Outcome.from_wire(wire).nbytes == value
    else:
        with pytest.raises(ValueError):  # noqa: PT011  # which field is wrong decides the words
            Outcome.from_wire(wire)


@pytest.mark.parametrize("wire", [None, 7, "piece", {}, [], [str(KEY)], [str(KEY), 0, 0, 0, True]])
def test_what_is_no_list_of_a_piece_is_refused(wire: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Piece.from_wire(wire)
    with pytest.raises(ValueError):  # noqa: PT011
        Outcome.from_wire(wire)


# -- whole messages -------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PIECES = st.lists(PIECE, max_size=4)
OUTCOMES = st.lists(
    st.builds(
        Outcome,
        KEYS,
        st.none() | st.sampled_from(Cause),
        TEXT,
        NUMBERS,
        st.floats(0, 1e9),
        st.none(),
    ),
    max_size=4,
)
ORDERS = st.builds(
    Order,
    NUMBERS,
    NUMBERS,
    st.sampled_from(Verb),
    TEXT,
    NUMBERS,
    NUMBERS,
    PIECES.map(tuple),
)
COMPLETIONS = st.builds(Completion, NUMBERS, NUMBERS, OUTCOMES.map(tuple))
HANDLES = st.builds(SlabHandle, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
GREETINGS = st.builds(
    Greeting, HANDLES, st.lists(st.lists(TEXT, max_size=3).map(tuple), min_size=1).map(tuple)
)
MESSAGES = ORDERS | COMPLETIONS | GREETINGS
KINDS = (Order, Completion, Greeting)


@given(message=MESSAGES)
def test_a_message_survives_the_wire_and_is_taken_for_nothing_else(
    message: Order | Completion | Greeting,
) -> None:
    packed = message.to_bytes()
    for kind in KINDS:
        if kind is type(message):
            again = kind.from_bytes(packed)
            assert again == message
            assert type(again) is type(message)
        else:
            with pytest.raises(MessageError, match="expected a") as caught:
                kind.from_bytes(packed)
            assert caught.value.hint


def test_a_greeting_with_nothing_where_a_list_should_be_is_refused() -> None:
    slab = [0, 0, 0, 0]
    for held in (None, [], [None], [["a"], None], [[None]], "a"):
        with pytest.raises(MessageError):
            Greeting.from_bytes(pack(["a greeting", VERSION, slab, held]))
    assert Greeting.from_bytes(pack(["a greeting", VERSION, slab, [[], ["a"]]])).held == (
        (),
        ("a",),
    )


@pytest.mark.parametrize("kind", KINDS)
@given(packed=st.binary(max_size=40) | JUNK.map(pack))
def test_bytes_that_are_no_message_are_refused(
    kind: type[Order] | type[Completion] | type[Greeting], packed: bytes
) -> None:
    with pytest.raises(MessageError):
        kind.from_bytes(packed)


@given(message=MESSAGES, at=st.integers(2, 9), value=JUNK)
def test_one_wrong_field_never_makes_another_message(
    message: Order | Completion | Greeting, at: int, value: Any
) -> None:
    wire: Any = unpack(message.to_bytes())
    changed = [*wire[:at], value, *wire[at + 1 :]]
    try:
        again = type(message).from_bytes(pack(changed))
    except MessageError:
        return
    assert unpack(again.to_bytes()) == unpack(pack(changed))


@given(message=MESSAGES, cut=st.integers(1, 40))
def test_a_truncated_message_is_refused(message: Order | Completion | Greeting, cut: int) -> None:
    with pytest.raises(MessageError):
        type(message).from_bytes(message.to_bytes()[:-cut])


@given(message=MESSAGES)
def test_another_version_is_named(message: Order | Completion | Greeting) -> None:
    wire: Any = unpack(message.to_bytes())
    for version in (VERSION + 1, None, "1"):
        with pytest.raises(MessageError, match="found version") as caught:
            type(message).from_bytes(pack([wire[0], version, *wire[2:]]))
        assert "same kvlayer-core" in str(caught.value.hint)


def test_the_longest_order_fits_into_what_is_read() -> None:
    order = Order(1, 0, Verb.GATHER, "r", 0, 9, (Piece(KEY, 0, 1, 0, 1),) * MAX_PIECES)
    assert Order.from_bytes(order.to_bytes()) == order
    outcomes = (Outcome(KEY),) * MAX_PIECES
    assert len(Completion.from_bytes(Completion(1, 0, outcomes).to_bytes()).outcomes) == MAX_PIECES
