"""What a session is given by mistake is refused with an error of kvlayer's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvlayer import CacheConfig, KVLayerError, Scope, TierConfig
from kvlayer_transformers import Session

OpenSession = Callable[..., Session]
Prompt = Callable[..., list[int]]

NEW: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("scope", value) for value in (None, 5, "alice", [None], Scope, {"adapter": b"x"})),
        *((name, value) for name in ("load", "save") for value in ("no", 1, None)),
        ("on_pass", 5),
        ("attention_mask", 5),
        ("attention_mask", "x"),
    ],
)
def test_generate(
    llama: Any, open_session: OpenSession, prompt: Prompt, name: str, value: Any
) -> None:
    session = open_session(llama)
    with pytest.raises(KVLayerError, match=r"(?s)" + name.replace("scope", "scopes?")):
        session.generate(prompt(20), **{**NEW, name: value})


@pytest.mark.parametrize("value", [-1, "3", 2.5, None, True, float("nan")])
def test_the_first_token_to_save(
    llama: Any, open_session: OpenSession, prompt: Prompt, value: Any
) -> None:
    session, past = open_session(llama), DynamicCache()
    with torch.no_grad():
        llama(torch.tensor([prompt(20)]), past_key_values=past, use_cache=True)
    with pytest.raises(KVLayerError, match="first_token must be a whole number"):
        session.save(prompt(20), past, first_token=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("pass_tokens", value) for value in ("32", 32.0, True, -16, 0)),
        *((name, "no") for name in ("exact", "keep_answers", "report_prefill", "prove")),
    ],
)
def test_open(llama: Any, open_session: OpenSession, name: str, value: Any) -> None:
    with pytest.raises(KVLayerError, match=name):
        open_session(llama, **{name: value})


@pytest.mark.parametrize("model", ["meta-llama/Llama-3", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(KVLayerError, match="no model that generates"):
        Session.open(model, CacheConfig())


def test_what_is_no_configuration_and_no_portal(llama: Any) -> None:
    nothing: Any = {"tokens_per_chunk": 16}
    with pytest.raises(KVLayerError, match="config must be a CacheConfig"):
        Session.open(llama, nothing)
    with pytest.raises(KVLayerError, match="portal must be a Portal"):
        Session(llama, nothing)


def test_a_folder_may_be_a_path(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    config = CacheConfig(tiers=(TierConfig(url="cpu://?capacity=16MiB"),))
    namespaces = set()
    for folder in (tmp_path, str(tmp_path)):
        with Session.open(llama, config, weights=folder) as session:
            namespaces.add(session.portal.cache.namespace)
    assert len(namespaces) == 1
    for wrong in (5, b"/models"):
        given: Any = wrong
        with pytest.raises(KVLayerError, match="weights must be a str"):
            Session.open(llama, config, weights=given)
