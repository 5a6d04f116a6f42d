"""``vllm serve`` with kvlayer, and an engine whose worker is another process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hang import HANG
from vllm_server import Server

ANSWER = 12
CACHED = 672


def prompt(seed: int = 1) -> list[int]:
    from kvlayer_vllm.bench.serving import prompt_of

    return prompt_of(700, seed, 512)


def once_stored(server: Server, tokens: list[int], wanted: int) -> set[str]:
    """Ask until ``wanted`` tokens are found: a server stores while it answers. All the answers."""
    texts: set[str] = set()
    until = time.monotonic() + HANG
    while True:
        text, cached = server.complete(tokens, ANSWER)
        texts.add(text)
        if cached == wanted:
            return texts
        if time.monotonic() > until:
            raise AssertionError(f"{cached} tokens found, {wanted} expected: {server.log}")


def cache_in(directory: Path) -> dict[str, Any]:
    return {
        "tokens_per_chunk": 64,
        "tokens_per_tail": 32,
        "held_share": 1.0,  # few blocks, and what is stored is counted
        "tiers": [
            {"url": "cpu://?capacity=64MiB"},
            {"url": f"file://{directory}", "write": "back", "deadline_seconds": 60.0},
        ],
    }


@pytest.fixture
def serve(tiny: Path, tmp_path: Path) -> Iterator[Any]:
    """``serve()``: a server over the test's directory; what a test leaves running is killed."""
    running: list[Server] = []

    def start() -> Server:
        running.append(
            Server(
                tiny,
                tmp_path,
                cache_in(tmp_path / "kv"),
                *("--dtype", "float32", "--enforce-eager", "--block-size", "32"),
                *("--max-model-len", "1024", "--num-gpu-blocks-override", "64"),
                *("--max-num-seqs", "4", "--no-enable-prefix-caching"),
                *("--enable-prompt-tokens-details", "--shutdown-timeout", "60"),
                VLLM_ENABLE_V1_MULTIPROCESSING="1",
            )
        )
        return running[-1]

    yield start
    for each in running:
        each.kill()


def test_a_server_finds_what_it_and_the_one_before_it_have_computed(serve: Any) -> None:
    first = serve()
    assert first.log.count("kvlayer is on") == 1
    text, cached = first.complete(prompt(), ANSWER)
    assert text and cached == 0
    assert once_stored(first, prompt(), CACHED) == {text}
    branch = [*prompt()[:400], *prompt(2)[:100]]
    other, cached = first.complete(branch, ANSWER)
    assert cached == 384
    assert once_stored(first, branch, 480) == {other}
    assert first.end() == (0, []), first.log

    second = serve()
    assert second.complete(prompt(), ANSWER) == (text, CACHED)
    assert second.complete(branch, ANSWER) == (other, 480)
    assert second.end() == (0, []), second.log
    for log in (first.log, second.log):  # vLLM's own tasks may tell of an engine that is gone
        assert "/kvlayer_vllm/" not in log and "a hook of kvlayer" not in log


def test_a_worker_in_another_process_loads_and_stores(
    tiny: Path, tmp_path: Path, engine_process: Any
) -> None:
    options = {
        "dtype": "float32",
        "max_num_batched_tokens": 512,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 64,
    }
    alone = engine_process(tiny, None, **options)
    ((cold, _),) = alone("ask", [prompt()], ANSWER)
    alone.close()
    for number in range(2):
        process = engine_process(
            tiny, cache_in(tmp_path), **options, distributed_executor_backend="mp"
        )
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        if number == 0:
            assert process("ask", [prompt()], ANSWER) == [[cold, 0]]
            process("rest")
            process("leave_memory", prompt())
        assert process("ask", [prompt()], ANSWER) == [[cold, CACHED]]
        process("rest")
        assert process("alter", [prompt()]) > 0
        ((altered, cached),) = process("ask", [prompt()], ANSWER)
        assert altered != cold and cached == CACHED
        process("rest")
        state = process("state")
        assert state["on"] and (state["troubles"], state["leases"], state["tracked"]) == (0, 0, 0)
        process.close()
        assert psutil.wait_procs(workers, timeout=HANG)[1] == []
