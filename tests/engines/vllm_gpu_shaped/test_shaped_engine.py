"""vLLM's own V2 runner and AsyncScheduler, around a CPU: first that they are right by themselves.

Expected answers come from vLLM's CPU engine as it is, in a process without Triton: another runner,
another scheduler, another attention.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import shaped_triton
from shaped_device import Behind
from shaped_faults import WrongKVError
from shaped_order import STEP
from shaped_rank import Batch, Rank, Work
from shaped_setting import SETTINGS
from shaped_text import Text
from vllm_process import EngineProcess
from zygote import Zygote

ANSWER = 8
OPTIONS: dict[str, Any] = {
    "dtype": "float32",  # in bf16 near ties decide greedy answers
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 40,
    "max_model_len": 1024,
    "enable_prefix_caching": True,
}
CACHE = {
    "tokens_per_chunk": 64,
    "tokens_per_tail": 32,
    "loads": "async",
    "tiers": [{"url": "cpu://?capacity=64MiB"}],
}
LAYOUTS = ["LBNHC", "LBHNC", "BLHNC", "BLNHC"]


@pytest.fixture(scope="module")
def shaped(zygotes: dict[str, Zygote]) -> Iterator[Callable[..., EngineProcess]]:
    """``shaped(model, cache, **options)``: an engine of ``shaped_process.py``."""
    if shaped_triton.FOLDER not in os.environ:
        pytest.skip(f"{shaped_triton.FOLDER} names no folder: nox -s vllm-gpu-shaped installs it")
    running: list[EngineProcess] = []

    def start(model: Path, cache: Any = None, **options: Any) -> EngineProcess:
        running.append(EngineProcess(zygotes["shaped_process"], model, cache, **OPTIONS, **options))
        return running[-1]

    yield start
    for each in running:
        if not each.has_ended:
            each.kill()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Some that share a prefix, some longer than a step, one of them twice."""
    numbers = random.Random(7)
    words = [numbers.randrange(300, 512) for _ in range(2000)]
    long = words[300:610]
    return [words[:40], long, long, words[700:850], words[700:800] + words[:60], words[900:1101]]


@pytest.fixture(scope="module")
def expected(zygotes: dict[str, Zygote], model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What the engine answers, each prompt alone."""
    process = EngineProcess(zygotes["vllm_engine"], model, None, **OPTIONS)
    answers = [process("ask", [prompt], ANSWER)[0][0] for prompt in prompts]
    process.close()
    return answers


def check(found: list[Any], expected: list[list[int]]) -> None:
    wrong = [n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    if wrong:
        raise WrongKVError(f"answers to prompts {wrong} of {len(expected)} are wrong: {found}")


def asked(process: EngineProcess, prompts: list[list[int]]) -> tuple[list[Any], int]:
    """Answers to prompts that arrive at once, and how many prompt tokens were not computed."""
    found = process("ask", prompts, ANSWER)
    return [tokens for tokens, _ in found], sum(cached for _, cached in found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vllm_alone_is_right_with_a_gpus_attention(
    layout: str, shaped: Any, model: Path, prompts: list[list[int]], expected: Any
) -> None:
    process = shaped(model, attention="triton", layout=layout)
    check(asked(process, prompts[:4])[0], expected[:4])
    seen = process("shape")
    process.close()
    assert seen.pop("writes") > 0
    assert seen == {
        "scheduler": "AsyncScheduler",
        "runner": "vllm.v1.worker.gpu.model_runner",
        "steps": 2,
        "layout": layout,
        "late": 0,
    }


@pytest.mark.parametrize(
    "loads",
    [
        pytest.param(
            "sync",
            marks=pytest.mark.xfail(
                raises=WrongKVError,
                reason="vLLM's V2 runner answers wrongly, and says nothing, after a load that its "
                "connector reports as failed in the same step (vLLM issue 49250)",
            ),
        ),
        "async",
    ],
)
def test_vllm_itself_recomputes_what_a_connector_could_not_load(
    loads: str, shaped: Any, model: Path, prompts: list[list[int]], expected: Any
) -> None:
    process = shaped(model, rejecting=loads)
    found = [asked(process, [prompt])[0][0] for prompt in prompts]
    process.kill()
    check(found, expected)


def test_a_rank_of_the_rig_does_what_vllms_runner_does_in_the_same_order(
    shaped: Any, configs: Any, model: Path, prompts: list[list[int]]
) -> None:
    """A load begins behind what has zeroed its blocks: on both, in every step."""
    process = shaped(model, CACHE, notes_order=True)
    for _ in range(2):
        assert asked(process, prompts[1:3])
        process("forget")
    assert process("state")["loaded"] > 0
    steps = process("order")
    process.close()
    assert len(steps) > 20
    assert [step for step in steps if step != STEP] == []

    seen = list[str]()
    rank = Rank(configs(SETTINGS["two steps, zeroed blocks"]), 0, NotingDevice(seen))
    rank.connector = NotingConnector(seen)
    work = Work("request", Text(range(20)), ((1, 2),), 0, 20, samples=False)
    said = SimpleNamespace(
        new_block_ids_to_zero=[1, 2],
        kv_connector_metadata=None,
        has_sync_kv_loads=False,
        finished_req_ids=set[str](),
    )
    rank.run(Batch(1, said, [work]))
    assert seen == STEP


class NotingDevice(Behind):
    """Says what is queued."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    @property
    def is_idle(self) -> bool:
        return False

    def queue(self, number: int, run: Any, reads: Any, writes: Any) -> None:
        self._seen.append(STEP[2] if STEP[0] in self._seen else STEP[0])


class NotingConnector:
    """Says which of the hooks that matter was called."""

    HOOKS: ClassVar = {
        "handle_preemptions": STEP[1],
        "start_load_kv": STEP[3],
        "build_connector_worker_meta": STEP[4],
    }

    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        if name in self.HOOKS:
            self._seen.append(self.HOOKS[name])
        found = SimpleNamespace(finished_sending=None, finished_recving=None, failed_recving=None)
        return lambda *_: found if name == "get_transfer_results" else None


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_answers_are_the_same_on_a_device_that_lags(
    at_once: bool, shaped: Any, model: Path, prompts: list[list[int]], expected: Any
) -> None:
    process = shaped(model, CACHE, lags=True)
    assert process("state")["on"]
    arrivals = [prompts] if at_once else [[prompt] for prompt in prompts]
    for _ in range(3):
        found, loaded = list[Any](), 0
        for some in arrivals:
            answers, cached = asked(process, some)
            found += answers
            loaded += cached
        check(found, expected)
        assert process("shape")["late"] > 0
        process("forget")
    assert loaded > 0
    process.close()


FORMS = ("canonical", "native")
WRITTEN = [(layout, form) for layout in LAYOUTS for form in FORMS]


def test_what_one_engine_stores_another_reads_in_every_layout_and_form(
    shaped: Any,
    model: Path,
    prompts: list[list[int]],
    expected: Any,
    tmp_path: Path,
    dose: Any,
) -> None:
    """On a device that lags, by the kernel that writes a GPU's cache."""
    for layout, form in WRITTEN[: dose(2, len(WRITTEN))]:
        tiers = [*CACHE["tiers"], {"url": f"file://{tmp_path}/{layout}-{form}?capacity=1GiB"}]
        options = {"attention": "triton", "layout": layout, "lags": True}
        for has_written in (False, True):
            process = shaped(model, {**CACHE, "form": form, "tiers": tiers}, **options)
            state = process("state")
            assert state["on"] and {each.split(":")[0] for each in state["groups"]} == {form}
            answers, cached = asked(process, prompts[:4])
            check(answers, expected[:4])
            assert process("shape")["writes"] > 0
            assert cached >= sum(len(each) // 32 * 32 for each in prompts[:4]) * has_written
            process.close()
