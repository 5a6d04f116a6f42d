"""A family is tried by computing before its KV is stored, and refused in words where it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from kvlayer.errors import UnsupportedError
from kvlayer_transformers import Session, verdicts
from kvlayer_transformers.code import _KNOWN
from kvlayer_transformers.proof import TooSlow, of_family, of_model
from kvlayer_transformers.twin import WINDOW, randomise, twin_of

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
DECODER = {
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "vocab_size": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("kvlayer_transformers.remembered.cache_directory", lambda: tmp_path)
    verdicts.forget()
    yield
    verdicts.forget()


def paligemma() -> Any:
    text = {
        "model_type": "gemma",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 64,
    }
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=511, projection_dim=64
    )
    return randomise(transformers.PaliGemmaForConditionalGeneration(config), 1).eval()


class Encoder(LlamaForCausalLM):
    """A Llama whose tokens attend to all of what is computed with them."""

    def __init__(self, config: LlamaConfig) -> None:
        config._attn_implementation = "sdpa"
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.is_causal = False

    def forward(self, *args: Any, attention_mask: Any = None, **arguments: Any) -> Any:
        ids = arguments["input_ids"] if "input_ids" in arguments else args[0]
        past = arguments.get("past_key_values")
        done = 0 if past is None else past.get_seq_length()
        shape = (ids.shape[0], 1, ids.shape[1], done + ids.shape[1])
        return super().forward(*args, attention_mask=torch.zeros(shape), **arguments)


class Counted(LlamaForCausalLM):
    """A Llama whose keys are turned by how many columns its prompt has, not by its tokens."""

    def forward(self, *args: Any, position_ids: Any = None, **arguments: Any) -> Any:
        return super().forward(*args, position_ids=None, **arguments)


class Lengthy(LlamaForCausalLM):
    """A Llama that turns its keys otherwise once a sequence is longer than 64 tokens."""

    def forward(self, *args: Any, position_ids: Any = None, **arguments: Any) -> Any:
        if position_ids is not None and int(position_ids.max()) >= 64:
            position_ids = position_ids * 3
        return super().forward(*args, position_ids=position_ids, **arguments)


class Unbuildable(LlamaForCausalLM):
    """A class of which no second model can be made."""

    built = False

    def __init__(self, config: LlamaConfig) -> None:
        if Unbuildable.built:
            raise RuntimeError("only one of these")
        super().__init__(config)
        Unbuildable.built = True


class UnbuildableEncoder(Encoder):
    """The same, and wrong."""

    built = False

    def __init__(self, config: LlamaConfig) -> None:
        if UnbuildableEncoder.built:
            raise RuntimeError("only one of these")
        super().__init__(config)
        UnbuildableEncoder.built = True


def made(kind: Any) -> Any:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        pad_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    if hasattr(kind, "built"):
        kind.built = False
    return randomise(kind(config), 1).eval()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (paligemma, "PaliGemma.*answered otherwise"),
        (lambda: made(Encoder), "Encoder.*answered otherwise"),
        (lambda: made(Lengthy), "Lengthy.*depends on what follows|Lengthy.*otherwise"),
        (lambda: made(UnbuildableEncoder), "UnbuildableEncoder.*in two passes differs"),
        (
            lambda: transformers.BertLMHeadModel(
                transformers.BertConfig(
                    hidden_size=64,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    vocab_size=512,
                )
            ).eval(),
            "Bert.*answered otherwise",
        ),
    ],
)
def test_a_model_whose_prefix_does_not_determine_its_kv_opens_no_session(
    open_session: OpenSession, model: Callable[[], Any], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        open_session(model())


def test_a_model_that_puts_columns_of_its_own_in_front_is_refused(
    open_session: OpenSession,
) -> None:
    config = transformers.CpmAntConfig(
        vocab_size=512,
        hidden_size=64,
        num_attention_heads=4,
        dim_head=16,
        dim_ff=96,
        num_hidden_layers=2,
        prompt_length=8,
    )
    with pytest.raises(UnsupportedError, match="columns for one token"):
        open_session(transformers.CpmAntForCausalLM(config).eval())


@pytest.mark.parametrize(
    "model",
    [
        lambda: randomise(transformers.BartForCausalLM(transformers.BartConfig(**DECODER)), 1),
        lambda: made(Counted),
    ],
)
def test_a_model_that_counts_columns_shares_kv_of_unpadded_rows_alone(
    open_session: OpenSession, prompt: Prompt, model: Callable[[], Any]
) -> None:
    one, row = model().eval(), prompt(63)
    session = open_session(one)
    padded = torch.tensor([[0] * 37 + row])
    for call in (session.generate, session.load):
        with pytest.raises(UnsupportedError, match="padded on the left"):
            call(padded, (padded != 0).long())
    expected = one.generate(torch.tensor([row]), **NEW)
    for loaded in (0, 32):
        alone = session.generate(row, **NEW)
        assert alone.loaded == loaded
        assert torch.equal(alone.sequences, expected)


def test_a_class_without_a_twin_is_tried_itself(open_session: OpenSession, prompt: Prompt) -> None:
    model, ids = made(Unbuildable), prompt(70)
    session = open_session(model)
    assert [session.generate(ids, **NEW).loaded for _ in range(2)] == [0, 64]
    with pytest.raises(UnsupportedError, match="no small twin"):
        session.load([0, *ids], torch.tensor([[0] + [1] * 70]))


def test_a_trial_can_be_switched_off(
    open_session: OpenSession, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, tried = made(Encoder), prompt(20), list[Any]()
    for name in ("of_family", "of_model"):
        monkeypatch.setattr(verdicts, name, lambda *args, **_: tried.append(args))
    session = open_session(model, prove=False)
    found = session.generate(ids, **NEW).sequences
    assert torch.equal(found, model.generate(torch.tensor([ids]), **NEW))
    assert tried == []


class Slow(LlamaForCausalLM):
    """A Llama that advances the clock with every pass, and counts them."""

    def forward(self, *args: Any, **arguments: Any) -> Any:
        CLOCK.append(CLOCK[-1] + 25.0)
        return super().forward(*args, **arguments)


CLOCK: list[float] = []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    CLOCK[:] = [0.0]
    monkeypatch.setattr("kvlayer_transformers.proof.time", SimpleNamespace(monotonic=now))
    return now


def now() -> float:
    return CLOCK[-1]


def test_a_model_too_slow_to_be_tried_is_believed_to_be_like_its_twin_in_this_process(
    open_session: OpenSession,
    prompt: Prompt,
    clock: Callable[[], float],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = made(Slow), prompt(70)
    stored: list[str] = []
    monkeypatch.setattr(
        "kvlayer_transformers.remembered.Remembered.put", lambda _, key, __: stored.append(key)
    )
    monkeypatch.setattr(Slow, "__module__", "transformers.models.slow")  # as if it were theirs
    monkeypatch.setattr("kvlayer_transformers.code._KNOWN", _KNOWN | {__name__.split(".")[0]})
    session = open_session(model)
    assert "Slow itself was not tried: not done within 60 s" in caplog.text
    assert stored == []  # the next process tries again
    assert [session.generate(ids, **NEW).loaded for _ in range(2)] == [0, 64]
    before = clock()
    open_session(model)  # this one does not
    assert clock() - before <= 25.0  # nothing but what asks for the geometry
    caplog.clear()
    CLOCK[:] = [0.0]
    verdicts.forget()
    monkeypatch.setattr("kvlayer_transformers.proof._SECONDS", 1e6)
    open_session(model)
    assert "not tried" not in caplog.text
    assert len(stored) == 1


class UnbuildableSlow(Slow):
    """The same, of which no second model can be made."""

    built = False

    def __init__(self, config: LlamaConfig) -> None:
        if UnbuildableSlow.built:
            raise RuntimeError("only one of these")
        super().__init__(config)
        UnbuildableSlow.built = True


@pytest.mark.usefixtures("clock")
def test_a_model_too_slow_to_be_tried_without_a_twin_is_refused(open_session: OpenSession) -> None:
    with pytest.raises(UnsupportedError, match="not done within 60 s, and no small twin"):
        open_session(made(UnbuildableSlow))


@pytest.mark.usefixtures("clock")
def test_a_pass_of_a_model_too_slow_ends_at_its_next_layer() -> None:
    model = made(Slow)
    reached: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: reached.append(index))
    with pytest.raises(TooSlow):
        of_model(model, padding=True)
    # Two passes of 25 s are in time; the third ends where its first layer asks for the past.
    assert reached == [0, 1, 2] * 2
    assert CLOCK[-1] == 75.0


def test_a_verdict_is_remembered_and_another_model_is_tried(
    tiny: Tiny, open_session: OpenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **arguments: Any) -> Any:
            tried.append(name)
            return real(*args, **arguments)

        return counted

    monkeypatch.setattr(verdicts, "of_family", counting("family", of_family))
    monkeypatch.setattr(verdicts, "of_model", counting("model", of_model))
    open_session(tiny())
    assert tried == ["family", "model"]
    open_session(tiny(seed=1))  # other weights
    assert tried == ["family", "model"]
    open_session(tiny().to(torch.bfloat16))
    assert tried == ["family", "model", "model"]
    open_session(tiny(rms_norm_eps=1e-3))
    assert tried[3:] == ["family", "model"]
    other = tiny()
    other.set_attn_implementation("eager")
    open_session(other)
    assert tried[5:] == ["family", "model"]


def test_a_trial_leaves_no_trace(tiny: Tiny, open_session: OpenSession) -> None:
    model = tiny()
    torch.manual_seed(3)
    expected = torch.rand(1)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    config = model.config.to_dict()
    verbosity = transformers.logging.get_verbosity()
    torch.manual_seed(3)
    open_session(model)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_default_dtype() is torch.float32
    assert transformers.logging.get_verbosity() == verbosity
    assert model.config.to_dict() == config
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_fault(tiny: Tiny, dtype: torch.dtype) -> None:
    for seed in range(3):
        model = randomise(tiny(seed=seed), seed).to(dtype)
        assert of_model(model, padding=True).pieces is None


def test_a_twin_shows_every_kind_of_layer_and_passes_its_window(tiny: Tiny) -> None:
    model = tiny("Gemma3", num_hidden_layers=12, head_dim=16, sliding_window=512)
    twin = twin_of(model)
    assert set(twin.config.layer_types) == {"sliding_attention", "full_attention"}
    assert twin.config.sliding_window == WINDOW
    assert len(twin.config.layer_types) == twin.config.num_hidden_layers == 6
    assert sum(each.numel() for each in twin.parameters()) < 1_000_000
    assert of_family(model).pieces is None


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Counted])
def test_a_verdict_outlives_the_process_for_classes_of_transformers(
    open_session: OpenSession, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    def tried() -> int:
        caplog.clear()
        verdicts.forget()
        open_session(made(kind))
        return sum("tried" in record.getMessage() for record in caplog.records)

    caplog.set_level(logging.INFO, "kvlayer_transformers")
    expected = [1, 0] if kind is LlamaForCausalLM else [1, 1]
    assert [tried(), tried()] == expected


def test_code_that_was_patched_is_tried_anew(
    tiny: Tiny, open_session: OpenSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_session(tiny())
    kind = type(tiny().model.layers[0].self_attn)
    real = kind.forward

    def both_ways(self: Any, *args: Any, **arguments: Any) -> Any:
        self.is_causal = False
        arguments["attention_mask"] = torch.zeros(1, 1, 1, 1)
        return real(self, *args, **arguments)

    monkeypatch.setattr(kind, "forward", both_ways)
    with pytest.raises(UnsupportedError, match="answered otherwise"):
        open_session(tiny())


def test_a_refusal_is_not_remembered_on_disk(open_session: OpenSession, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        open_session(paligemma())
    assert not list(tmp_path.iterdir())
