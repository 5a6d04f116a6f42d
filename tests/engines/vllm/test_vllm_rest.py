"""Steps that compute nothing: they rest, and tell of what has ended while they did."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from kvlayer import Cache
from kvlayer_vllm import worker
from kvlayer_vllm.messages import Step

PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens
BLOCKS, OTHERS = [1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]


@pytest.fixture
def loading(
    desk: Any, request_of: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A desk whose one request waits for a load that goes on with ``go_on``."""
    at = desk()
    at.answer(request_of(PROMPT), BLOCKS)
    retrieve = Cache.retrieve

    async def late(cache: Cache, *args: Any, **how: Any) -> Any:
        await asyncio.get_running_loop().run_in_executor(None, go_on.wait)
        return await retrieve(cache, *args, **how)

    monkeypatch.setattr(Cache, "retrieve", late)
    waits = request_of(PROMPT, request_id="waits")
    at.half.arrived(waits)
    assert at.admit(waits, OTHERS) == 192
    assert not at.run().received
    return at


def _ends_in_the_rest(at: Any, go_on: threading.Event, patch: pytest.MonkeyPatch) -> Step:
    """A step is made while the load goes on, and rests until it is over."""
    before_step = at.worker.before_step

    def made(step: Step) -> None:
        assert step.is_idle and not step.received
        before_step(step)
        go_on.set()

    with patch.context() as here:
        here.setattr(worker, "_IDLE_SECONDS", 300.0)  # it is woken: a clock decides nothing
        here.setattr(at.worker, "before_step", made)
        step: Step = at.begin()
    return step


def test_a_load_that_ends_while_a_step_rests_is_told_of_with_that_step(
    loading: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _ends_in_the_rest(loading, go_on, monkeypatch)
    assert step.received == {"waits"} and not step.invalid
    assert not loading.worker._has_loaded.is_set()  # the next step rests as well
    loading.accept(step)
    assert loading.half._tracked["waits"].load is None
    assert not loading.half._tracked["waits"].is_awaited
    assert not loading.run().received  # it is told of once
    for there, here in zip(loading.rows(BLOCKS[:6]), loading.rows(OTHERS[:6]), strict=True):
        assert (there == here).all()


def test_a_load_that_fails_while_a_step_rests_is_told_of_as_one_that_failed(
    loading: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading.half._tracked["waits"].load.distrust()
    step = _ends_in_the_rest(loading, go_on, monkeypatch)
    assert step.received == {"waits"} and step.invalid == set(OTHERS[:6])


def test_of_a_load_that_begins_with_a_step_a_later_one_tells(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook of this step may still fail, and must be able to distrust it."""
    at = desk()
    at.answer(request_of(PROMPT), BLOCKS)
    monkeypatch.setattr(worker, "_IDLE_SECONDS", 300.0)
    waits = request_of(PROMPT, request_id="waits")
    at.half.arrived(waits)
    at.admit(waits, OTHERS)
    step = at.begin()
    assert at.half._tracked["waits"].load.is_over and not step.received
    at.accept(step)
    assert at.run().received == {"waits"}


def test_a_step_that_computes_does_not_rest(
    loading: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[Step] = []
    monkeypatch.setattr(loading.worker, "_rest", rests.append)
    other = request_of(list(range(300, 340)), request_id="other")
    loading.half.arrived(other)
    loading.admit(other, [15, 16])
    loading.run({other: 40})
    assert not rests
    loading.run()
    assert len(rests) == 1
