"""A session answers as the model alone would, from KV it did not compute again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvlayer import Portal, Scope
from kvlayer.errors import ClosedError, LayoutError, TokensError, UnsupportedError
from kvlayer_transformers import Generation, Geometry, Session
from kvlayer_transformers.twin import build

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def alone(model: Any, ids: list[int], **arguments: Any) -> torch.Tensor:
    """What the model generates without a session, in one pass over the prompt."""
    rows = torch.tensor([ids])
    out: torch.Tensor = model.generate(
        rows, attention_mask=torch.ones_like(rows), **{**NEW, **arguments}
    )
    return out


def answer(generation: Generation, ids: list[int]) -> list[int]:
    new: list[int] = generation.sequences[0, len(ids) :].tolist()
    assert len(set(new)) > 4, "greedy output that repeats one token proves nothing"
    return new


def altered(past: Any) -> Any:
    """A copy of a past with other values."""
    other = DynamicCache()
    for index, layer in enumerate(past.layers):
        other.update(layer.keys.clone(), -layer.values, index)
    return other


def computed(model: Any, ids: list[int]) -> Any:
    past = DynamicCache()
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=past)
    return past


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_warm_run_loads_and_is_equal_to_the_bit(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, dtype: torch.dtype
) -> None:
    model, ids = tiny().to(dtype), prompt(150)
    session = open_session(model)
    cold = session.generate(ids, **NEW)
    warm = session.generate(ids, **NEW)
    assert (cold.loaded, warm.loaded) == (0, 128)
    assert answer(cold, ids) == answer(warm, ids)
    past, columns = session.load(ids)
    assert columns == 128
    reference = DynamicCache()
    with torch.no_grad():
        for start in range(0, 128, 32):
            model(torch.tensor([ids[start : start + 32]]), past_key_values=reference)
    for found, expected in zip(past.layers, reference.layers, strict=True):
        assert torch.equal(found.keys, expected.keys)
        assert torch.equal(found.values, expected.values)


def test_a_session_answers_as_the_model_alone(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    ids = prompt(150)
    session = open_session(llama)
    expected = alone(llama, ids)
    for _ in range(2):
        assert torch.equal(session.generate(ids, **NEW).sequences, expected)


def test_altered_kv_alters_the_answer(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    """The control of every equality here: what is loaded decides what is answered."""
    ids = prompt(150)
    session = open_session(llama)
    session.save(ids, altered(computed(llama, ids)))
    poisoned = session.generate(ids, **NEW)
    assert poisoned.loaded == 128
    assert answer(poisoned, ids) != alone(llama, ids)[0, 150:].tolist()


def test_a_new_process_would_load_from_the_directory(
    llama: Any, open_session: OpenSession, prompt: Prompt, tmp_path: Path
) -> None:
    ids = prompt(150)
    with open_session(llama, tmp_path) as session:
        cold = session.generate(ids, **NEW)
    warm = open_session(llama, tmp_path).generate(ids, **NEW)
    assert warm.loaded == 128
    assert answer(warm, ids) == answer(cold, ids)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 16, 32, 33, 64, 65, 128])
def test_reuse_never_covers_the_whole_prompt(
    llama: Any, open_session: OpenSession, prompt: Prompt, exact: bool, tokens: int
) -> None:
    ids = prompt(tokens)
    session = open_session(llama, exact=exact)
    longer = [*ids, *prompt(40, seed=2)]
    session.save(longer, computed(llama, longer))
    past, columns = session.load(ids)
    assert past.get_seq_length() == columns < tokens
    warm = session.generate(ids, **NEW)
    assert warm.loaded == columns
    assert torch.equal(warm.sequences, alone(llama, ids))


def test_a_past_over_the_whole_prompt_is_an_error_not_a_wrong_answer(
    llama: Any, open_session: OpenSession, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(64)
    session = open_session(llama)
    session.save(prompt(80), computed(llama, prompt(80)))
    monkeypatch.setattr("kvlayer_transformers.transfer.reusable_columns", lambda *_: 64)
    with pytest.raises(AssertionError, match="covers all 64 columns"):
        session.generate(ids, **NEW)


def test_exact_reuse_ends_at_a_pass_and_a_chunk(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session = open_session(llama, pass_tokens=64)
    session.generate(prompt(150), **NEW)
    assert session.load(prompt(150)).columns == 128
    assert session.load(prompt(127)).columns == 64
    assert session.load(prompt(64)).columns == 0


def test_the_whole_hit_is_used_tails_included_when_asked_for(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    ids = prompt(150)
    session = open_session(llama, exact=False)
    first = session.generate(ids, **NEW)
    again = session.generate(ids, **NEW)
    assert again.loaded == 144
    assert answer(again, ids) == answer(first, ids)
    # The answer's own tokens have KV like any other, all but the last; tails are even here.
    said = first.sequences[0, :159].tolist()
    session.generate(said, max_new_tokens=1, do_sample=False)
    assert session.load([*said, *prompt(20, seed=3)]).columns == 158


def test_a_growing_conversation_reuses_questions_and_answers(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session = open_session(llama, exact=False)
    ids = prompt(70)
    for turn in range(1, 4):
        said = session.generate(ids, **NEW)
        assert torch.equal(said.sequences, alone(llama, ids))
        known = said.sequences.shape[1] - 1
        ids = [*said.sequences[0].tolist(), *prompt(30, seed=turn + 10)]
        assert 0 <= known - session.load(ids).columns < 2


def test_answers_are_left_out_when_asked_for(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session = open_session(llama, exact=False, keep_answers=False)
    ids = prompt(70)
    said = session.generate(ids, **NEW).sequences[0].tolist()
    assert session.load([*said, *prompt(30, seed=2)]).columns == 70


def test_what_comes_before_first_token_is_not_read(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    ids = prompt(100)
    session = open_session(llama, exact=False)
    session.save(ids[:64], computed(llama, ids[:64]))
    past = computed(llama, ids)
    for layer in past.layers:
        layer.keys[:, :, :64], layer.values[:, :, :64] = 0, 0
    (report,) = session.save(ids, past, first_token=64)
    assert (report.stored, report.skipped, report.failed) == (3, 0, ())
    assert torch.equal(session.generate(ids, **NEW).sequences, alone(llama, ids))


def test_sampling_goes_the_same_way_cold_and_warm(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session, ids, runs = open_session(llama), prompt(150), []
    for _ in range(2):
        torch.manual_seed(7)
        runs.append(session.generate(ids, max_new_tokens=12, do_sample=True))
    assert [run.loaded for run in runs] == [0, 128]
    assert torch.equal(runs[0].sequences, runs[1].sequences)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Mistral", {"sliding_window": 48}),
        ("Gemma3", {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 48}),
        ("Qwen3", {"head_dim": 32}),
    ],
)
def test_models_whose_attention_has_a_window_are_carried_in_full(
    tiny: Tiny,
    open_session: OpenSession,
    prompt: Prompt,
    architecture: str,
    changes: dict[str, Any],
) -> None:
    model, ids = tiny(architecture, **changes), prompt(150)
    session = open_session(model)
    for loaded in (0, 128):
        generation = session.generate(ids, **NEW)
        assert generation.loaded == loaded
        assert torch.equal(generation.sequences, alone(model, ids))


def test_positions_that_an_image_moved_are_those_of_its_own_call(
    open_session: OpenSession, prompt: Prompt
) -> None:
    config = transformers.Qwen2VLConfig()
    model = build(transformers.Qwen2VLForConditionalGeneration, config)
    ids = [3 + token % 300 for token in prompt(70)]
    session = open_session(model)
    expected = alone(model, ids)
    for loaded in (0, 64):
        model.model.rope_deltas = torch.tensor([[-9]])  # as a prompt with an image leaves it
        generation = session.generate(ids, **NEW)
        assert generation.loaded == loaded
        assert torch.equal(generation.sequences, expected)
    rows = torch.tensor([ids, ids])
    assert torch.equal(session.generate(rows, **NEW).sequences[1:], expected)


def test_a_portal_of_the_callers_stays_open(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    owner = open_session(llama)
    with Session(llama, owner.portal, pass_tokens=48) as guest:
        guest.generate(prompt(100), **NEW)
    assert owner.generate(prompt(100), **NEW).loaded == 96


def test_the_cache_hears_how_fast_prompts_are_computed(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    def rate(session: Session) -> float | None:
        return session.portal.cache.control.stats().prefill_tokens_per_second

    silent, telling = open_session(llama), open_session(llama, report_prefill=True)
    silent.generate(prompt(150), **NEW)
    assert rate(silent) is None
    telling.generate(prompt(20), **NEW)  # all of it is one pass, which answers, too
    telling.load(prompt(1))  # waits until the report has been heard
    assert rate(telling) is None
    telling.generate(prompt(150), **NEW)
    telling.load(prompt(1))
    assert (rate(telling) or 0) > 0


def test_a_closed_session_says_so(llama: Any, open_session: OpenSession, prompt: Prompt) -> None:
    session = open_session(llama)
    session.close()
    with pytest.raises(ClosedError):
        session.generate(prompt(40), **NEW)


@pytest.mark.parametrize("width", [0, -32, 24, 33])
def test_a_pass_that_is_no_multiple_of_the_chunk_is_refused(
    llama: Any, open_session: OpenSession, width: int
) -> None:
    with pytest.raises(UnsupportedError, match="multiple of the chunk"):
        open_session(llama, pass_tokens=width)


def test_a_past_of_another_batch_is_refused(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    past = computed(llama, prompt(40))
    with pytest.raises(LayoutError, match="past has 1 rows, the ids have 2"):
        open_session(llama).save(torch.tensor([prompt(40)] * 2), past)


@pytest.mark.parametrize("ids", [[], [[]], [1.5], [[[1]]], "text", [[1, 2], [3]], None])
def test_ids_of_the_wrong_kind_are_refused(llama: Any, open_session: OpenSession, ids: Any) -> None:
    with pytest.raises(TokensError):
        open_session(llama).generate(ids, **NEW)


def test_geometry_that_is_known_is_not_probed_again(
    llama: Any, open_session: OpenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = Geometry.of(llama)
    monkeypatch.setattr(Geometry, "of", None)
    session = open_session(llama, geometry=geometry)
    assert isinstance(session.portal, Portal)
    assert session.load([5] * 40, scope=Scope.private("a")).columns == 0
