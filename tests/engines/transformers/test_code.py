"""Functions that compute a model are watched, and named where they are not transformers' own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from transformers import LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from kvlayer.errors import UnsupportedError
from kvlayer_transformers import Session, verdicts
from kvlayer_transformers.code import Code, is_known, origin
from kvlayer_transformers.geometry import overrides_of
from kvlayer_transformers.proof import Verdict
from kvlayer_transformers.remembered import Remembered

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def _halved(function: Any) -> Any:
    """As a user's decorator: it looks like what it wraps."""

    @functools.wraps(function)
    def halved(*args: Any, **arguments: Any) -> Any:
        found = function(*args, **arguments)
        if isinstance(found, tuple):
            return tuple(0.5 * each if torch.is_tensor(each) else each for each in found)
        return 0.5 * found if torch.is_tensor(found) and found.is_floating_point() else found

    return halved


@contextmanager
def _replaced(holder: Any, name: str) -> Iterator[None]:
    """Halves a function of a class, a module or a table of transformers."""
    is_table = hasattr(holder, "valid_keys")
    before = holder[name] if is_table else getattr(holder, name)
    put = holder.register if is_table else partial(setattr, holder)
    put(name, _halved(before))
    try:
        yield
    finally:
        put(name, before)


PLACES: dict[str, tuple[Any, str]] = {
    "a method of a layer": (LlamaMLP, "forward"),
    "a method of all models": (PreTrainedModel, "get_input_embeddings"),
    "a helper": (modeling_llama, "apply_rotary_pos_emb"),
    "a helper's helper": (modeling_llama, "rotate_half"),
    "the mask": (modeling_llama, "create_causal_mask"),
    "attention": (ALL_ATTENTION_FUNCTIONS, "sdpa"),
    "masks": (ALL_MASK_ATTENTION_FUNCTIONS, "sdpa"),
    "torch's attention": (torch.nn.functional, "scaled_dot_product_attention"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_function_that_was_replaced_is_noticed_and_named(
    tiny: Tiny,
    open_session: OpenSession,
    prompt: Prompt,
    tmp_path: Path,
    place: str,
) -> None:
    holder, name = PLACES[place]
    model = tiny()
    session = open_session(model, tmp_path / "kv")
    session.generate(prompt(40), **NEW)
    assert "code" not in overrides_of(model, "")
    with _replaced(holder, name):
        with pytest.raises(UnsupportedError, match=f"another function .*{name}"):
            session.generate(prompt(40), **NEW)
        assert "code" in overrides_of(model, "")
        other = open_session(model, tmp_path / "kv", prove=False)
        assert other.load(prompt(40)).columns == 0


def test_code_that_was_put_into_a_function_is_noticed(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(tiny())

    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        return x

    monkeypatch.setattr(modeling_llama.rotate_half, "__code__", rotate_half.__code__)
    with pytest.raises(UnsupportedError, match="rotate_half"):
        session.generate(prompt(40), **NEW)


def test_a_method_that_a_class_gets_of_its_own_is_noticed(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(tiny())
    generate = LlamaForCausalLM.generate
    monkeypatch.setattr(LlamaForCausalLM, "generate", _halved(generate), raising=False)
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM\.generate"):
        session.generate(prompt(40), **NEW)


@pytest.mark.parametrize(
    ("find", "name"),
    [
        (lambda model: model.model.layers[1].self_attn, "forward"),
        (lambda model: model, "generate"),
        (lambda model: model, "prepare_inputs_for_generation"),
        (lambda model: model.model, "get_input_embeddings"),
    ],
)
def test_methods_that_an_object_gets_are_not_hidden_by_decorators(
    tiny: Tiny,
    open_session: OpenSession,
    prompt: Prompt,
    find: Callable[[Any], Any],
    name: str,
) -> None:
    model = tiny()
    session = open_session(model)
    module = find(model)
    setattr(module, name, _halved(getattr(module, name)))
    with pytest.raises(UnsupportedError, match=f"a {name} that was replaced"):
        session.generate(prompt(40), **NEW)
    with pytest.raises(UnsupportedError, match=f"a {name} that was replaced"):
        open_session(model)


def test_hooks_that_accelerate_carries_for_others_are_refused(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    class Halves(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return 0.5 * output

    model = tiny()
    session = open_session(model)
    add_hook_to_module(model.model.layers[0].mlp, Halves())
    with pytest.raises(UnsupportedError, match="Halves"):
        session.generate(prompt(40), **NEW)


def test_hooks_of_all_modules_and_modes_of_all_operations_are_refused(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt
) -> None:
    class Halves(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return function(*args, **(kwargs or {}))

    session = open_session(tiny())
    expected = session.generate(prompt(40), **NEW).sequences
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedError, match="a global forward hook"):
            session.generate(prompt(40), **NEW)
    finally:
        hook.remove()
    with Halves(), pytest.raises(UnsupportedError, match=r"a torch mode .*Halves"):
        session.generate(prompt(40), **NEW)
    with torch.device("cpu"):
        assert torch.equal(session.generate(prompt(40), **NEW).sequences, expected)


class _Scaled(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * -0.7


class _OwnLlama(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = _Scaled(config)
        self.post_init()


def test_a_users_own_class_shares_nothing_with_the_class_it_was_made_from(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, tmp_path: Path
) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    open_session(model, tmp_path / "kv", weights=folder).generate(prompt(40), **NEW)
    own = _OwnLlama.from_pretrained(folder).eval()
    assert open_session(own, tmp_path / "kv", weights=folder).load(prompt(40)).columns == 0
    open_session(own, tmp_path / "kv", weights=folder).generate(prompt(40), **NEW)
    again = _OwnLlama.from_pretrained(folder).eval()
    assert open_session(again, tmp_path / "kv", weights=folder).load(prompt(40)).columns == 32


def _layer(factor: float) -> Any:
    """Classes of one name whose code differs by a number."""

    class Layer(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * factor

    return Layer


def test_code_is_told_apart_by_its_numbers(tiny: Tiny) -> None:
    digests = set()
    for factor in (0.5, 0.25):
        model = tiny()
        model.model.layers[0].mlp = _layer(factor)(model.config).eval()
        code = Code(model)
        assert code.foreign() == Code(model).foreign() is not None
        digests.add(code.foreign())
    assert len(digests) == 2
    plain = Code(tiny())
    assert plain.foreign() is None
    constants = {plain.digest()}
    kept = LlamaMLP.forward.__code__
    for number in (2, 3):
        forward = FunctionType(
            compile(f"lambda self, x: x * {number}", "cell", "eval").co_consts[0], {}
        )
        try:
            LlamaMLP.forward.__code__ = forward.__code__
            constants.add(Code(tiny()).digest())
        finally:
            LlamaMLP.forward.__code__ = kept
    assert len(constants) == 3


_OWN = """
class Own(Layer):
    def forward(self, x):
        return Layer.forward(self, x) * {}
"""


def _of_a_global(factor: Any) -> Any:
    """A class whose code names a number of its module."""
    space: dict[str, Any] = {"__name__": __name__, "SCALE": factor, "Layer": LlamaMLP}
    exec(_OWN.format("SCALE"), space)  # noqa: S102  a module of its own
    return space["Own"]


def _of_a_default(factor: Any) -> Any:
    class Layer(LlamaMLP):
        def forward(self, x: torch.Tensor, by: Any = ({"by": [factor]},)) -> torch.Tensor:
            return super().forward(x) * by[0]["by"][0]

    return Layer


def _of_its_class(factor: Any) -> Any:
    class Layer(LlamaMLP):
        by = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.by

    return Layer


def _of_a_module(factor: Any) -> Any:
    ops = ModuleType("ops_of_a_user")
    ops.__dict__["by"] = factor
    space: dict[str, Any] = {"__name__": __name__, "ops": ops, "Layer": LlamaMLP}
    exec(_OWN.format("ops.by"), space)  # noqa: S102  a module of its own
    return space["Own"]


KINDS = [_layer, _of_a_global, _of_a_default, _of_its_class, _of_a_module]


@pytest.mark.parametrize("place", KINDS)
@pytest.mark.parametrize(
    ("one", "other"),
    [(0.5, 0.25), (torch.tensor([0.5]), torch.tensor([0.25]))],
    ids=["float", "tensor"],
)
def test_whatever_code_of_others_computes_with_is_part_of_its_digest(
    tiny: Tiny, place: Any, one: Any, other: Any
) -> None:
    def digest(factor: Any) -> str | None:
        model = tiny()
        model.model.layers[0].mlp = place(factor)(model.config).eval()
        return Code(model).foreign()

    assert digest(one) == digest(one) is not None
    assert digest(one) != digest(other)


@pytest.mark.parametrize("place", KINDS)
def test_what_cannot_be_shown_is_shared_with_no_other_process(tiny: Tiny, place: Any) -> None:
    """An object of any kind: equal while it is the same one, and never in another process."""

    def digest(factor: object) -> str | None:
        model = tiny()
        model.model.layers[0].mlp = place(factor)(model.config).eval()
        return Code(model).foreign()

    one = object()
    assert digest(one) == digest(one)
    assert digest(one) != digest(object())


def test_a_global_that_code_of_others_names_is_watched(tiny: Tiny) -> None:
    model = tiny()
    own = _of_a_global(0.5)
    model.model.layers[0].mlp = own(model.config).eval()
    code = Code(model)
    assert code.changed() is None
    own.forward.__globals__["SCALE"] = 0.25
    assert code.changed() == "SCALE"


def test_a_verdict_is_not_remembered_for_code_of_others(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered = Remembered(tmp_path / "verdicts")
    verdicts.forget()
    assert verdicts.verdict_of(tiny(), remembered=remembered) == Verdict()
    asked: list[Any] = []
    monkeypatch.setattr(verdicts, "of_family", asked.append)
    verdicts.forget()
    verdicts.verdict_of(tiny(), remembered=remembered)
    assert not asked
    written = (tmp_path / "verdicts" / "verdicts.jsonl").read_bytes()
    with _replaced(LlamaMLP, "forward"):
        verdicts.verdict_of(tiny(), remembered=remembered)
        verdicts.forget()
        verdicts.verdict_of(tiny(), remembered=remembered)
    assert len(asked) == 2
    assert (tmp_path / "verdicts" / "verdicts.jsonl").read_bytes() == written


def test_where_code_comes_from() -> None:
    assert origin(LlamaAttention.forward) == "transformers.models.llama.modeling_llama"
    assert origin(functools.partial(LlamaAttention.forward)) == origin(LlamaAttention.forward)
    assert origin(_halved(LlamaAttention.forward)) == __name__
    assert origin(_OwnLlama) == __name__
    assert origin(torch.matmul).startswith("torch")
    assert origin(len) == "builtins"
    assert is_known("transformers.models.llama")
    assert is_known("functools")
    assert not is_known("__main__")
    assert not is_known(__name__)
