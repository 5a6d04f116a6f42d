"""Every family of decoders in the installed transformers: answered rightly, or refused.

A campaign tries all of them with small random weights; every other run a handful. What a family is
refused for is in the figures. A wrong answer is a bug, and so is an error that is not ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvlayer.errors import KVLayerError, UnsupportedError
from kvlayer_transformers import Session
from kvlayer_transformers.twin import PROMPT_IDS, build

OpenSession = Callable[..., Session]

NEW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
# Of every run: one of each way to be right, and of each to be refused.
ALWAYS = (
    *(("llama", "LlamaForCausalLM"), ("gpt_oss", "GptOssForCausalLM")),
    *(("bart", "BartForCausalLM"), ("paligemma", "PaliGemmaForConditionalGeneration")),
    *(("mpt", "MptForCausalLM"), ("roberta", "RobertaForCausalLM")),
    *(("mamba", "MambaForCausalLM"), ("t5gemma2", "T5Gemma2ForConditionalGeneration")),
)


def families() -> Iterator[tuple[str, str]]:
    """A model type and a class, for all that generate text after text (and perhaps images)."""
    mappings: Any = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    for mapping in mappings:
        for kind, names in mapping.items():
            yield from ((kind, name) for name in ([names] if isinstance(names, str) else names))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        chosen = sorted(set(families())) if metafunc.config.getoption("--campaign") else ALWAYS
        metafunc.parametrize("family", chosen, ids=[name for _, name in chosen])


@pytest.fixture(scope="module")
def outcomes(figures: Callable[..., None]) -> Iterator[Counter[str]]:
    """Families by outcome."""
    counted: Counter[str] = Counter()
    yield counted
    counted["wrong"] += 0
    figures("families.all", **counted, transformers=transformers.__version__)


def small_model(kind: str, name: str) -> Any:
    """A small model from the family's default configuration. Raises ``ValueError``."""
    config = CONFIG_MAPPING[kind]()
    try:
        return build(getattr(transformers, name), config, seed=5)
    except ValueError:
        # Some defaults lack what every published configuration has.
        text = config.get_text_config(decoder=True)
        if getattr(text, "rope_parameters", 0) in (None, {}):
            text.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if getattr(text, "head_dim", 0) is None:
            text.head_dim = text.hidden_size // text.num_attention_heads
        return build(getattr(transformers, name), config, seed=5)


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(*PROMPT_IDS, (1, 200), generator=generator)[:, :tokens]


def answer(model: Any, rows: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(rows) if mask is None else mask
    out: torch.Tensor = model.generate(input_ids=rows, attention_mask=mask, **NEW)
    return out


def ask(session: Session, rows: torch.Tensor, mask: torch.Tensor | None = None) -> int:
    """Columns loaded; asserts that the answer is the model's own."""
    found = session.generate(rows, mask, use_cache=True, **NEW)
    assert torch.equal(found.sequences, answer(session.model, rows, mask))
    return found.loaded


@pytest.mark.filterwarnings("ignore")
def test_a_family_is_answered_rightly_or_refused(
    family: tuple[str, str],
    open_session: OpenSession,
    outcomes: Counter[str],
    figures: Callable[..., None],
) -> None:
    outcome, reason = "wrong", ""
    try:
        outcome, reason = judge(*family, open_session)
    finally:
        outcomes[outcome] += 1
        figures("families." + ".".join(family), outcome=outcome, reason=reason[:160])


def judge(kind: str, name: str, open_session: OpenSession) -> tuple[str, str]:
    """What became of a family, and why it was refused. Raises what is wrong."""
    long, other, short = prompt(120), torch.cat([prompt(90), prompt(30, 1)], 1), prompt(63, 2)
    try:
        model = small_model(kind, name)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        answer(model, long)
    except Exception as exc:  # noqa: BLE001  # a family that has no model for text alone
        return "no model", f"{type(exc).__name__}: {exc}"
    try:
        session = open_session(model)
    except KVLayerError as exc:
        return "refused", str(exc)
    assert ask(session, long) == 0
    assert ask(session, long) in (96, 0)
    assert ask(session, other) in (64, 0)
    pad = long.shape[1] - short.shape[1]
    batch = torch.cat([long, torch.nn.functional.pad(short, (pad, 0))])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0
    padded = ""
    try:
        ask(session, batch, mask)
        ask(session, batch, mask)
    except UnsupportedError as exc:
        padded = str(exc)
    assert ask(session, short) in (32, 0)  # whatever ran before
    session.exact = False
    assert ask(session, long) in (112, 0)
    if padded:
        return "right, padding refused", padded
    return ("right, not stored" if session.troubles else "right"), ""
