"""A prompt is stored once it is computed, whatever becomes of the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hang import HANG
from transformers import LogitsProcessorList, StoppingCriteriaList

from kvlayer_transformers import Session

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


class Gone(Exception):  # noqa: N818  # what happened, not what is wrong
    """A client that went away."""


class Failing:
    """A streamer, logits processor or stopping criterion that raises at its n-th call."""

    def __init__(self, error: BaseException, at: int = 1) -> None:
        self.error, self.left = error, at

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise self.error
        return torch.zeros(1, dtype=torch.bool)

    put = __call__

    def end(self) -> None:
        """Nothing is left to say."""


ERRORS = [Gone(), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("exact", [True, False])
def test_a_prompt_whose_answer_is_cut_off_is_stored(
    llama: Any, open_session: OpenSession, prompt: Prompt, error: BaseException, exact: bool
) -> None:
    session, ids = open_session(llama, exact=exact), prompt(120)
    with pytest.raises(type(error)) as raised:
        session.generate(ids, streamer=Failing(error, at=3), **NEW)
    assert raised.value is error
    again = session.generate(ids, **NEW)
    assert again.loaded == (96 if exact else 119)
    assert torch.equal(again.sequences, llama.generate(torch.tensor([ids]), **NEW))
    assert session.troubles == 0


@pytest.mark.parametrize(
    "argument",
    [
        {"streamer": Failing(Gone())},  # hears the prompt before the last pass
        {"logits_processor": LogitsProcessorList([Failing(Gone())])},
        {"stopping_criteria": StoppingCriteriaList([Failing(Gone())])},
        {"max_length": 100, "max_new_tokens": None},
        {"stop_strings": "needs a tokenizer"},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_whatever_ends_a_call_leaves_the_passes_before_it(
    llama: Any, open_session: OpenSession, prompt: Prompt, argument: dict[str, Any]
) -> None:
    session, ids = open_session(llama), prompt(120)
    with pytest.raises((Gone, ValueError)):
        session.generate(ids, **{**NEW, **argument})
    assert session.load(ids).columns == 96


def test_passes_before_the_one_that_failed_are_stored(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session, ids = open_session(llama), prompt(120)

    def fail(done: int, _: int) -> None:
        if done == 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate(ids, on_pass=fail, **NEW)
    assert session.load(ids).columns == 64


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("plane", ["keys", "values"])
def test_a_pass_interrupted_inside_leaves_only_what_every_layer_has(
    llama: Any, open_session: OpenSession, prompt: Prompt, layer: int, plane: str
) -> None:
    """An interrupt between two layers, or between a layer's keys and its values."""
    real = type(llama.model.layers[0].self_attn).forward
    ids, calls = prompt(120), -1

    def interrupted(self: Any, *args: Any, **arguments: Any) -> Any:
        nonlocal calls
        out = real(self, *args, **arguments)
        if calls >= 0 and self.layer_idx == layer:
            calls += 1
            if calls == 3:
                past = arguments["past_key_values"].layers[layer]
                if plane == "keys":  # the values had not been put in yet
                    past.values = past.values[:, :, :64]
                raise KeyboardInterrupt
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(llama.model.layers[0].self_attn), "forward", interrupted)
        session, calls = open_session(llama), 0
        with pytest.raises(KeyboardInterrupt):
            session.generate(ids, **NEW)
        whole = 96 if (layer, plane) == (2, "values") else 64
        assert session.load(ids).columns == whole
        expected = llama.generate(torch.tensor([ids]), **NEW)
        assert torch.equal(session.generate(ids, **NEW).sequences, expected)


def test_nothing_is_stored_when_saving_is_off(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session, ids = open_session(llama), prompt(120)
    with pytest.raises(Gone):
        session.generate(ids, save=False, streamer=Failing(Gone(), at=3), **NEW)
    assert session.load(ids).columns == 0


def test_padded_rows_that_are_cut_off_are_stored_as_far_as_they_begin(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session, long, short = open_session(llama), prompt(120), prompt(30, seed=5)
    ids = torch.tensor([long, [0] * 90 + short])
    mask = (ids != 0).long()

    def fail(done: int, _: int) -> None:
        if done == 64:
            raise Gone

    with pytest.raises(Gone):
        session.generate(ids, mask, on_pass=fail, **NEW)
    assert session.load(long).columns == 64
    assert session.load(short).columns == 0
    assert session.troubles == 0


def test_a_model_changed_while_it_answers_is_not_stored(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = tiny(), prompt(120)
    session = open_session(model)

    class Tamper(Failing):
        def put(self, _: Any) -> None:
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight.mul_(1.5)

    session.generate(ids, streamer=Tamper(Gone()), **NEW)
    assert session.troubles == 1
    assert open_session(tiny()).load(ids).columns == 0
    portal = session.portal
    with portal.lookup(ids) as lookup:
        assert lookup.wait(HANG).tokens == 0


def test_ids_that_were_changed_in_place_name_nothing(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session, ids = open_session(llama), prompt(120)

    def rewrite(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows[:, 5] = 9
        return scores

    session.generate(ids, logits_processor=LogitsProcessorList([rewrite]), **NEW)
    assert session.load([*ids[:5], 9, *ids[6:]]).columns == 0
    assert session.load(ids).columns == 96
    assert session.troubles == 0
