"""Messages between Planner and Mover survive the wire; what is no message is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlayer._pack import pack, unpack
from kvlayer.keys import ObjectKey, Part
from kvlayer.results import Cause
from kvlayer.tier.messages import Outcome, Piece

KEY = ObjectKey.of("ab" * 32, "0", bytes(32), Part(0, (0, 4), (0, 2)))
NUMBERS = st.integers(0, (1 << 63) - 1)
KEYS = st.builds(
    lambda chunk, zone, heads: ObjectKey.of(
        "cd" * 32, zone, chunk, Part(1, (0, 4), (0, 2) if heads else None, "native:x")
    ),
    st.binary(min_size=32, max_size=32),
    st.sampled_from(["0", "ef" * 16]),
    st.booleans(),
)
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


@given(piece=st.builds(Piece, KEYS, NUMBERS, NUMBERS, NUMBERS, NUMBERS))
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
