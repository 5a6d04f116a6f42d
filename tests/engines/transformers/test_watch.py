"""What changes in a model after its session was opened is noticed before KV meets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvlayer.errors import UnsupportedError
from kvlayer_transformers import Session

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
PATCH = pytest.MonkeyPatch()


@pytest.fixture(autouse=True)
def classes_as_they_were() -> Iterator[None]:
    yield
    PATCH.undo()


def step_of_an_optimizer(model: Any) -> None:
    model.requires_grad_(True)
    model(torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def behind_autograds_back(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.add_(0.01)


def one_element(model: Any) -> None:
    model.model.layers[2].self_attn.k_proj.weight.data[3, 5] += 0.5


def through_numpy(model: Any) -> None:
    model.model.embed_tokens.weight.detach().numpy()[7] *= 2


def other_data(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data * 2


def another_parameter(model: Any) -> None:
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)


def a_lower_frequency(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.25)


def a_layer_less(model: Any) -> None:
    del model.model.layers[2]


def layers_in_another_order(model: Any) -> None:
    first, second, third = model.model.layers
    model.model.layers = torch.nn.ModuleList([second, first, third])


def an_int8_model(model: Any) -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    quantize(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


def a_hook(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda *_: None)


def a_hook_before(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)


def another_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    real = mlp.forward
    mlp.forward = lambda hidden: real(hidden) * 0.5


def another_class(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.__class__ = type("Louder", (type(mlp),), {"forward": lambda _, hidden: hidden * 0.5})


def other_code(model: Any) -> None:
    kind = type(model.model.layers[1].mlp)
    real = kind.forward
    PATCH.setattr(kind, "forward", lambda self, hidden: real(self, hidden) * 0.5)


def a_buffer_more(model: Any) -> None:
    model.model.register_buffer("bias", torch.ones(3))


CHANGES: dict[str, Callable[[Any], object]] = {
    "inv_freq": a_lower_frequency,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "double": lambda model: model.double(),
    "embed_tokens.weight was changed in place": step_of_an_optimizer,
    "content of model.layers.0.mlp.up_proj.weight": behind_autograds_back,
    "content of model.layers.2.self_attn.k_proj.weight": one_element,
    "content of model.embed_tokens.weight": through_numpy,
    "up_proj.weight was replaced": other_data,
    "norm.weight was replaced": another_parameter,
    "layers.2 has gone": a_layer_less,
    "replaced|another layer_idx": layers_in_another_order,
    "is now a Linear, not a Linear|is now a": an_int8_model,
    "forward hook": a_hook,
    "forward pre-hook": a_hook_before,
    "forward that was replaced": another_forward,
    "is now a Louder": another_class,
    "bias has come": a_buffer_more,
    "another function was put in the place of LlamaMLP.forward": other_code,
    "another scaling": lambda m: setattr(m.model.layers[1].self_attn, "scaling", 2.0),
    "another is_causal": lambda m: setattr(m.model.layers[1].self_attn, "is_causal", False),
    "rms_norm_eps": lambda m: setattr(m.config, "rms_norm_eps", 0.1),
    "attention implementation": lambda m: m.set_attn_implementation("eager"),
    "in training mode": lambda m: m.train(),
    "layers.1.self_attn is in training": lambda m: m.model.layers[1].self_attn.train(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", CHANGES)
def test_a_model_that_was_changed_is_refused_by_what_has_changed(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, named: str
) -> None:
    model, ids = tiny(), prompt(70)
    session = open_session(model)
    past = session.load(ids).past
    for _ in range(2):  # the control: what is unchanged goes on
        session.generate(ids, **NEW)
    CHANGES[named](model)
    model.requires_grad_(False)
    for call in (
        lambda: session.generate(ids, **NEW),
        lambda: session.load(ids),
        lambda: session.save(ids, past),
    ):
        with pytest.raises(UnsupportedError, match=named.replace("double", "float64")):
            call()


def test_a_large_model_is_compared_in_samples(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlayer_transformers.watch._SAMPLE", 1000)
    model, ids = tiny(), prompt(70)
    session = open_session(model)
    session.generate(ids, **NEW)
    model.lm_head.weight.data.mul_(1.01)
    with pytest.raises(UnsupportedError, match=r"content of lm_head\.weight"):
        session.generate(ids, **NEW)


def test_autocast_is_refused(llama: Any, open_session: OpenSession, prompt: Prompt) -> None:
    session, ids = open_session(llama), prompt(70)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(UnsupportedError, match="autocast"):
            session.generate(ids, **NEW)
        with pytest.raises(UnsupportedError, match="autocast"):
            open_session(llama)
    session.generate(ids, **NEW)


def test_what_leaves_kv_alone_is_no_change(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    model, ids = tiny(), prompt(70)
    session = open_session(model)
    session.generate(ids, **NEW)
    model.requires_grad_(False)
    model.generation_config.temperature = 0.5
    model.config.use_cache = False
    model.config.use_cache = True
    model.eval()
    with torch.inference_mode():
        session.generate(ids, **NEW)
    assert session.generate(ids, **NEW).loaded == 64


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_session_works_in_every_mode_of_autograd(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, inside: Callable[[], Any]
) -> None:
    ids = prompt(70)
    with inside():
        session = open_session(tiny())
        first = session.generate(ids, **NEW)
        again = session.generate(ids, **NEW)
    assert (first.loaded, again.loaded) == (0, 64)
    assert torch.equal(first.sequences, again.sequences)
    assert session.troubles == 0
    assert session.generate(ids, **NEW).loaded == 64


def test_a_model_in_training_mode_opens_no_session(tiny: Tiny, open_session: OpenSession) -> None:
    with pytest.raises(UnsupportedError, match="training mode"):
        open_session(tiny().train())


def test_weights_that_are_kept_elsewhere_are_refused(tiny: Tiny, open_session: OpenSession) -> None:
    model = tiny()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UnsupportedError, match="offloaded"):
        open_session(model)


def test_a_table_that_the_model_makes_longer_is_still_its_own(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    """Positions that are computed ahead grow with the longest prompt (XGLM)."""
    model, ids = tiny(), prompt(70)
    table = torch.arange(64.0).view(16, 4)
    model.model.register_buffer("table", table, persistent=False)
    session = open_session(model)
    session.generate(ids, **NEW)
    model.model.table = torch.cat([table, table + 1])
    assert session.generate(ids, **NEW).loaded == 64
    model.model.table = torch.cat([table + 1, table])
    with pytest.raises(UnsupportedError, match=r"content of model\.table"):
        session.generate(ids, **NEW)
