"""One engine in this process, stepped by hand: what a request cost until its first token."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ENVIRONMENT", "Answer", "Serving", "prompt_of"]

ENVIRONMENT: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",  # on a busy machine two threads can be twenty times slower than one
    "KMP_BLOCKTIME": "1",  # threads that wait must not spin: CPU seconds are what is measured
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What the engine reads when it is imported."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one prompt. ``cached``: prompt tokens that were not computed."""

    tokens: tuple[int, ...]
    cached: int
    seconds: float
    """Until the first token."""
    cpu_seconds: float
    """Of all threads of the process, until the first token."""
    logprobs: tuple[tuple[float, ...], ...] = ()
    """Of each token the best ones, best first, where they were asked for."""


def prompt_of(tokens: int, seed: int, vocabulary: int = 8192) -> list[int]:
    """Random token ids; prompts of one seed begin alike."""
    rng = random.Random(seed)  # noqa: S311  # a prompt, not a secret
    return [rng.randrange(300, vocabulary) for _ in range(tokens)]


class Serving:
    """A vLLM engine in this process. Import nothing of vLLM's before making one."""

    def __init__(
        self, model: str, *, cache: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """``cache``: kvlayer's extra configuration; None: without kvlayer."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from kvlayer_vllm.engine import module

        settings: dict[str, Any] = {
            "enforce_eager": True,
            "block_size": 32,
            "max_num_seqs": 4,
            "max_model_len": 8192,
            "enable_prefix_caching": False,
            "distributed_executor_backend": "uni",
        }
        if cache is not None:
            settings["kv_transfer_config"] = module("config").KVTransferConfig(
                kv_connector="KVLayerConnector",
                kv_connector_module_path="kvlayer_vllm",
                kv_role="kv_both",
                kv_connector_extra_config=dict(cache),
            )
        self.engine: Any = module().LLMEngine.from_engine_args(
            module().EngineArgs(model=model, **{**settings, **options})
        )
        self._asked = 0

    @property
    def core(self) -> Any:
        """vLLM's engine core, which steps scheduler and workers."""
        return self.engine.engine_core.engine_core

    @property
    def connector(self) -> Any:
        """The scheduler's connector."""
        return self.core.scheduler.connector

    def ask(
        self,
        prompts: Sequence[Sequence[int] | Mapping[str, Any]],
        tokens: int,
        *,
        salt: str = "",
        **sampling: Any,
    ) -> list[Answer]:
        """Greedy answers to prompts that arrive at once; ``salt`` is their ``cache_salt``.

        A prompt is token ids, or whatever else vLLM takes for one.
        """
        from kvlayer_vllm.engine import module

        parameters = module().SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **sampling
        )
        names: list[str] = []
        began, cpu_began = time.perf_counter(), time.process_time()
        for prompt in prompts:
            self._asked += 1
            names.append(f"request-{self._asked}")
            asked: dict[str, Any] = {}
            if isinstance(prompt, Mapping):
                asked |= prompt
            else:
                asked["prompt_token_ids"] = list(prompt)
            if salt:
                asked["cache_salt"] = salt
            self.engine.add_request(names[-1], asked, parameters)
        first: dict[str, tuple[float, float]] = {}
        done: dict[str, Any] = {}
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            if not outputs:  # as vLLM's own loop, which lets other threads go on
                time.sleep(0.001)
            for output in outputs:
                now = time.perf_counter() - began, time.process_time() - cpu_began
                first.setdefault(output.request_id, now)
                if output.finished:
                    done[output.request_id] = output
        return [
            Answer(
                tuple(done[name].outputs[0].token_ids),
                done[name].num_cached_tokens or 0,
                *first[name],
                tuple(
                    tuple(sorted((entry.logprob for entry in best.values()), reverse=True))
                    for best in done[name].outputs[0].logprobs or ()
                ),
            )
            for name in names
        ]

    def rest(self) -> None:
        """Step until nothing holds blocks any more and the output of every step was heard."""
        while self.core.scheduler.has_requests() or self.core.batch_queue:
            self.engine.step()

    def close(self) -> None:
        """End the engine; what is stored reaches its tiers."""
        self.engine.engine_core.shutdown()
