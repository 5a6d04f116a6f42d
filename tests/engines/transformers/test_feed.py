"""KV is named by the ids that were fed, whatever callbacks make of the ids they are handed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvlayer_transformers import Session

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


class _GoneError(Exception):
    pass


class _Streamer:
    """Writes to the ids of the prompt, which it is handed first, and leaves at its third turn."""

    def __init__(self) -> None:
        self.turns = 0

    def put(self, ids: torch.Tensor) -> None:
        self.turns += 1
        if self.turns == 1:
            ids[:, -6:] = 9
        if self.turns == 3:
            raise _GoneError

    def end(self) -> None:
        """Never reached."""


def _writes(turn: int, column: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    turns = iter(range(1, 1000))

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if next(turns) == turn:
            ids[:, column] = 7
        return scores

    return process


def _answer(model: Any, ids: torch.Tensor, **arguments: Any) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**NEW, **arguments})


def test_ids_of_the_answer_that_a_processor_changed_later_do_not_name_its_kv(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session = open_session(llama, exact=False)
    first = session.generate(
        prompt(40), logits_processor=[_writes(20, -5)], **{**NEW, "max_new_tokens": 40}
    )
    longer = torch.cat([first.sequences, torch.tensor([prompt(9, seed=4)])], dim=1)
    found = session.generate(longer, **NEW)
    assert torch.equal(found.sequences, _answer(llama, longer))
    changed = int((first.sequences[0] == 7).nonzero()[-1])
    assert 40 < found.loaded <= changed
    assert session.troubles == 0


def test_the_prompt_that_a_prefix_function_changed_is_stored_as_it_was_fed(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    def allowed(_: int, sent: torch.Tensor) -> list[int]:
        sent[4] = 7
        return list(range(3, 512))

    session = open_session(llama, exact=False)
    session.generate(prompt(40), prefix_allowed_tokens_fn=allowed, **NEW)
    ids = torch.tensor([prompt(40)])
    found = session.generate(ids, **NEW)
    assert (found.loaded, session.troubles) == (32, 0)
    assert torch.equal(found.sequences, _answer(llama, ids))


def test_a_prompt_that_a_streamer_changed_before_it_left_is_stored_as_it_was_fed(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session = open_session(llama, exact=False)
    with pytest.raises(_GoneError):
        session.generate(prompt(40), streamer=_Streamer(), **NEW)
    ids = torch.tensor([prompt(40)])
    found = session.generate(ids, **NEW)
    assert (found.loaded, session.troubles) == (32, 0)
    assert torch.equal(found.sequences, _answer(llama, ids))


def test_what_the_caller_writes_to_the_prompt_meanwhile_names_nothing(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    ids = torch.tensor([prompt(72)])

    def on_pass(done: int, _: int) -> None:
        if done == 32:
            ids[:, :20] = 9

    session = open_session(llama, exact=False)
    first = session.generate(ids, on_pass=on_pass, **NEW)
    unchanged = torch.tensor([prompt(72)])
    assert torch.equal(first.sequences, _answer(llama, unchanged))
    found = session.generate(ids, **NEW)
    assert found.loaded == 0
    assert torch.equal(found.sequences, _answer(llama, ids))


def test_nothing_is_left_on_the_model(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session = open_session(llama)
    with pytest.raises(_GoneError):
        session.generate(prompt(40), streamer=_Streamer(), **NEW)
    session.generate(prompt(40), **NEW)
    assert not llama._forward_pre_hooks


def test_callbacks_may_call_the_model(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    """Guidance does; what it computes is no part of the answer's past."""
    session = open_session(llama, exact=False)
    ids = torch.tensor([prompt(40)])

    def process(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        llama(rows[:, -3:], past_key_values=DynamicCache(), use_cache=True)
        llama(rows[:, -3:])
        session.generate(prompt(20, seed=5), **NEW)
        return scores

    found = session.generate(ids, logits_processor=[process], **NEW)
    assert torch.equal(found.sequences, _answer(llama, ids))
    assert session.troubles == 0
    assert session.generate(ids, **NEW).loaded == 32
