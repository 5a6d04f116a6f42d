"""Blocks that stores hold, and vLLM's own scheduler around them: resets, accounts, preemption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from shaped_engine import Engine
from shaped_gate import Gate, by_turns
from shaped_late import Late
from shaped_setting import SETTINGS

from kvlayer_vllm.held_blocks import HeldBlocks
from kvlayer_vllm.scheduler import SchedulerHalf

LONG = list(range(50, 180))  # more than a step computes
OTHER = list(range(200, 330))


@pytest.fixture
def start(configs: Any) -> Iterator[Callable[..., tuple[Engine, Gate]]]:
    """``start(setting)``: an engine whose stores read only in turns that the test gives."""
    with ExitStack() as stack:

        def run(setting: str) -> tuple[Engine, Gate]:
            gate = Gate(Late())
            stack.enter_context(by_turns(gate))
            engine = Engine(configs(SETTINGS[setting]), Late())
            stack.enter_context(closing(engine))
            stack.enter_context(gate.guarding(engine.connector.scheduler.portal))
            return engine, gate

        yield run


def held(engine: Engine) -> int:
    return int(engine.connector.scheduler._held.blocks)


def storing(engine: Engine) -> None:
    """Step until a store has begun."""
    while not held(engine):
        engine.turn()


def finish(engine: Engine, gate: Gate) -> None:
    while engine.is_busy:
        engine.turn()
        gate.turn()
    assert not engine.wrong_reads and not engine.wrong_answers
    assert not engine.missing_blocks and engine.scheduler.kv_cache_manager.usage == 0


@pytest.mark.parametrize("setting", ["one step, async loads", "one step, a window"])
def test_a_reset_of_the_prefix_cache_succeeds_while_a_store_reads(
    setting: str, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = start(setting)
    engine.ask("one", LONG, 4)
    storing(engine)
    with monkeypatch.context() as patch:
        patch.setattr(SchedulerHalf, "before_reset", lambda _: None)
        with pytest.raises(RuntimeError, match="Failed to reset KV cache"):
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert held(engine)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not held(engine)
    finish(engine, gate)
    assert engine.scheduler.reset_prefix_cache()
    engine.ask("again", LONG, 1)
    finish(engine, gate)
    assert engine.connector.scheduler.portal.cache.control.stats().tiers[0].loaded_nbytes


@pytest.mark.parametrize("setting", ["two steps", "two steps, a worker elsewhere"])
def test_an_engine_that_is_to_rest_steps_until_it_has_its_blocks_back(
    setting: str, start: Any
) -> None:
    """So vLLM's pause, which waits for that before it resets, sleeps or takes other weights."""
    engine, gate = start(setting)
    engine.ask("one", LONG, 1)
    while engine.live:
        engine.turn()
    assert held(engine) and not engine.scheduler.has_unfinished_requests()
    for _ in range(4):
        engine.turn()
    assert held(engine) and engine.is_busy
    finish(engine, gate)
    assert not held(engine) and engine.scheduler.reset_prefix_cache()


@pytest.mark.parametrize("waits", [True, False])
def test_no_request_is_preempted_for_blocks_that_come_back_by_themselves(
    waits: bool, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it vLLM takes them from a request, which computes again: the second case."""
    if not waits:
        monkeypatch.setattr(HeldBlocks, "will_free", lambda _: False)
    engine, gate = start("one step, async loads")
    engine.ask("other", OTHER, 100)  # 15 blocks of the 31 by its end
    while engine.live["other"].num_output_tokens < 2:
        engine.turn()
        gate.turn()
    engine.ask("one", LONG, 1)  # 9 blocks
    while "one" in engine.live:
        engine.turn()
    assert held(engine)
    pool = engine.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks())  # nothing else is left
    for _ in range(20):
        engine.turn()
    gate.turn()
    pool.free_blocks(taken)
    finish(engine, gate)
    assert (engine.preempted == 0) is waits
