"""Workers in other processes introduce themselves with the first step; requests wait for that."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from functools import reduce
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_desk import BLOCK, LAYERS

from kvlayer import Cache, Portal
from kvlayer.api.rank_worker import RankWorker
from kvlayer.errors import ClosedError, LayoutError
from kvlayer_vllm import scheduler
from kvlayer_vllm.connector import KVLayerConnector
from kvlayer_vllm.introductions import Introduction, announce, announced, withdraw
from kvlayer_vllm.messages import Answers

RANKS = 2


class Elsewhere:
    """Both halves of the connector, its workers as if in processes of their own."""

    def __init__(self, scheduler: KVLayerConnector, workers: list[KVLayerConnector]) -> None:
        self.scheduler, self.workers = scheduler, workers

    def begin(self) -> Any:
        """A step that computes nothing goes out: what the workers answer together."""
        nothing = SimpleNamespace(num_scheduled_tokens={}, preempted_req_ids=None)
        step = self.scheduler.build_connector_meta(nothing)
        answers: list[Any] = []
        for worker in self.workers:
            received = _crossed(step)
            worker.handle_preemptions(received)
            worker.bind_connector_metadata(received)
            worker.start_load_kv(None)
            answers.append(_crossed(worker.build_connector_worker_meta()))
        said = [each for each in answers if each is not None]
        return reduce(Answers.aggregate, said) if said else None

    def hear(self, answers: Any) -> None:
        self.scheduler.update_connector_output(SimpleNamespace(kv_connector_worker_meta=answers))

    @property
    def half(self) -> Any:
        return self.scheduler.scheduler

    def matched(self, request: Any) -> Any:
        """What is found of the request, once that is known."""
        while (found := self.scheduler.get_num_new_matched_tokens(request, 0))[0] is None:
            self.hear(self.begin())
        return found


def _crossed(message: Any) -> Any:
    return pickle.loads(pickle.dumps(message))  # noqa: S301


@pytest.fixture
def elsewhere(
    vllm_config: Any,
    spec: Any,
    kv_cache_config: Any,
    changed: Any,
    no_cache_home: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Any]:
    """``elsewhere(off=())``: an engine of two ranks, of which these workers are off."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
    from vllm.v1.core.block_pool import BlockPool

    cache = {
        "tokens_per_chunk": 2 * BLOCK,
        "tokens_per_tail": BLOCK,
        "tiers": [{"url": "cpu://?capacity=64MiB"}],
    }
    monkeypatch.setattr(vllm_config.kv_transfer_config, "kv_connector_extra_config", cache)
    groups = kv_cache_config((LAYERS, spec("FullAttentionSpec", num_kv_heads=1)))
    made: list[KVLayerConnector] = []

    def connector(role: str, rank: int = 0) -> KVLayerConnector:
        fields = {"distributed_executor_backend": "mp", "tensor_parallel_size": RANKS}
        config = changed(vllm_config, "parallel_config", rank=rank, **fields)
        made.append(KVLayerConnector(config, KVConnectorRole[role], groups))
        return made[-1]

    def make(off: tuple[int, ...] = ()) -> Elsewhere:
        workers = [connector("WORKER", rank) for rank in range(RANKS)]
        for rank, worker in enumerate(workers):
            tensors = {name: torch.zeros(64, 1, BLOCK, 128) for name in LAYERS}
            worker.register_kv_caches({} if rank in off else tensors)
        scheduler = connector("SCHEDULER")
        pool = BlockPool(64, enable_caching=True, hash_block_size=BLOCK)
        scheduler.bind_kv_cache_manager(
            SimpleNamespace(block_pool=pool, reset_prefix_cache=lambda: True)
        )
        return Elsewhere(scheduler, workers)

    yield make
    for each in made:
        each.shutdown()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the adapter logs: vLLM's logger may keep its records to itself."""
    logger = logging.getLogger("vllm.kvlayer")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_the_engine_steps_until_the_workers_are_known(elsewhere: Any) -> None:
    at = elsewhere()
    assert at.scheduler.is_on and at.scheduler.has_pending_push_work()
    answers = at.begin()
    assert sorted(answers.introductions) == [0, 1] and not at.half.is_open
    at.hear(answers)
    assert at.half.is_open and not at.scheduler.has_pending_push_work()
    assert not at.begin().introductions


def test_a_request_that_comes_earlier_waits_and_is_served(elsewhere: Any, request_of: Any) -> None:
    at, request = elsewhere(), request_of(list(range(100)))
    at.scheduler.on_new_request(request)
    assert at.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    assert not at.half.is_open
    assert at.matched(request) == (0, False)
    assert at.half.tracked == 1


def test_a_request_that_ends_earlier_is_forgotten(elsewhere: Any, request_of: Any) -> None:
    at, request = elsewhere(), request_of(list(range(100)))
    at.scheduler.on_new_request(request)
    assert at.scheduler.request_finished_all_groups(request, ([],)) == (False, None)
    at.hear(at.begin())
    assert at.half.is_open and at.half.tracked == 0


def test_steps_that_are_under_way_meanwhile_change_nothing(elsewhere: Any, request_of: Any) -> None:
    at = elsewhere()
    first, second = at.begin(), at.begin()
    at.hear(first)
    portal = at.half.portal
    at.hear(second)
    assert at.half.portal is portal and at.scheduler.troubles == 0
    at.scheduler.on_new_request(request_of(list(range(100))))
    assert at.half.tracked == 1


@pytest.mark.parametrize(
    ("off", "message"), [((1,), "of the engine's 2 workers [1] have not"), ((0, 1), "no worker")]
)
def test_a_worker_that_is_off_turns_all_off_and_no_request_waits(
    off: tuple[int, ...],
    message: str,
    elsewhere: Any,
    request_of: Any,
    said: Any,
) -> None:
    at, request = elsewhere(off), request_of(list(range(100)))
    at.scheduler.on_new_request(request)
    assert at.scheduler.get_num_new_matched_tokens(request, 0) == (None, False)
    at.hear(at.begin())
    assert not at.scheduler.is_on and not at.scheduler.has_pending_push_work()
    assert at.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert f"kvlayer is off: {message}" in said.text


def test_a_step_that_no_worker_answers_turns_it_off(elsewhere: Any) -> None:
    at = elsewhere()
    at.begin()
    at.hear(None)
    assert not at.scheduler.is_on and not at.scheduler.has_pending_push_work()


def test_what_opening_raises_turns_it_off_in_an_engine_that_serves(
    elsewhere: Any, request_of: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, request = elsewhere(), request_of(list(range(100)))
    at.scheduler.on_new_request(request)

    def refuses(*_: Any, **__: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Portal, "open", refuses)
    at.hear(at.begin())
    assert not at.scheduler.is_on and not at.scheduler.has_pending_push_work()
    assert at.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert "kvlayer is off: the disk is gone" in said.text


def test_a_cache_that_was_opened_before_something_failed_is_closed(
    elsewhere: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, opened = elsewhere(), []

    def fails(portal: Portal, *_: Any, **__: Any) -> Any:
        opened.append(portal)
        raise RuntimeError("a mistake")

    monkeypatch.setattr(scheduler, "Stores", fails)
    at.hear(at.begin())
    assert not at.scheduler.is_on and "kvlayer is off: a mistake" in said.text
    with pytest.raises(ClosedError):
        opened[0].call(Cache.flush)


@pytest.mark.parametrize("who", range(RANKS))
def test_a_rank_that_cannot_join_turns_loads_and_stores_off(
    who: int, elsewhere: Any, request_of: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each request that is found would be loaded in vain."""
    at, opens = elsewhere(), RankWorker.open

    def refuses(greeting: bytes, layout: Any, number: int, **how: Any) -> Any:
        if number == who:
            raise LayoutError(f"no memory for {number}")
        return opens(greeting, layout, number, **how)

    monkeypatch.setattr(RankWorker, "open", refuses)
    at.hear(at.begin())
    while "kvlayer is off: " not in said.text:
        at.hear(at.begin())
    assert f"off: rank {who} cannot join the cache: no memory for {who}" in said.text
    assert not (at.half._may_load or at.half._may_store)
    request = request_of(list(range(100)))
    at.scheduler.on_new_request(request)
    assert at.scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert at.half.tracked == 1 and at.scheduler.troubles == 0
    at.scheduler.request_finished_all_groups(request, ([],))
    assert at.half.tracked == 0


class Made:
    """A worker's connector, on or off."""

    introduction: Introduction | None = None


def test_a_worker_of_this_process_is_found_by_its_engine() -> None:
    ours, twin, others = (Made() for _ in range(3))
    a, b, c = (SimpleNamespace(model_config=object()) for _ in range(3))
    announce(ours, a)
    announce(others, b)
    announce(twin, a)
    assert [announced(a) for _ in range(3)] == [ours, twin, None]
    assert announced(b) is others and announced(c) is None


def test_a_worker_that_is_gone_or_closed_is_not_found() -> None:
    gone, closed = (SimpleNamespace(model_config=object()) for _ in range(2))
    announce(Made(), gone)
    assert announced(gone) is None
    ended = Made()
    announce(ended, closed)
    withdraw(ended)
    withdraw(ended)
    assert announced(closed) is None


def test_of_twins_the_one_that_is_off_has_its_own_worker(
    vllm_config: Any, spec: Any, kv_cache_config: Any, changed: Any, no_cache_home: None
) -> None:
    """The first kvlayer of an engine is off in the worker: it must not take the second one's."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    groups = kv_cache_config((LAYERS, spec("FullAttentionSpec")))
    cache = {"report_prefill": False, "tiers": [{"url": "cpu://?capacity=64MiB"}]}
    config = changed(vllm_config, "kv_transfer_config", kv_connector_extra_config=cache)
    tensors = {name: torch.zeros(64, 2, BLOCK, 128) for name in LAYERS}
    ended = KVLayerConnector(config, KVConnectorRole.WORKER, groups)  # of an engine before
    ended.register_kv_caches(tensors)
    ended.shutdown()
    workers = [KVLayerConnector(config, KVConnectorRole.WORKER, groups) for _ in range(2)]
    workers[0].register_kv_caches({})
    workers[1].register_kv_caches(tensors)
    halves = [KVLayerConnector(config, KVConnectorRole.SCHEDULER, groups) for _ in range(2)]
    manager = SimpleNamespace(block_pool=SimpleNamespace(num_gpu_blocks=64))
    for half in halves:
        half.bind_kv_cache_manager(manager)
    assert [each.is_on for each in (*workers, *halves)] == [False, True, False, True]
    for each in (*halves, *workers):
        each.shutdown()
