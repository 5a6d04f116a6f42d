"""The engine sleeps: nobody touches its tensors until they are there again, and the cache stays.

vLLM 0.33 resets its prefix cache, then calls these hooks, in each worker, around giving up the
memory.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hang import HANG
from vllm_desk import hanging

from kvlayer_vllm.connector import KVLayerConnector
from kvlayer_vllm.lent_tensors import LentTensors
from kvlayer_vllm.moves import Save
from kvlayer_vllm.orders import Orders
from kvlayer_vllm.promises import PendingLoads

PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens
BLOCKS, OTHERS = [1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17]


def sleep(at: Any) -> None:
    for worker in at.workers:
        worker.unregistered()


def wake(at: Any) -> None:
    for worker in at.workers:
        worker.restored()


def storing(at: Any, request: Any) -> None:
    """Its KV is being stored when this returns."""
    at.half.arrived(request)
    at.admit(request, BLOCKS)
    at.run({request: 200})
    at.finish(request)
    if at.worker._orders is not None:
        while not at.worker._orders._under_way:
            at.run()


def test_the_engine_sleeps_once_nothing_is_copied(
    desk: Any, request_of: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, waits = desk(), threading.Event()
    wait = Save.wait

    def waiting(save: Save) -> None:
        waits.set()
        wait(save)

    monkeypatch.setattr(Save, "wait", waiting)
    hanging(monkeypatch, go_on)
    storing(at, request_of(PROMPT))
    sleeping = threading.Thread(target=sleep, args=(at,))
    sleeping.start()
    assert waits.wait(HANG)
    assert sleeping.is_alive() and not all(save.is_over for save in at.half._held._held)
    go_on.set()
    sleeping.join()
    assert all(save.is_over for save in at.half._held._held)
    at.rest()
    assert at.found(PROMPT) == 192


def test_control_an_engine_that_does_not_wait_is_still_read(
    desk: Any, request_of: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk()
    monkeypatch.setattr(LentTensors, "take_back", lambda _: None)
    hanging(monkeypatch, go_on)
    storing(at, request_of(PROMPT))
    sleep(at)
    assert not all(save.is_over for save in at.half._held._held)


def test_a_worker_elsewhere_waits_for_its_orders(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk(remote=True)
    storing(at, request_of(PROMPT))
    jobs = [each.job for each in at.worker._orders._under_way]
    monkeypatch.setattr(Orders, "begin", lambda *_: pytest.fail("begun during the sleep"))
    sleep(at)
    assert jobs and all(job.done() for job in jobs)
    at.rest()
    assert at.found(PROMPT) == 192


@pytest.mark.parametrize("remote", [False, True])
def test_nothing_is_loaded_or_stored_during_the_sleep(
    remote: bool, desk: Any, request_of: Any
) -> None:
    at = desk(remote=remote)
    at.answer(request_of(PROMPT), BLOCKS)
    sleep(at)
    before = at.rows(OTHERS)
    late = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(late)
    assert at.admit(late, OTHERS) == 192
    step = at.begin()
    invalid = at.accept(step)
    while at.half._tracked["two"].load is not None:
        invalid |= at.accept(at.begin())
    assert invalid >= set(OTHERS[:6])  # all that was promised is computed
    late.num_computed_tokens = 0
    at.run({late: 201})
    at.finish(late)
    other = request_of([n + 1 for n in PROMPT], request_id="three")
    at.half.arrived(other)
    at.admit(other, OTHERS)
    at.run({other: 200})
    at.finish(other)
    at.rest()
    assert at.found([n + 1 for n in PROMPT]) == 0
    assert all(map(torch.equal, before, at.rows(OTHERS)))


@pytest.mark.parametrize("remote", [False, True])
def test_after_the_sleep_the_cache_is_the_one_from_before(
    remote: bool, desk: Any, request_of: Any
) -> None:
    at = desk(remote=remote)
    at.answer(request_of(PROMPT), BLOCKS)
    was, portal = at.rows(BLOCKS[:6]), at.half.portal
    sleep(at)
    for tensors in at.rows_held:
        for each in tensors.values():
            each.zero_()  # other pages at the same place
    wake(at)
    assert at.half.portal is portal
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, OTHERS) == 192
    at.run()
    while at.half._tracked["two"].load is not None:
        at.run()
    assert all(map(torch.equal, was, at.rows(OTHERS[:6])))
    at.run({again: 9})
    at.finish(again)
    at.rest()


def loaded_before(at: Any, request_of: Any) -> set[int]:
    """A load has ended and vLLM has not heard so when the engine sleeps: what it hears then."""
    at.answer(request_of(PROMPT), BLOCKS)
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, OTHERS) == 192
    step = at.begin()
    load = at.half._tracked["two"].load
    while not load.is_over:
        pass
    at.half.before_reset()
    sleep(at)
    wake(at)
    invalid: set[int] = at.accept(step)
    while at.half._tracked["two"].load is not None:
        invalid |= at.accept(at.begin())
    return invalid


def test_what_was_loaded_before_the_sleep_is_computed(desk: Any, request_of: Any) -> None:
    assert loaded_before(desk(), request_of) == set(OTHERS[:6])


def test_control_a_load_from_before_the_sleep_is_taken_for_right(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PendingLoads, "distrust", lambda _: None)
    assert loaded_before(desk(), request_of) == set()


def test_vllm_is_told_that_it_may_sleep(vllm_config: Any) -> None:
    assert KVLayerConnector.supports_sleep_mode(vllm_config.kv_transfer_config)
