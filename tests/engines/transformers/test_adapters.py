"""KV of an adapted model is the adapter's: judged at every call, by content and never by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvlayer import Scope
from kvlayer.errors import UnsupportedError
from kvlayer_transformers import Session

peft = pytest.importorskip("peft")
# PEFT asks this transformers under a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
A, B = Scope(adapter=b"\1" * 32), Scope(adapter=b"\2" * 32)


def lora(**changes: Any) -> Any:
    fields = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    return peft.LoraConfig(**{**fields, **changes})


def strong(model: Any, seed: int = 1) -> Any:
    """Adapters that change answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.copy_(torch.randn(each.shape, generator=generator) * 0.5)
    return model.eval()


def wrapped(tiny: Tiny, *names: str) -> Any:
    model = peft.get_peft_model(tiny(), lora(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora())
    return strong(model)


def answer(model: Any, ids: list[int]) -> torch.Tensor:
    rows = torch.tensor([ids])
    out: torch.Tensor = model.generate(input_ids=rows, **NEW)
    return out


def test_adapters_are_told_apart_by_the_scopes_that_name_them(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = wrapped(tiny, "first", "second"), prompt(70)
    session = open_session(model)
    for name, scope in (("first", A), ("second", B), ("first", A), ("second", B)):
        model.set_adapter(name)
        assert torch.equal(session.generate(ids, scope=scope, **NEW).sequences, answer(model, ids))
    assert session.load(ids, scope=B).columns == 64


def test_an_adapter_that_joins_later_must_be_named(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = tiny(), prompt(70)
    session = open_session(model)
    base = session.generate(ids, **NEW).sequences
    model.add_adapter(lora(), adapter_name="x")
    strong(model)
    for call in (lambda: session.generate(ids, **NEW), lambda: session.load(ids)):
        with pytest.raises(UnsupportedError, match="scope names none"):
            call()
    adapted = session.generate(ids, scope=A, **NEW)
    assert adapted.loaded == 0
    assert torch.equal(adapted.sequences, answer(model, ids))
    model.disable_adapters()
    again = session.generate(ids, **NEW)
    assert again.loaded == 64
    assert torch.equal(again.sequences, base)


def test_a_name_stands_for_the_adapter_it_was_first_used_with(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = wrapped(tiny, "first", "second"), prompt(70)
    session = open_session(model)
    model.set_adapter("first")
    session.generate(ids, scope=A, **NEW)
    model.set_adapter("second")
    with pytest.raises(UnsupportedError, match="with other weights"):
        session.generate(ids, scope=A, **NEW)
    with pytest.raises(UnsupportedError, match="with other weights"):
        session.load(ids, scope=A)
    with model.disable_adapter(), pytest.raises(UnsupportedError, match="not active"):
        session.generate(ids, scope=A, **NEW)


def test_a_name_in_peft_is_no_identity(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    """Loaded again under another name the adapter is the same; under its own, another may come."""
    model, ids = wrapped(tiny, "first"), prompt(70)
    session = open_session(model)
    expected = session.generate(ids, scope=A, **NEW).sequences
    kept = peft.get_peft_model_state_dict(model, adapter_name="first")
    model.add_adapter("again", lora())
    peft.set_peft_model_state_dict(model, kept, adapter_name="again")
    model.set_adapter("again")
    model.delete_adapter("first")
    same = session.generate(ids, scope=A, **NEW)
    assert same.loaded == 64
    assert torch.equal(same.sequences, expected)
    model.add_adapter("first", lora())
    model.set_adapter("first")
    strong(model, seed=9)
    with pytest.raises(UnsupportedError, match="with other weights"):
        session.generate(ids, scope=A, **NEW)


def test_an_adapter_that_was_trained_on_is_another(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = wrapped(tiny, "first"), prompt(70)
    session = open_session(model)
    session.generate(ids, scope=A, **NEW)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["first"].weight.mul_(2)
    with pytest.raises(UnsupportedError, match="with other weights"):
        session.generate(ids, scope=A, **NEW)
    session.generate(ids, scope=B, **NEW)
    layer.scaling["first"] *= 2
    with pytest.raises(UnsupportedError, match="with other weights"):
        session.generate(ids, scope=B, **NEW)


def test_names_in_a_batch_are_refused(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = wrapped(tiny, "first", "second"), torch.tensor([prompt(70)] * 2)
    with pytest.raises(UnsupportedError, match="adapter_names"):
        open_session(model).generate(ids, scope=[A, B], adapter_names=["first", "second"], **NEW)


def test_merged_adapters_are_refused(tiny: Tiny, open_session: OpenSession, prompt: Prompt) -> None:
    model, ids = wrapped(tiny, "first"), prompt(70)
    session = open_session(model)
    session.generate(ids, scope=A, **NEW)
    model.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"merged|content of"):
        session.generate(ids, scope=A, **NEW)
    with pytest.raises(UnsupportedError, match="merged"):
        open_session(model)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        lambda: lora(alora_invocation_tokens=[7, 8]),
    ],
)
def test_adapters_that_are_more_than_weights_are_refused(
    tiny: Tiny, open_session: OpenSession, config: Callable[[], Any]
) -> None:
    model = peft.get_peft_model(tiny(), config()).eval()
    with pytest.raises(UnsupportedError, match="cannot carry"):
        open_session(model)


def test_weights_below_an_adapter_are_watched(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = wrapped(tiny, "first"), prompt(70)
    session = open_session(model)
    session.generate(ids, scope=A, **NEW)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.data.mul_(2)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.self_attn\.q_proj\.weight"):
        session.generate(ids, scope=A, **NEW)


@pytest.mark.parametrize("through", ["data", "numpy"])
def test_an_adapter_whose_weights_are_swapped_behind_autograd_is_another(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, through: str
) -> None:
    """As PEFT's hot swap does it where a model is compiled."""
    model, ids = wrapped(tiny, "first"), prompt(70)
    session = open_session(model)
    session.generate(ids, scope=A, **NEW)
    weights = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        if through == "data":
            weight.data.copy_(-before[name])
        else:
            weight.detach().numpy()[...] *= -1
    with pytest.raises(UnsupportedError, match="other weights"):
        session.generate(ids, scope=A, **NEW)
    swapped = session.generate(ids, scope=B, **NEW)
    assert swapped.loaded == 0
    assert torch.equal(swapped.sequences, answer(model, ids))
    for name, weight in weights.items():
        weight.data.copy_(before[name])
    assert session.load(ids, scope=A).columns == 64


def test_modules_that_an_adapter_saves_whole_are_part_of_it(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    fields = {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}
    model, ids = peft.get_peft_model(tiny(), lora(**fields), adapter_name="first"), prompt(70)
    model.add_adapter("second", lora(**fields))
    model.eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_" in name:
                each.zero_()
            if "modules_to_save.second" in name:
                each.copy_(torch.randn(each.shape, generator=generator))
    session = open_session(model)
    session.generate(ids, scope=A, **NEW)
    model.set_adapter("second")
    with pytest.raises(UnsupportedError, match="other weights"):
        session.generate(ids, scope=A, **NEW)
    found = session.generate(ids, scope=B, **NEW)
    assert torch.equal(found.sequences, answer(model, ids))
    with model.disable_adapter():
        found = session.generate(ids, **NEW)
        assert torch.equal(found.sequences, answer(model, ids))
    later = lora(**fields)
    model.add_adapter("third", later)
    model.set_adapter("first")
    assert session.load(ids, scope=A).columns == 64
