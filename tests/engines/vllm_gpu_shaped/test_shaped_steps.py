"""Steps under way, one case each: what is stored is what the device has written."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
from shaped_engine import Engine
from shaped_faults import WrongKVError, lifted
from shaped_gate import Gate, by_turns
from shaped_late import Late
from shaped_play import play
from shaped_setting import SETTINGS

SHORT = list(range(3, 43))
LONG = list(range(50, 180))  # more than a step computes


@pytest.mark.parametrize("setting", ["two steps", "three steps"])
def test_a_twin_that_is_admitted_while_its_prefix_is_computed_stores_no_unwritten_rows(
    setting: str, configs: Any
) -> None:
    gate = Gate(Late())
    with by_turns(gate), lifted():
        engine = Engine(configs(SETTINGS[setting]), Late())
        with closing(engine), gate.guarding(engine.connector.scheduler.portal):
            for name, prompt in {"short": SHORT, "one": LONG, "twin": LONG}.items():
                engine.ask(name, prompt, 2)
            finish(engine, gate)
            assert engine.scheduler.reset_prefix_cache()
            for name, prompt in {"short again": SHORT, "one again": LONG}.items():
                engine.ask(name, prompt, 2)
            finish(engine, gate)
            assert loaded(engine) > 0
            check(engine)


def test_a_twin_that_is_aborted_in_the_step_that_computes_its_prefix_stores_nothing_of_it(
    configs: Any,
) -> None:
    gate = Gate(Late())
    with by_turns(gate), lifted():
        engine = Engine(configs(SETTINGS["two steps"]), Late())
        with closing(engine), gate.guarding(engine.connector.scheduler.portal):
            engine.ask("one", LONG[:64], 1)
            engine.ask("twin", LONG[:64], 1)
            engine.turn()
            engine.abort("twin")
            gate.turn()  # what it stores is read now, and the device has computed nothing
            finish(engine, gate)
            assert engine.scheduler.reset_prefix_cache()
            engine.ask("one again", LONG[:64], 1)
            finish(engine, gate)
            assert loaded(engine) > 0
            check(engine)


stays_in_the_prefix_cache = pytest.param(
    "one step, sync loads",
    marks=pytest.mark.xfail(
        raises=WrongKVError,
        reason="vLLM leaves blocks in its prefix cache that a step should have loaded and did not "
        "(vLLM issue 49250); a version that mends it goes into RECOMPUTES_IN_STEP",
    ),
)


@pytest.mark.parametrize("is_heard", [False, True], ids=["not heard of", "heard of"])
@pytest.mark.parametrize("setting", [stays_in_the_prefix_cache, "one step, async loads"])
def test_what_a_failed_load_leaves_behind_is_never_attended_to(
    setting: str, is_heard: bool, configs: Any
) -> None:
    """Its request is aborted before it has computed anything of it again."""
    gate = Gate(Late(), failing=0)
    with by_turns(gate), lifted():
        engine = Engine(configs(SETTINGS[setting]), Late())
        with closing(engine), gate.guarding(engine.connector.scheduler.portal):
            engine.ask("stored", LONG, 1)
            finish(engine, gate)
            assert engine.scheduler.reset_prefix_cache()
            gate.failing = 100
            engine.ask("fails", LONG, 1)
            while not gate.failed:
                engine.turn(lambda: None if is_heard else engine.abort("fails"))
                gate.turn()
            if is_heard:
                engine.abort("fails")
            engine.ask("next", LONG, 1)
            finish(engine, gate)
            check(engine)


def test_a_seed_plays_the_same_each_time(configs: Any) -> None:
    of = configs(SETTINGS["two steps"])
    assert play(of, 3) == play(of, 3)


def check(engine: Engine) -> None:
    if engine.wrong_reads or engine.wrong_answers:
        raise WrongKVError(f"{engine.wrong_reads} {engine.wrong_answers}")


def finish(engine: Engine, gate: Gate) -> None:
    """Until nothing is under way and all that is stored lies in the cache."""
    while engine.is_busy:
        engine.turn()
        gate.turn()


def loaded(engine: Engine) -> int:
    return int(engine.connector.scheduler.portal.cache.control.stats().tiers[0].loaded_nbytes)
