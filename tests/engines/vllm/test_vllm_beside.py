"""kvlayer in vLLM's ``MultiConnector``: alone, and before or behind others.

In fp32 answers are those of vLLM alone, whoever loads, and whether or not a load fails.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import vllm_models
from vllm_beside import config_of

import kvlayer_vllm
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


# -- what one connector takes from all -------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with sliding windows in KV groups of their own."""
    return vllm_models.mixed(tmp_path_factory.mktemp("models") / "mixed")


@pytest.fixture
def made(
    mixed: Path, spec: Any, kv_cache_config: Any, caplog: pytest.LogCaptureFixture
) -> Iterator[Any]:
    """``made(*order)``: vLLM's configuration with these connectors, their halves in its scheduler,
    and what kvlayer said while they were made."""
    from vllm import EngineArgs
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    running: list[Any] = []
    logger = logging.getLogger("vllm.kvlayer")

    def make(*order: str, role: str = "kv_both", batches: int = 1) -> tuple[Any, Any, str]:
        config = EngineArgs(
            model=str(mixed),
            dtype="float32",
            block_size=32,
            max_model_len=1024,
            distributed_executor_backend="uni",
            kv_transfer_config=config_of(order, CACHE, role),
        ).create_engine_config()
        config.scheduler_config.async_scheduling = batches > 1
        assert config.max_concurrent_batches == batches
        logger.addHandler(caplog.handler)  # vLLM's logger may keep its records to itself
        held = spec("FullAttentionSpec", sliding_window=128)  # as vLLM keeps windows in one group
        running.append(
            KVConnectorFactory.create_connector(
                config,
                KVConnectorRole.SCHEDULER,
                kv_cache_config((["model.layers.0.self_attn.attn"], held)),
            )
        )
        return config, running[-1], caplog.text

    yield make
    logger.removeHandler(caplog.handler)
    for each in running:
        each.shutdown()


def test_the_policy_that_vllm_reads_is_set_and_told(made: Any) -> None:
    config, _, text = made("greeter", "kvlayer")
    assert config.kv_transfer_config.kv_load_failure_policy == "recompute"
    assert "from here on for all connectors of MultiConnector" in text
    assert "single KV group" not in text


def test_who_knows_a_single_group_is_named(made: Any) -> None:
    config, _, text = made("greeter", "lone", "kvlayer")
    assert config.scheduler_config.disable_hybrid_kv_cache_manager
    assert "LoneGreeter beside kvlayer serves a single KV group" in text


@pytest.mark.parametrize(
    ("role", "batches", "loads"),
    [("kv_both", 2, True), ("kv_producer", 1, True), ("kv_producer", 2, False)],
)
def test_nothing_is_loaded_where_vllm_would_not_keep_blocks_from_it(
    role: str, batches: int, loads: bool, made: Any
) -> None:
    """vLLM looks at the role of the whole. What else steps under way do is tested elsewhere."""
    _, multi, text = made("greeter", "kvlayer", role=role, batches=batches)
    half = multi.sub_connectors[1].scheduler
    assert half._may_store and half._may_load is loads
    assert ("kv_role must be 'kv_both'" not in text) is loads


def test_beside_one_that_knows_a_single_group_windows_are_kept_whole(
    engine_process: Any, mixed: Path
) -> None:
    alone = engine_process(mixed, None, **OPTIONS)
    right = [alone("ask", [each], ANSWER)[0][0] for each in PROMPTS]
    alone.close()
    ask = Asked(engine_process(mixed, CACHE, beside=["lone", "kvlayer"], **OPTIONS))
    assert ask() == (right, [0, 0, 0])
    assert ask() == (right, USABLE) and ask.loaded() >= sum(USABLE)
    assert ask.process("state")["rules"] == ["every-chunk"]
    ask.process.close()


def test_its_figures_are_found_by_name_where_no_entry_point_was_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    name, path = "KVLayerConnector", "kvlayer_vllm.connector"
    monkeypatch.delitem(KVConnectorFactory._registry, name, raising=False)
    monkeypatch.delitem(sys.modules, path)
    monkeypatch.setattr(kvlayer_vllm, "connector", None, raising=False)
    import_module(path)  # as a configuration with kv_connector_module_path does
    counted = {"counters": {"lookups": 1.0}, "seconds": {}, "gauges": {}}
    figures = MultiConnector.build_kv_connector_stats({name: counted})
    assert figures is not None and figures.to_dict() == {name: counted}
