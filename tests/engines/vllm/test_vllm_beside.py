"""kvlayer in vLLM's ``MultiConnector``: alone, and before or behind others.

In fp32 answers are those of vLLM alone, whoever loads, and whether or not a load fails.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvlayer_vllm.bench.serving import prompt_of

ANSWER = 12
OPTIONS: dict[str, Any] = {
    "dtype": "float32",  # in bf16 near ties decide greedy answers
    "max_num_batched_tokens": 256,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 100,
    "enable_prefix_caching": True,
}
CACHE = {
    "tokens_per_chunk": 64,
    "tokens_per_tail": 32,
    "tiers": [{"url": "cpu://?capacity=64MiB"}],
}
PROMPTS = [prompt_of(700, 1, 512), prompt_of(410, 2, 512), prompt_of(95, 3, 512)]
USABLE = [672, 384, 64]
OFFLOADING = "OffloadingConnector"

Found = list[list[int]]


class Asked:
    """An engine that answers the prompts again and again, its own prefix cache being empty."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def __call__(self) -> tuple[Found, list[int]]:
        """Answers, and how many tokens of each prompt were not computed."""
        self.process("forget")
        found = [self.process("ask", [each], ANSWER)[0] for each in PROMPTS]
        return [answer for answer, _ in found], [cached for _, cached in found]

    def loaded(self) -> int:
        """Tokens that kvlayer has put into the engine's blocks so far."""
        self.process("rest")
        state = self.process("state")
        assert state["on"] and (state["troubles"], state["leases"], state["pinned"]) == (0, 0, 0)
        return int(state["loaded"] // state["token_nbytes"])


@pytest.fixture
def asked(engine_process: Any, tiny: Path) -> Any:
    """``asked(*order)``: an engine with these connectors in a ``MultiConnector``."""
    return lambda *order: Asked(engine_process(tiny, CACHE, beside=list(order), **OPTIONS))


@pytest.fixture(scope="module")
def cold(zygote: Any, tiny: Path) -> Found:
    """What vLLM alone answers."""
    from vllm_process import EngineProcess

    process = EngineProcess(zygote, tiny, None, **OPTIONS)
    found = [process("ask", [each], ANSWER)[0][0] for each in PROMPTS]
    process.close()
    return found


FIRST = [("kvlayer",), ("greeter", "kvlayer"), ("kvlayer", "greeter"), ("kvlayer", "offloading")]


@pytest.mark.parametrize("order", FIRST, ids="-".join)
def test_it_serves_where_nobody_before_it_does(
    order: tuple[str, ...], asked: Any, cold: Found, figures: Any
) -> None:
    ask = asked(*order)
    assert ask() == (cold, [0, 0, 0]) and ask.loaded() == 0
    assert ask() == (cold, USABLE)
    loaded = ask.loaded()
    assert loaded >= sum(USABLE)
    figures("vllm.beside", order="-".join(order), loaded=loaded)

    assert ask.process("policy")  # which vLLM reads from the MultiConnector's configuration
    ask.process("fail_loads", True)
    answers, _ = ask()
    assert answers == cold and ask.loaded() == loaded
    assert ask.process("fail_loads", False) >= len(PROMPTS)
    assert ask() == (cold, USABLE) and ask.loaded() > loaded

    # So that the answers above prove something.
    assert ask.process("alter", PROMPTS) > 0
    assert ask()[0] != cold
    ask.process.close()


def test_it_serves_what_the_connector_before_it_has_lost(asked: Any, cold: Found) -> None:
    ask = asked("offloading", "kvlayer")
    assert ask() == (cold, [0, 0, 0])
    answers, cached = ask()
    assert answers == cold and min(cached) > 0 and ask.loaded() == 0
    ask.process("empty", OFFLOADING)
    assert ask() == (cold, USABLE)
    loaded = ask.loaded()
    assert loaded >= sum(USABLE)
    ask.process("empty", OFFLOADING)
    ask.process("fail_loads", True)
    assert ask()[0] == cold and ask.loaded() == loaded
    assert ask.process("fail_loads", False) >= len(PROMPTS)
    ask.process("empty", OFFLOADING)
    assert ask.process("alter", PROMPTS) > 0
    assert ask()[0] != cold
    ask.process.close()
