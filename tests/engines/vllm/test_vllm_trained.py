"""SmolLM2 in vLLM answers the same with kvlayer and without, in each dtype and way of loading.

In fp32 token for token. In bf16 sums are rounded differently with every batch and prefix: there a
token may differ only where the engine itself was about to choose another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import pytest
from vllm_answers import Answer, Comparison, assert_attended
from vllm_process import EngineProcess

from kvlayer_vllm.settings import Loads

pytestmark = pytest.mark.any_device

CHUNK, BLOCK = 64, 32
ANSWER = 12
OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 256,  # longer prompts are computed in steps
    "num_gpu_blocks_override": 24,  # four prompts of five blocks do not fit with their answers
    "max_model_len": 736,
    "enable_prefix_caching": True,
}
Tokens: TypeAlias = list[int]


@dataclass
class Served:
    """An engine with kvlayer, and what it answers without."""

    process: EngineProcess
    cold: Mapping[tuple[int, ...], Answer]
    compared: Comparison
    loaded_tokens: int = 0

    def ask(self, prompts: Sequence[Tokens]) -> list[Answer]:
        """Answers to a batch, which are compared."""
        answers: list[Answer] = self.process("answers", prompts, ANSWER)
        for prompt, answer in zip(prompts, answers, strict=True):
            self.compared.add(self.cold[tuple(prompt)], answer)
        return answers

    @property
    def loaded(self) -> int:
        """Tokens copied from host memory into the engine so far."""
        state = self.process("state")
        return int(state["loaded"] // state["token_nbytes"])

    def twice(self, prompts: Sequence[Tokens]) -> None:
        """Computed and stored, then loaded."""
        self.process("forget")
        self.ask(prompts)
        self.process("forget")
        before = self.loaded
        answers = self.ask(prompts)
        found = self.loaded - before
        # In a batch the engine's own cache has what a neighbour has just loaded.
        assert found >= max(map(usable, prompts))
        assert [cached for _, cached, _ in answers] == [usable(each) for each in prompts]
        self.loaded_tokens += found


def usable(prompt: Tokens) -> int:
    """Tokens of a prompt that is stored, tail included; the last one is always computed."""
    return min(len(prompt) // BLOCK * BLOCK, len(prompt) - 1)


@pytest.fixture(scope="session")
def smol() -> Path:
    """SmolLM2-135M-Instruct."""
    from kvlayer_vllm.bench.models import trained_model

    return trained_model()


@pytest.fixture(scope="session")
def texts(smol: Path, dose: Any) -> dict[str, list[list[Tokens]]]:
    """Batches of text by what they are for: 9 prompts, or 34."""
    from transformers import AutoTokenizer

    from kvlayer_transformers.demo import documents

    folder = Path(documents.__file__).parent / "documents"
    text = "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))
    tokenizer: Any = AutoTokenizer.from_pretrained(smol)
    words: Tokens = tokenizer(text)["input_ids"]

    def cut(start: int, count: int) -> Tokens:
        return words[start : start + count]

    return {
        "single": [[cut(37 * n, 90 + 23 * n)] for n in range(dose(1, 12))],
        "shared": [
            [cut(1000 * n, 96) + cut(300 + 90 * m + 7 * n, 20 + 11 * m) for m in range(3)]
            for n in range(1, dose(1, 4) + 1)
        ],
        "chunked": [[cut(1700 + 400 * n, 512 - 19 * n)] for n in range(dose(1, 6))],
        "preempted": [[cut(130 + 290 * n, 160) for n in range(4)]],
    }


@pytest.fixture(scope="session")
def cold(smol: Path, zygote: Any, texts: Any) -> Any:
    """``cold(dtype)``: what the engine answers without kvlayer, each prompt alone."""
    known: dict[str, dict[tuple[int, ...], Answer]] = {}
    every = list(itertools.chain.from_iterable(itertools.chain.from_iterable(texts.values())))

    def answers(dtype: str) -> dict[tuple[int, ...], Answer]:
        if dtype not in known:
            process = EngineProcess(zygote, smol, None, dtype=dtype, **OPTIONS)
            known[dtype] = {tuple(p): process("answers", [p], ANSWER)[0] for p in every}
            process.close()
        return known[dtype]

    return answers


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((dtype, loads), marks=[] if loads == "async" else pytest.mark.campaign)
        for dtype, loads in itertools.product(("float32", "bfloat16"), get_args(Loads))
    ],
    ids="-".join,
)
def served(
    request: pytest.FixtureRequest, smol: Path, zygote: Any, cold: Any, figures: Any, texts: Any
) -> Iterator[Served]:
    dtype, loads = request.param
    cache = {
        "tokens_per_chunk": CHUNK,
        "tokens_per_tail": BLOCK,
        "held_share": 1.0,  # few blocks, and what is stored is counted
        "loads": loads,
        "tiers": [{"url": "cpu://?capacity=512MiB"}],
    }
    answers = cold(dtype)
    process = EngineProcess(zygote, smol, cache, dtype=dtype, **OPTIONS)
    found = Served(process, answers, Comparison(dtype))
    yield found
    process("rest")
    state = process("state")
    assert (state["on"], state["troubles"], state["leases"], state["tracked"]) == (True, 0, 0, 0)
    process.close()
    figures(
        "vllm.answers",
        dtype=dtype,
        loads=loads,
        prompts=sum(map(len, itertools.chain.from_iterable(texts.values()))),
        tokens=found.compared.tokens,
        ties=found.compared.ties,
        largest_drift=round(found.compared.drift, 6),
        loaded_tokens=found.loaded_tokens,
        wrong=found.compared.wrong,
    )


def test_prompts_alone(served: Served, texts: Any) -> None:
    for batch in texts["single"]:
        served.twice(batch)
    assert served.compared.wrong == 0


def test_batches_that_share_a_prefix(served: Served, texts: Any) -> None:
    for batch in texts["shared"]:
        served.twice(batch)
    assert served.compared.wrong == 0


def test_prompts_that_are_computed_in_steps(served: Served, texts: Any) -> None:
    for batch in texts["chunked"]:
        served.twice(batch)
    assert served.compared.wrong == 0


def test_prompts_that_were_preempted(served: Served, texts: Any) -> None:
    (batch,) = texts["preempted"]
    before = served.process("forget")
    served.twice(batch)
    assert served.process("forget") > before
    assert served.compared.wrong == 0


def test_altered_kv_is_noticed(served: Served, texts: Any) -> None:
    """The negative control: what is loaded is attended to, and bounds for rounding hide nothing."""
    (prompt,) = texts["single"][0]
    served.ask([prompt])  # it is stored
    cold = served.cold[tuple(prompt)]
    assert_attended(served.process, served.compared.dtype, cold, prompt, usable(prompt))
