"""Batches of prompts: where rows begin, how passes are cut, how much of a batch is reusable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlayer import Scope
from kvlayer.errors import TokensError
from kvlayer_transformers import Session
from kvlayer_transformers.prompts import Prompts, passes, reusable_columns

OpenSession = Callable[..., Session]
MakePrompt = Callable[..., list[int]]

NEW: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def padded(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask as a tokenizer with ``padding_side="left"`` returns them."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@given(
    start=st.integers(0, 300),
    stop=st.integers(0, 300),
    width=st.integers(1, 64),
)
def test_passes_cover_every_column_once_and_end_at_multiples(
    start: int, stop: int, width: int
) -> None:
    cut = list(passes(start, stop, width))
    covered = [column for begin, end in cut for column in range(begin, end)]
    assert covered == list(range(start, stop))
    assert all(end % width == 0 for _, end in cut[:-1])


@given(stop=st.integers(0, 300), width=st.integers(1, 64), skipped=st.integers(0, 5))
def test_a_run_that_starts_at_a_boundary_makes_the_passes_of_a_cold_one(
    stop: int, width: int, skipped: int
) -> None:
    cold = list(passes(0, stop, width))
    assert list(passes(skipped * width, stop, width)) == cold[skipped:]


@given(
    rows=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)), min_size=1, max_size=5),
    columns=st.integers(1, 100),
    step=st.integers(1, 40),
)
def test_reusable_columns_are_covered_by_every_row_and_never_all(
    rows: list[tuple[int, int]], columns: int, step: int
) -> None:
    pads, tokens = [pad for pad, _ in rows], [count for _, count in rows]
    found = reusable_columns(pads, tokens, columns, step)
    assert found % step == 0
    assert 0 <= found < columns
    assert all(found <= pad + count for pad, count in rows)
    more = found + step
    assert more >= columns or any(more > pad + count for pad, count in rows)


def test_a_mask_tells_where_each_row_begins() -> None:
    prompts = Prompts.of(*padded([[5, 6, 7], [8]]))
    assert (prompts.rows, prompts.columns, prompts.pads) == (2, 3, (0, 2))
    assert prompts.mask().tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_tokens_position_counts_from_its_row() -> None:
    padding = Prompts.of(*padded([[5, 6, 7], [8]])).padding(1, 3, torch.device("cpu"))
    assert padding["position_ids"].tolist() == [[1, 2], [0, 0]]
    assert padding["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert Prompts.of([[5, 6, 7]]).padding(1, 3, torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0]], "not padded on the left"),
        ([[0, 1, 0]], "not padded on the left"),
        ([[0, 0, 0]], "nothing but padding"),
        ([[1, 1]], "shape"),
    ],
)
def test_a_mask_that_is_no_left_padding_is_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(TokensError, match=message):
        Prompts.of([[5, 6, 7]], torch.tensor(mask))


@pytest.fixture
def rows(prompt: MakePrompt) -> list[list[int]]:
    return [prompt(150), prompt(90, seed=2), prompt(40, seed=3)]


def alone(model: Any, ids: list[int]) -> list[int]:
    row = torch.tensor([ids])
    out: torch.Tensor = model.generate(row, attention_mask=torch.ones_like(row), **NEW)
    new: list[int] = out[0, len(ids) :].tolist()
    return new


def test_a_padded_batch_is_loaded_and_answers_as_its_rows_alone(
    llama: Any, open_session: OpenSession, rows: list[list[int]]
) -> None:
    session = open_session(llama)
    cold = session.generate(*padded(rows), **NEW)
    warm = session.generate(*padded(rows), **NEW)
    assert (cold.loaded, warm.loaded) == (0, 128)
    expected = [alone(llama, row) for row in rows]
    assert all(len(set(new)) > 4 for new in expected)
    assert cold.sequences[:, 150:].tolist() == expected
    assert warm.sequences[:, 150:].tolist() == expected


def test_what_a_tokenizer_returns_can_be_passed_on(
    llama: Any, open_session: OpenSession, rows: list[list[int]]
) -> None:
    ids, mask = padded(rows)
    inputs = {"input_ids": ids, "attention_mask": mask}
    session = open_session(llama)
    session.generate(**inputs, **NEW)
    assert session.load(**inputs).columns == 128


def test_a_rows_kv_is_that_of_the_prompt_alone(
    llama: Any, open_session: OpenSession, rows: list[list[int]]
) -> None:
    """Column c of a row with p columns of padding holds token c - p, up to rounding."""
    session = open_session(llama, exact=False)
    session.generate(*padded(rows), **NEW)
    for row in rows:
        past, columns = session.load(row)
        assert columns == (len(row) - 1) // 16 * 16
        other = open_session(llama, exact=False)
        other.generate(row, **NEW)
        solo, same = other.load(row)
        assert same == columns
        for found, expected in zip(past.layers, solo.layers, strict=True):
            torch.testing.assert_close(found.keys, expected.keys, atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(found.values, expected.values, atol=2e-4, rtol=2e-4)


def test_a_batch_is_warm_from_prompts_answered_alone(
    llama: Any, open_session: OpenSession, rows: list[list[int]]
) -> None:
    session = open_session(llama)
    for row in rows:
        session.generate(row, **NEW)
    warm = session.generate(*padded(rows), **NEW)
    assert warm.loaded == 128
    assert warm.sequences[:, 150:].tolist() == [alone(llama, row) for row in rows]


def test_one_cold_row_makes_a_batch_compute_from_where_that_row_begins(
    llama: Any, open_session: OpenSession, rows: list[list[int]]
) -> None:
    session = open_session(llama)
    session.generate(rows[0], **NEW)
    # Row 1 is unknown and begins at column 60: only the columns before it need no computing.
    warm = session.generate(*padded(rows[:2]), **NEW)
    assert warm.loaded == 32
    assert warm.sequences[:, 150:].tolist() == [alone(llama, row) for row in rows[:2]]


def test_padding_that_was_never_computed_holds_no_garbage(
    llama: Any, open_session: OpenSession, rows: list[list[int]]
) -> None:
    session = open_session(llama)
    session.generate(*padded(rows), **NEW)
    ids, mask = padded(rows)
    past, columns = session.load(ids, mask)
    for layer in past.layers:
        assert not layer.keys[2, :, : min(110, columns)].any()
        assert not layer.values[1, :, : min(60, columns)].any()


def test_rows_may_have_scopes_of_their_own(
    llama: Any, open_session: OpenSession, prompt: MakePrompt
) -> None:
    session = open_session(llama)
    ids = torch.tensor([prompt(70), prompt(70, seed=2)])
    scopes = [Scope.private("a"), Scope.private("b")]
    session.generate(ids, scope=scopes, **NEW)
    assert session.load(ids, scope=scopes).columns == 64
    for row, scope in enumerate(scopes):
        assert session.load(ids[row], scope=scope).columns == 64
        assert session.load(ids[1 - row], scope=scope).columns == 0
    assert session.load(ids, scope=scopes[::-1]).columns == 0
    assert session.load(ids).columns == 0


def test_padding_after_an_end_token_is_not_stored(
    llama: Any, open_session: OpenSession, rows: list[list[int]]
) -> None:
    free = [alone(llama, row) for row in rows[:2]]
    end = next(token for token in free[1] if token not in free[0])
    stop = free[1].index(end) + 1
    session = open_session(llama, exact=False)
    said = session.generate(*padded(rows[:2]), eos_token_id=end, pad_token_id=0, **NEW)
    assert said.sequences[0, 150:].tolist() == free[0]
    assert said.sequences[1, 150:].tolist() == free[1][:stop] + [0] * (12 - stop)
    ended = [*rows[1], *free[1][:stop]]
    assert stop < 10
    assert session.load([*ended, *[0] * 20]).columns == len(ended) // 2 * 2


def test_a_scope_too_few_is_refused(
    llama: Any, open_session: OpenSession, prompt: MakePrompt
) -> None:
    with pytest.raises(TokensError, match="1 scopes for 2 prompts"):
        open_session(llama).load(torch.tensor([prompt(40)] * 2), scope=[Scope()])
