"""Arguments of ``generate`` are known to leave KV alone, or refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BatchEncoding,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation import MaxLengthCriteria, MinLengthLogitsProcessor

from kvlayer.errors import TokensError, UnsupportedError
from kvlayer_transformers import Session

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}

# A value for every field of a generation config that is not its default.
OTHER: dict[str, Any] = {
    "max_length": 64,
    "max_new_tokens": 3,
    "min_length": 45,
    "min_new_tokens": 4,
    "early_stopping": True,
    "max_time": 100.0,
    "stop_strings": None,  # needs a tokenizer
    "do_sample": False,
    "num_beams": 2,
    "use_cache": False,
    "cache_implementation": "static",
    "min_p": 0.1,
    "top_h": 0.5,
    "repetition_penalty": 1.3,
    "encoder_repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[7], [9, 11]],
    "sequence_bias": [[[7], -5.0]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": (2, 1.2),
    "suppress_tokens": [7, 9],
    "begin_suppress_tokens": [7, 9],
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"},
    "num_return_sequences": 2,
    "pad_token_id": 3,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "is_assistant": True,
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 1,
    "compile_config": None,
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[7]],
    "cache_config": {"nbits": 4},
    "assistant_ensemble_weight": 0.5,
    "num_assistant_tokens_schedule": "heuristic",
    "speculation_type": "x",
    "continuous_batching_config": object(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n in vars(GenerationConfig()) if n[0] != "_"])
def test_every_field_of_a_generation_config_is_honoured_or_refused_by_name(
    llama: Any, open_session: OpenSession, prompt: Prompt, name: str
) -> None:
    """Fields that a release adds are found here: they are refused until they are known."""
    value, ids = OTHER.get(name, 7), prompt(40)
    more = {"eos_token_id": 5} if name == "exponential_decay_length_penalty" else {}
    rows = torch.tensor([ids])
    session = open_session(llama)
    session.generate(ids, **NEW)
    words = ""
    try:
        found = session.generate(ids, **{**NEW, **more, name: value})
    except UnsupportedError as exc:
        found, words = None, str(exc)
    if found is None:
        assert name in words
        return
    expected = llama.generate(
        rows, attention_mask=torch.ones_like(rows), **{**NEW, **more, name: value}
    )
    assert found.loaded == 32
    assert torch.equal(found.sequences, expected)
    assert session.troubles == 0


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ({"past_key_values": object()}, "session provides it"),
        ({"use_cache": False}, "use_cache=True"),
        ({"cache_implementation": "offloaded"}, "DynamicCache"),
        ({"prefill_chunk_size": 16}, "pass_tokens"),
        ({"num_beams": 2}, "reorder"),
        ({"num_return_sequences": 2}, "one prompt"),
        ({"return_dict_in_generate": True}, "load"),
        ({"output_attentions": True}, "load"),
        ({"assistant_model": object()}, "rolls"),
        ({"assistant_early_exit": 1}, "rolls"),
        ({"prompt_lookup_num_tokens": 2}, "rolls"),
        ({"use_mtp": True}, "rolls"),
        ({"custom_generate": lambda *_: None}, "transformers' own"),
        ({"inputs_embeds": torch.zeros(1, 40, 64)}, "token ids"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, "leave pixel_values out"),
        ({"position_ids": torch.arange(40)[None] + 5}, "position 0"),
        ({"cache_position": torch.arange(40)}, "positions"),
        ({"token_type_ids": torch.ones(1, 40, dtype=torch.long)}, "all 0"),
        ({"adapter_names": ["a"]}, "set_adapter"),
        ({"made_up": {"of": "a dict"}}, "leave made_up out"),
        ({"negative_prompt_ids": torch.tensor([[5]])}, "leave"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams=1"),
        ({"generation_config": {"num_beams": 1}}, "GenerationConfig"),
    ],
)
def test_what_is_not_known_to_be_harmless_is_refused_with_a_way_out(
    llama: Any, open_session: OpenSession, prompt: Prompt, argument: dict[str, Any], word: str
) -> None:
    name = next(iter(argument))
    with pytest.raises(UnsupportedError) as refused:
        open_session(llama).generate(prompt(40), max_new_tokens=4, **argument)
    assert name in str(refused.value) or name == "generation_config"
    assert word in f"{refused.value} {refused.value.hint}"


def test_the_models_own_generation_config_is_looked_at(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model = tiny()
    session = open_session(model)
    model.generation_config.num_beams = 2
    with pytest.raises(UnsupportedError, match="num_beams=2") as refused:
        session.generate(prompt(40), **NEW)
    assert "pass num_beams=1" in refused.value.hint
    session.generate(prompt(40), num_beams=1, **NEW)
    with pytest.raises(UnsupportedError, match="num_beams=2"):
        session.generate(prompt(40), generation_config=GenerationConfig(max_new_tokens=4))


@pytest.mark.parametrize("published", ["hybrid", "dynamic"])
def test_a_published_cache_that_transformers_sets_aside_is_no_reason_to_refuse(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, published: str
) -> None:
    model, ids = tiny(), prompt(40)
    session = open_session(model)
    expected = session.generate(ids, **NEW).sequences
    model.generation_config.cache_implementation = published
    assert torch.equal(session.generate(ids, **NEW).sequences, expected)
    stated = GenerationConfig(max_new_tokens=6, do_sample=False, cache_implementation=published)
    assert torch.equal(session.generate(ids, generation_config=stated).sequences, expected)
    assert stated.cache_implementation == published


def test_fields_that_transformers_does_not_know_are_not_read_by_it(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = tiny(), prompt(40)
    expected = model.generate(torch.tensor([ids]), **NEW)
    model.generation_config.chat_format = "chatml"
    session = open_session(model)
    found = [session.generate(ids, **NEW) for _ in range(2)]
    assert [answer.loaded for answer in found] == [0, 32]
    assert all(torch.equal(answer.sequences, expected) for answer in found)


def test_arguments_that_only_read_are_passed_on(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    class Streamer:
        heard = 0

        def put(self, value: torch.Tensor) -> None:
            self.heard += value.numel()

        def end(self) -> None:
            self.heard += 1000

    streamer, ids = Streamer(), prompt(40)
    session = open_session(llama)
    for _ in range(2):
        session.generate(
            ids,
            max_new_tokens=4,
            streamer=streamer,
            logits_processor=LogitsProcessorList([MinLengthLogitsProcessor(50, 2, device="cpu")]),
            stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(42)]),
            prefix_allowed_tokens_fn=lambda *_: list(range(3, 512)),
            synced_gpus=False,
            pixel_values=None,
            token_type_ids=torch.zeros(1, 40, dtype=torch.long),
        )
    assert streamer.heard == 2 * (40 + 2 + 1000)


def test_every_argument_of_generate_is_judged(llama: Any) -> None:
    """One that a release adds to the signature is refused by name, as any other."""
    from kvlayer_transformers.arguments import checked_arguments

    harmless = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"}
    for name, each in inspect.signature(type(llama).generate).parameters.items():
        if name in {"self", "inputs", "generation_config", "kwargs"}:
            continue
        assert each.kind is not inspect.Parameter.VAR_POSITIONAL
        if name in harmless:
            assert name in checked_arguments(llama, {name: object()})
        else:
            with pytest.raises(UnsupportedError, match=name):
                checked_arguments(llama, {name: object()})


def encoding(rows: list[list[int]], **more: Any) -> BatchEncoding:
    ids = torch.tensor(rows)
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), **more})


def test_prompts_are_taken_in_every_form_that_is_clear(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    session, ids = open_session(llama), prompt(40)
    rows = torch.tensor([ids])
    expected = session.generate(rows, **NEW).sequences
    types = {"token_type_ids": torch.zeros(1, 40, dtype=torch.long)}
    for form in (
        (encoding([ids]),),
        (dict(encoding([ids])),),
        (encoding([ids], **types),),
        ({"input_ids": [ids], "attention_mask": [[1] * 40]},),
        (rows.numpy(),),
        (rows.to(torch.int32), torch.ones(1, 40)),
        ([ids], [[True] * 40]),
        (tuple(ids),),
    ):
        assert torch.equal(session.generate(*form, **NEW).sequences, expected)
        assert session.load(*form).columns == 32
    assert torch.equal(session.generate(inputs=rows, **NEW).sequences, expected)
    assert torch.equal(session.generate(**encoding([ids]), **NEW).sequences, expected)


@pytest.mark.parametrize(
    ("form", "word"),
    [
        ((["a"],), "ids"),
        (("text",), "tokenize"),
        (([[3, 4, 5], [6, 7]],), "padding=True"),
        (({"ids": [3]},), "no input_ids"),
        ((encoding([[3, 4]]), torch.ones(1, 2)), "beside an encoding"),
        (([3, 4], torch.tensor([[1, 1, 1]])), "mask"),
        (([3, 4], torch.tensor([[1, 2]])), "other values than 0 and 1"),
        (([3, 4, 5], torch.tensor([[1, 0, 1]])), "0 after a 1"),
        (([3, 4, 5], torch.tensor([[1, 1, 0]])), "padded on the left"),
        (([3, 4], torch.ones(1, 1, 2, 2)), "mask"),
        (([3, 512],), "vocabulary of 512"),
        (([3, -1],), "vocabulary"),
        (([2**40],), "vocabulary"),
        ((torch.zeros(1, 4, device="meta", dtype=torch.long),), "input_ids"),
    ],
)
def test_prompts_that_are_not_clear_are_refused_in_words_that_help(
    llama: Any, open_session: OpenSession, form: tuple[Any, ...], word: str
) -> None:
    session = open_session(llama)
    for call in (session.generate, session.load):
        with pytest.raises(TokensError) as refused:
            call(*form)
        assert word in f"{refused.value} {refused.value.hint}"


def test_one_prompt_is_passed_once(llama: Any, open_session: OpenSession) -> None:
    with pytest.raises(TokensError, match="both inputs and input_ids"):
        open_session(llama).generate([3, 4], inputs=[3, 4])


def test_an_encoding_of_more_than_text_is_refused_by_the_field_that_is_more(
    llama: Any, open_session: OpenSession
) -> None:
    image = encoding([[3, 4]], pixel_values=torch.zeros(1, 3, 8, 8))
    session = open_session(llama)
    for call in (session.generate, session.load):
        with pytest.raises(UnsupportedError, match="pixel_values"):
            call(image)


def test_use_cache_none_is_no_default(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    """transformers takes it for False, and would feed the past its own prompt again."""
    session = open_session(llama)
    with pytest.raises(UnsupportedError, match="use_cache=None"):
        session.generate(prompt(40), use_cache=None, **NEW)


def test_token_types_that_are_all_zero_pass_where_they_mean_nothing(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    """GPT-2 looks them up in its table of words; a Llama does not know them, BERT adds type 0."""
    rows = torch.tensor([prompt(40)])
    zeros = torch.zeros_like(rows)
    gpt2 = open_session(_gpt2())
    with pytest.raises(UnsupportedError, match="another answer with token_type_ids=<zeros>"):
        gpt2.generate(rows, token_type_ids=zeros, **NEW)
    with pytest.raises(UnsupportedError, match="token_type_ids"):
        gpt2.load({"input_ids": rows, "token_type_ids": zeros})
    for model in (llama, _bert()):
        session = open_session(model)
        session.generate(rows, token_type_ids=zeros, **NEW)
        found = session.generate(rows, token_type_ids=zeros, **NEW)
        assert found.loaded == 32
        assert torch.equal(found.sequences, model.generate(rows, **NEW))


def _gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1
    )
    config.eos_token_id = None
    return GPT2LMHeadModel(config).eval()


def _bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        is_decoder=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return BertLMHeadModel(config).eval()


def test_padding_is_guessed_as_transformers_guesses_it(
    llama: Any, open_session: OpenSession, prompt: Prompt
) -> None:
    """Id 0 is the padding of this model; an end token is never taken for padding."""
    session = open_session(llama, exact=False)
    alone = session.generate(prompt(40), **NEW)
    padded = torch.tensor([[0] * 9 + prompt(40)])
    found = session.generate(padded, **NEW)
    assert found.loaded == 41
    assert torch.equal(found.sequences, llama.generate(padded, **NEW))
    assert torch.equal(found.sequences[:, 9:], alone.sequences)
    inside = torch.tensor([prompt(40)])
    inside[0, 20] = 0
    with pytest.raises(TokensError, match="takes id 0 for padding") as caught:
        session.generate(inside, **NEW)
    assert "attention_mask=" in str(caught.value.hint)
    for more in ({"eos_token_id": [5, 0]}, {"pad_token_id": 3}, {"pad_token_id": None}):
        found = session.generate(inside, **NEW, **more)
        assert torch.equal(found.sequences, llama.generate(inside, **NEW, **more))
    found = session.generate(inside, torch.ones_like(inside), **NEW)
    expected = llama.generate(inside, attention_mask=torch.ones_like(inside), **NEW)
    assert torch.equal(found.sequences, expected)
