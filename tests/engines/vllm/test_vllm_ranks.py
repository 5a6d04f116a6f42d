"""Real engines of several ranks, each a process of its own: tensor ranks, stages of a pipeline.

In fp32 their answers are those of vLLM alone on one rank. What one engine stores another one reads,
also of another size.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vllm_process import EngineProcess
from zygote import Zygote

from kvlayer_vllm.bench.serving import prompt_of

ANSWER = 12
OPTIONS: dict[str, Any] = {
    "dtype": "float32",  # in bf16 near ties decide greedy answers
    "max_num_batched_tokens": 512,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 100,
    "enable_prefix_caching": True,
}
PROMPTS = [prompt_of(700, 1, 512), prompt_of(410, 2, 512), prompt_of(95, 3, 512)]
USABLE = [672, 384, 64]


class Shape(NamedTuple):
    """An engine's: its ranks, and the KV heads of its model."""

    tensor: int = 1
    pipeline: int = 1
    heads: int = 4

    @property
    def options(self) -> dict[str, Any]:
        return {"tensor_parallel_size": self.tensor, "pipeline_parallel_size": self.pipeline}


ONE, TWO, FOUR, STAGES, BOTH = Shape(), Shape(2), Shape(4), Shape(1, 2), Shape(2, 2)
REPLICAS = Shape(4, heads=2)
"""vLLM gives neighbours the same head."""


def in_campaigns(cases: Sequence[Any]) -> list[Any]:
    return [pytest.param(*each, marks=pytest.mark.campaign) for each in cases]


def cache_in(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "tokens_per_chunk": 64,
        "tokens_per_tail": 32,
        "form": "canonical",
        "head_shards": 4,
        "tiers": [
            {"url": "cpu://?capacity=64MiB"},
            {"url": f"file://{directory}", "write": "back", "deadline_seconds": 60.0},
        ],
        **more,
    }


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., EngineProcess]]:
    """``engine_of(shape, directory, **options)``: an engine with a cache there, or without one."""
    from kvlayer_vllm.bench.models import random_model

    models: dict[int, Path] = {}
    running: list[EngineProcess] = []
    zygote = Zygote("vllm_ranks")

    def start(shape: Shape, directory: Path | None, **options: Any) -> EngineProcess:
        if shape.heads not in models:
            models[shape.heads] = random_model(
                tmp_path_factory.mktemp("models") / f"of-{shape.heads}",
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=shape.heads,
                head_dim=64,
                vocab_size=512,
            )
        cache = None if directory is None else cache_in(directory)
        how = {**OPTIONS, **shape.options, **options}
        running.append(EngineProcess(zygote, models[shape.heads], cache, **how))
        return running[-1]

    yield start
    for each in running:
        if not each.has_ended:
            each.kill()
    zygote.close()


@pytest.fixture(scope="module")
def cold(engine_of: Any) -> Callable[[Shape], list[list[int]]]:
    """``cold(shape)``: what vLLM alone answers, on one rank."""
    known: dict[int, list[list[int]]] = {}

    def ask(shape: Shape) -> list[list[int]]:
        if shape.heads not in known:
            process = engine_of(Shape(heads=shape.heads), None)
            known[shape.heads] = [process("ask", [each], ANSWER)[0][0] for each in PROMPTS]
            process.close()
        return known[shape.heads]

    return ask


@pytest.fixture(scope="module")
def stored(
    engine_of: Any, cold: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Shape], Path]:
    """``stored(shape)``: a directory that an engine of this shape has filled, and left."""
    known: dict[Shape, Path] = {}

    def fill(shape: Shape) -> Path:
        if shape not in known:
            directory = tmp_path_factory.mktemp("stored")
            process = engine_of(shape, directory)
            found = [process("ask", [each], ANSWER)[0] for each in PROMPTS]
            assert found == [[answer, 0] for answer in cold(shape)]
            process("rest")
            process.close()
            known[shape] = directory
        return known[shape]

    return fill


PAIRS = [(TWO, ONE), (STAGES, STAGES)]
MORE = [(REPLICAS, REPLICAS), (BOTH, BOTH), (ONE, TWO), (TWO, TWO), (FOUR, TWO), (TWO, FOUR)]


@pytest.fixture
def answers_from(engine_of: Any, stored: Any, cold: Any, figures: Any) -> Callable[..., None]:
    """``answers_from(writes, reads)``: what one has stored a fresh process of the other loads."""

    def check(writes: Shape, reads: Shape) -> None:
        process = engine_of(reads, stored(writes))
        found = [process("ask", [each], ANSWER)[0] for each in PROMPTS]
        assert [answer for answer, _ in found] == cold(reads), (writes, reads)
        assert [cached for _, cached in found] == USABLE, (writes, reads)
        process("rest")
        state = process("state")
        process.close()
        assert state["on"] and state["loaded"] >= sum(USABLE) * state["token_nbytes"]
        assert (state["troubles"], state["leases"], state["pinned"]) == (0, 0, 0)
        figures("vllm.ranks", writes=str(writes), reads=str(reads), loaded=state["loaded"])

    return check


@pytest.mark.parametrize(("writes", "reads"), [*PAIRS, *in_campaigns(MORE)])
def test_an_engine_answers_from_what_another_has_stored(
    writes: Shape, reads: Shape, answers_from: Any
) -> None:
    answers_from(writes, reads)


@pytest.mark.campaign
def test_a_map_of_heads_that_is_not_vllms_answers_wrongly(
    engine_of: Any, cold: Any, tmp_path: Path
) -> None:
    """So that the answers above prove something."""
    process = engine_of(REPLICAS, tmp_path, heads="wrong")
    first = [process("ask", [each], ANSWER)[0] for each in PROMPTS]
    assert first == [[answer, 0] for answer in cold(REPLICAS)]
    process("forget")
    again = [process("ask", [each], ANSWER)[0] for each in PROMPTS]
    process.close()
    assert [cached for _, cached in again] == USABLE
    assert [answer for answer, _ in again] != cold(REPLICAS)


AMONG: list[tuple[Shape, list[str]]] = [
    (TWO, ["greeter", "kvlayer"]),
    (STAGES, ["greeter", "kvlayer"]),
    (TWO, ["kvlayer", "greeter"]),
    (STAGES, ["kvlayer", "offloading"]),
]


@pytest.mark.parametrize(("shape", "order"), [*AMONG[:1], *in_campaigns(AMONG[1:])])
def test_workers_elsewhere_need_no_handshake(
    shape: Shape, order: list[str], engine_of: Any, stored: Any, cold: Any
) -> None:
    """The first prompt is answered from the cache, which opens with the engine's first step."""
    process = engine_of(shape, stored(TWO), beside=order)
    found = [process("ask", [each], ANSWER)[0] for each in PROMPTS]
    assert [answer for answer, _ in found] == cold(shape)
    process("rest")
    state = process("state")
    assert state["on"] and (state["troubles"], state["leases"], state["pinned"]) == (0, 0, 0)
    if shape is TWO:  # stages divide the layers in another way than those who stored
        assert [cached for _, cached in found] == USABLE
        assert state["loaded"] >= sum(USABLE) * state["token_nbytes"]
    process("fail_loads", True)
    process("forget")
    failed = [process("ask", [each], ANSWER)[0][0] for each in PROMPTS]
    assert failed == cold(shape) and process("fail_loads", False) >= len(PROMPTS)
    process.close()


def test_without_one_ranks_object_the_prefix_is_shorter_and_right(
    engine_of: Any, stored: Any, cold: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(stored(TWO), directory)
    chunks = sorted(directory.rglob("*-64.*.h3-4.*"))  # the last head's, which rank 1 has written
    assert len(chunks) == 18  # one of them holds the end of a prompt, and no prefix needs it
    for path in chunks[:2]:
        path.unlink()
    process = engine_of(TWO, directory)
    found = [process("ask", [each], ANSWER)[0] for each in PROMPTS]
    process.close()
    assert [answer for answer, _ in found] == cold(TWO)
    assert 0 < sum(cached for _, cached in found) < sum(USABLE)


def test_nothing_is_served_of_what_a_rank_was_killed_in(
    engine_of: Any, cold: Any, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = engine_of(TWO, tmp_path / "kv", stuck=str(fifo))
    process.begin("ask", [PROMPTS[0]], 600)
    os.kill(int(fifo.read_text().split()[0]), signal.SIGKILL)  # it has an order
    assert process.dies() != 0  # vLLM's engine ends with any of its workers
    again = engine_of(TWO, tmp_path / "kv")
    ((answer, cached),) = again("ask", [PROMPTS[0]], ANSWER)
    assert (answer, cached) == (cold(TWO)[0], 0)
    again.close()
