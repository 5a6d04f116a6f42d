"""Messages between Planner and ranks survive the wire; what is no message is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlayer._pack import pack, unpack
from kvlayer.errors import MessageError
from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.memory.handle import SlabHandle
from kvlayer.results import Cause
from kvlayer.tier.messages import (
    MAX_PIECES,
    VERSION,
    Completion,
    Greeting,
    Missed,
    Order,
    Piece,
    Slot,
    Task,
    Verb,
)

KEY = ObjectKey.of("ab" * 32, "0", bytes(32), 16, Part(0, (0, 4), (0, 2)))
NUMBERS = st.integers(0, (1 << 63) - 1)
PARTS = st.builds(
    Part,
    st.integers(0, 3),
    st.just((0, 4)),
    st.sampled_from([None, (0, 2), (1, 2)]),
    st.sampled_from(["canonical", "native:x"]),
)
SLOTS = st.builds(Slot, PARTS, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
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


# -- whole messages -------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TASKS = st.builds(
    Task,
    NUMBERS,
    NUMBERS,
    st.sampled_from(Verb),
    TEXT,
    NUMBERS,
    NUMBERS,
    st.lists(SLOTS, max_size=6).map(tuple),
)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    count = draw(st.integers(0, 8))
    places = sorted(draw(st.sets(st.integers(0, count - 1)))) if count else []
    missed = [Missed(p, draw(st.sampled_from(Cause)), draw(TEXT)) for p in places]
    return Completion(draw(NUMBERS), draw(NUMBERS), count, tuple(missed))


HANDLES = st.builds(SlabHandle, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
GREETINGS = st.builds(
    Greeting, HANDLES, st.lists(st.lists(TEXT, max_size=3).map(tuple), min_size=1).map(tuple)
)
MESSAGES = TASKS | completions() | GREETINGS
KINDS = (Task, Completion, Greeting)


@given(message=MESSAGES)
def test_a_message_survives_the_wire_and_is_taken_for_nothing_else(
    message: Task | Completion | Greeting,
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
    kind: type[Task] | type[Completion] | type[Greeting], packed: bytes
) -> None:
    with pytest.raises(MessageError):
        kind.from_bytes(packed)


@given(message=MESSAGES, at=st.integers(2, 9), value=JUNK)
def test_one_wrong_field_never_makes_another_message(
    message: Task | Completion | Greeting, at: int, value: Any
) -> None:
    wire: Any = unpack(message.to_bytes())
    changed = [*wire[:at], value, *wire[at + 1 :]]
    try:
        again = type(message).from_bytes(pack(changed))
    except MessageError:
        return
    assert unpack(again.to_bytes()) == unpack(pack(changed))


@given(message=MESSAGES, cut=st.integers(1, 40))
def test_a_truncated_message_is_refused(message: Task | Completion | Greeting, cut: int) -> None:
    with pytest.raises(MessageError):
        type(message).from_bytes(message.to_bytes()[:-cut])


@given(message=MESSAGES)
def test_another_version_is_named(message: Task | Completion | Greeting) -> None:
    wire: Any = unpack(message.to_bytes())
    for version in (VERSION + 1, None, "1"):
        with pytest.raises(MessageError, match="found version") as caught:
            type(message).from_bytes(pack([wire[0], version, *wire[2:]]))
        assert "same kvlayer-core" in str(caught.value.hint)


def piece(number: int, part: Part, offset: int = 0) -> Piece:
    key = ObjectKey.of("ab" * 32, "0", number.to_bytes(32, "little"), 16, part)
    return Piece(key, 16 * number, 16, offset, 4096)


def test_a_rank_hears_of_an_order_what_it_needs_and_no_names() -> None:
    parts = [Part(0, (0, 4), (0, 2)), Part(1, (0, 4), None)]
    pieces = tuple(piece(n, parts[n % 2], 4096 * n) for n in range(5))
    order = Order(7, 1, Verb.SCATTER, "r", 0, 80, pieces)
    packed = order.to_bytes()
    task = Task.from_bytes(packed)
    assert task[:-1] == order[:-1]
    assert task.slots == tuple(Slot(p.key.part, *p[1:5]) for p in pieces)
    assert not any(p.key.end_hash in packed or p.key.encode() in packed for p in pieces)


def test_the_longest_order_fits_into_what_is_read_and_costs_some_bytes_a_piece() -> None:
    part = Part(0, (0, 4), (0, 2))
    pieces = tuple(piece(n, part) for n in range(MAX_PIECES))
    order = Order(1, 0, Verb.GATHER, "r", 0, 9, pieces)
    packed = order.to_bytes()
    assert len(Task.from_bytes(packed).slots) == MAX_PIECES
    assert len(packed) < 48 * MAX_PIECES
    assert len(Completion(1, 0, MAX_PIECES).to_bytes()) < 64
    failed = Completion.from_bytes(Completion.failed(order, "it is down").to_bytes())
    outcomes = failed.outcomes(pieces)
    assert [outcome.key for outcome in outcomes] == [each.key for each in pieces]
    assert {(outcome.cause, outcome.detail) for outcome in outcomes} == {
        (Cause.RANK_DOWN, "it is down")
    }


@pytest.mark.parametrize(
    "missed",
    [
        [[0, "rank-down"]],
        [[2, "rank-down", ""]],
        [[-1, "rank-down", ""]],
        [[True, "rank-down", ""]],
        [[1, "rank-down", ""], [0, "rank-down", ""]],
        [[1, "rank-down", ""], [1, "rank-down", ""]],
        [[0, "never-heard-of", ""]],
        [[0, None, ""]],
        [[0, "rank-down", 7]],
        [7],
        "missed",
    ],
)
def test_what_cannot_have_been_missed_is_refused(missed: Any) -> None:
    with pytest.raises(MessageError):
        Completion.from_bytes(pack(["a completion", VERSION, 1, 0, 2, missed]))


GOOD = Task(1, 0, Verb.GATHER, "r", 0, 9, (Slot(Part(0, (0, 4), None), 0, 16, 0, 4096),) * 2)


@pytest.mark.parametrize(
    ("parts", "table"),
    [
        ([], 80),
        (["g0.l0-4.canonical"], 79),
        (["g0.l0-4.canonical"], 40 + 8),
        (["g0.l0-4.canonical", "g1.l0-4.canonical"], 80),
        (["g0.l0-4.canonical"] * 2, 80),
        (["nonsense"], 80),
        ([7], 80),
        (["g0.l0-4.canonical"], 0),
    ],
)
def test_a_table_that_is_none_is_refused(parts: Any, table: int) -> None:
    wire: Any = unpack(GOOD.to_bytes())
    assert (wire[-2], len(wire[-1])) == (["g0.l0-4.canonical"], 80)
    with pytest.raises(MessageError):
        Task.from_bytes(pack([*wire[:-2], parts, wire[-1][:table]]))
