"""What happened to a model since it was loaded is part of the name of its KV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from kvlayer.errors import IdentityError
from kvlayer_transformers import Session
from kvlayer_transformers.geometry import overrides_of
from kvlayer_transformers.loaded import changed_modules, changed_tensors

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]
Tiny = Callable[..., Any]

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> str:
    tiny().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def _load(folder: str, **arguments: Any) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, **arguments).eval()


def _tune(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.k_proj.weight
        weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)


def _prune(model: Any) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[:, ::2] = 0


def _merge(model: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_B" in name:
                each.fill_(0.5)
    assert adapted.merge_and_unload() is model


def _swap(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[2] = layers[2], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index


def _scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


def _turn(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.25)


def _round(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def _look_both_ways(model: Any) -> None:
    model.model.layers[0].self_attn.is_causal = False


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "tuned": (_tune, "tensors"),
    "pruned": (_prune, "tensors"),
    "an adapter merged in": (_merge, "tensors"),
    "layers swapped": (_swap, "tensors"),
    "rounded": (_round, "tensors"),
    "scaled": (_scale, "numbers"),
    "turned at another rate": (_turn, "numbers"),
    "looks both ways": (_look_both_ways, "numbers"),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_was_changed_before_it_was_opened_has_another_name(
    open_session: OpenSession, prompt: Prompt, tmp_path: Path, folder: str, what: str
) -> None:
    change, key = CHANGES[what]
    open_session(_load(folder), tmp_path / "kv", weights=folder).generate(prompt(40), **NEW)
    again = open_session(_load(folder), tmp_path / "kv", weights=folder)
    assert again.load(prompt(40)).columns == 32
    model = _load(folder)
    change(model)
    assert key in overrides_of(model, folder)
    changed = open_session(model, tmp_path / "kv", weights=folder, prove=False)
    assert changed.load(prompt(40)).columns == 0
    changed.generate(prompt(40), **NEW)
    twin = _load(folder)
    change(twin)
    other = open_session(twin, tmp_path / "kv", weights=folder, prove=False)
    assert other.load(prompt(40)).columns == 32


def test_files_that_were_replaced_after_they_were_loaded_do_not_name_what_is_in_memory(
    tiny: Tiny, open_session: OpenSession, prompt: Prompt, tmp_path: Path, folder: str
) -> None:
    old = _load(folder)
    tiny(seed=5).save_pretrained(folder)
    open_session(_load(folder), tmp_path / "kv", weights=folder).generate(prompt(40), **NEW)
    session = open_session(old, tmp_path / "kv", weights=folder)
    assert session.load(prompt(40)).columns == 0
    found = session.generate(prompt(40), **NEW)
    assert torch.equal(found.sequences, old.generate(torch.tensor([prompt(40)]), **NEW))


def test_rows_that_were_added_are_compared_by_content(folder: str) -> None:
    digests: set[str | None] = set()
    for seed in (1, 2):
        model = _load(folder)
        torch.manual_seed(seed)
        model.resize_token_embeddings(520, mean_resizing=False)
        digests.add(changed_tensors(model, folder))
    assert len(digests) == 2
    assert None not in digests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_was_only_loaded_is_not_changed(
    tiny: Tiny, tmp_path: Path, dtype: str, tied: bool
) -> None:
    folder = str(tmp_path)
    tiny(tie_word_embeddings=tied).save_pretrained(folder, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = _load(folder, dtype=dtype)
    assert changed_tensors(model, folder) is None
    assert changed_modules(model) is None
    assert overrides_of(model, folder) == {}


def test_a_head_that_the_files_lack_is_part_of_the_name(folder: str) -> None:
    model = _load(folder)
    headless = Path(folder) / "headless"
    model.model.save_pretrained(headless)
    again, other = (LlamaForCausalLM.from_pretrained(headless).eval() for _ in range(2))
    assert changed_tensors(model.model, str(headless)) is None
    assert changed_tensors(again, str(headless)) != changed_tensors(other, str(headless))


def test_a_file_that_cannot_be_read_is_said(folder: str) -> None:
    model = _load(folder)
    (Path(folder) / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(IdentityError, match=r"model\.safetensors cannot be read"):
        changed_tensors(model, folder)
