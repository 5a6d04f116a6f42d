"""KV that is not a Llama's: sliding windows, several groups, latents; a state, which is refused.

Each model is small and random. The engine runs it alone, then with kvlayer, then in another process
over the same directory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import vllm_models
from vllm_answers import Comparison, assert_attended
from vllm_processor import needs

ANSWER = 12
OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 256,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 130,
    "enable_prefix_caching": True,
}


@dataclass(frozen=True)
class Kind:
    """A model, how vLLM runs it, and what kvlayer must make of it."""

    make: Callable[[Path], Path]
    rules: tuple[str, ...]
    """Of its groups, sorted."""
    form: str
    dtype: str = "float32"
    tail: int = 32
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def cached(self, tokens: int) -> int:
        return tokens // self.tail * self.tail


KINDS = {
    # The windows' blocks before the last 128 tokens are gone when a prompt is stored, and stay
    # empty when it is loaded.
    "mixed": Kind(vllm_models.mixed, ("every-chunk", *["trailing"] * 3), "native"),
    "windowed": Kind(vllm_models.windowed, ("trailing",), "native"),
    # Attention in chunks of 256 tokens, none of which looks beyond its own.
    "llama-4": Kind(
        partial(vllm_models.hybrid, "llama-4"), ("chunked",) * 3 + ("every-chunk",), "native"
    ),
    "gpt-oss": Kind(partial(vllm_models.hybrid, "gpt-oss"), ("every-chunk", "trailing"), "native"),
    # Two layers have the KV of others: it is stored once.
    "gemma-3n": Kind(
        partial(vllm_models.hybrid, "gemma-3n"), ("every-chunk", *["trailing"] * 3), "native"
    ),
    # vLLM's attention over latents that knows prefixes: bf16, and only where AMX is.
    "latent": Kind(
        vllm_models.latent,
        ("every-chunk",),
        "canonical",
        dtype="bfloat16",
        # Its answer depends on where a pass begins, also with its own prefix cache: computed in
        # steps of 64 tokens and loaded in multiples of them, passes begin at the same tokens.
        tail=64,
        options={"max_num_batched_tokens": 64},
    ),
}


def prompts() -> list[list[int]]:
    """Several windows long, somewhat longer than one, shorter."""
    from kvlayer_vllm.bench.serving import prompt_of

    return [prompt_of(700, 1, 512), prompt_of(410, 2, 512), prompt_of(95, 3, 512)]


@pytest.mark.parametrize(
    "name",
    [
        "mixed",
        "windowed",
        pytest.param("latent", marks=needs("amx")),
        *(
            pytest.param(name, marks=pytest.mark.campaign)
            for name in ("llama-4", "gpt-oss", "gemma-3n")
        ),
    ],
)
def test_each_kind_of_kv_is_stored_and_loaded(
    name: str, tmp_path: Path, engine_process: Any, figures: Any
) -> None:
    kind = KINDS[name]
    model = kind.make(tmp_path / name)
    options = {**OPTIONS, "dtype": kind.dtype, **kind.options}
    cache = {
        "tokens_per_chunk": 64,
        "tokens_per_tail": kind.tail,
        "held_share": 1.0,  # few blocks, and what is stored is counted
        "tiers": [
            {"url": "cpu://?capacity=256MiB"},
            {"url": f"file://{tmp_path}/kv", "write": "back", "deadline_seconds": 60.0},
        ],
    }
    compared = Comparison(kind.dtype)

    alone = engine_process(model, None, **options)
    cold = [alone("answers", [prompt], ANSWER)[0] for prompt in prompts()]
    alone.close()

    first = engine_process(model, cache, **options)
    for prompt, answer in zip(prompts(), cold, strict=True):
        (found,) = first("answers", [prompt], ANSWER)
        assert found[1] == 0
        compared.add(answer, found)
    first("rest")
    first.close()

    second = engine_process(model, cache, **options)
    state = second("state")
    assert state["on"] and tuple(sorted(state["rules"])) == kind.rules
    assert all(form.startswith(kind.form) for form in state["groups"])
    for prompt, answer in zip(prompts(), cold, strict=True):
        (found,) = second("answers", [prompt], ANSWER)
        assert found[1] == kind.cached(len(prompt))
        compared.add(answer, found)
    second("rest")
    after = second("state")
    assert (after["troubles"], after["leases"], after["tracked"]) == (0, 0, 0)
    whole = sum(kind.cached(len(prompt)) for prompt in prompts()) * state["token_nbytes"]
    if {"trailing", "chunked"} & {
        *kind.rules
    }:  # of a window only what a token after the prompt still sees
        assert 0 < after["loaded"] < whole
    else:
        assert after["loaded"] >= whole
    assert compared.wrong == 0

    prompt = prompts()[0]
    control = assert_attended(second, kind.dtype, cold[0], prompt, kind.cached(len(prompt)))
    second.close()
    figures(
        "vllm.kinds",
        kind=name,
        tokens=compared.tokens,
        ties=compared.ties,
        largest_drift=round(compared.drift, 6),
        drift_of_noise=round(control, 3),
        loaded_nbytes=after["loaded"],
        whole_nbytes=whole,
    )


@pytest.mark.parametrize(
    ("make", "options", "answers"),
    [
        # vLLM's CPU build has no operation for a Mamba's scan, so that nothing is asked of it.
        pytest.param(vllm_models.state, {"dtype": "bfloat16"}, False, id="state"),
        # vLLM's reference attention over latents, for any processor: no prefixes, its own neither.
        pytest.param(
            vllm_models.latent, {"attention_backend": "CPU_MLA"}, True, id="latent-in-one-pass"
        ),
    ],
)
def test_what_is_refused_is_served_without_kvlayer(
    make: Any, options: dict[str, Any], answers: bool, tmp_path: Path, engine_process: Any
) -> None:
    model = make(tmp_path / "model")
    cache = {"tiers": [{"url": "cpu://?capacity=64MiB"}]}
    options = {**OPTIONS, "dtype": "float32", "enable_prefix_caching": False, **options}
    process = engine_process(model, cache, **options)
    assert process("state") == {"on": False}
    if answers:
        found = [process("ask", [prompts()[2]], ANSWER)[0] for _ in range(2)]
        assert found[0] == found[1] and found[0][1] == 0
    process.close()
