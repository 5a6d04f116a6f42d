"""Blocks that are read for a store are nobody else's until they are read, and then vLLM's again."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hang import HANG
from vllm_desk import hanging

from kvlayer import Cache
from kvlayer.errors import ConfigError
from kvlayer_vllm import engine
from kvlayer_vllm.device_order import EngineStream
from kvlayer_vllm.moves import Save
from kvlayer_vllm.settings import Settings
from kvlayer_vllm.stats import CUT_STORES, HELD_BLOCKS
from kvlayer_vllm.stores import Stores

PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens
BLOCKS = [1, 2, 3, 4, 5, 6, 7]
MORE = [*PROMPT[:192], *range(300, 420)]


def computed(at: Any, request: Any, blocks: Any = BLOCKS) -> None:
    """The request's whole prompt is, and the store of it has begun."""
    at.half.arrived(request)
    at.admit(request, blocks)
    at.run({request: request.num_tokens - request.num_computed_tokens})


def gathered(at: Any) -> None:
    """Steps until no store reads any more."""
    while at.half.holds_blocks():
        at.run()


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("end", ["finished", "preempted", "preempted, then finished"])
def test_blocks_that_a_request_lets_go_of_stay_until_they_are_read(
    end: str,
    remote: bool,
    desk: Any,
    request_of: Any,
    go_on: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No step waits for them, and what was read is right."""
    at = desk(remote=remote)
    at.run()  # a worker elsewhere joins
    hanging(monkeypatch, go_on)
    request = request_of(PROMPT)
    computed(at, request)
    was = at.rows(BLOCKS[:6])
    if "preempted" in end:
        at.preempt(request)
        at.accept(at.begin(preempted=[request]))
    if "finished" in end:
        at.finish(request)
    at.run()
    assert at.held() == set(BLOCKS[:6])
    assert at.half.holds_blocks()  # vLLM steps on although it has nothing to compute
    go_on.set()
    gathered(at)
    assert at.held() == set() and not at.half.holds_blocks()
    for tensor in at.tensors.values():
        tensor[1:7] = 7.5  # another request computes in them
    at.half.portal.call(Cache.flush)
    other = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(other)
    assert at.admit(other, [11, 12, 13, 14, 15, 16, 17]) == 192
    while "two" not in at.run().received:
        pass
    for before, now in zip(was, at.rows([11, 12, 13, 14, 15, 16]), strict=True):
        assert torch.equal(before, now)


def test_what_has_left_a_window_is_not_held(
    desk: Any, request_of: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's null block stands in its place, which belongs to nobody."""
    at = desk(windows=True)
    hanging(monkeypatch, go_on)
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, BLOCKS)
    at.tables["one"][1] = [0, 0, 0, 14, 15, 16, 17]
    at.run({request: 200})
    at.finish(request)
    assert at.held() == {1, 2, 3, 4, 5, 6, 14, 15, 16}
    assert at.pool.null_block.ref_cnt == 0
    go_on.set()
    gathered(at)
    assert at.held() == set() and at.pool.get_num_free_blocks() == 63


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_that_is_aborted_while_it_is_loaded_and_stored_is_let_go_of_once(
    ahead: bool,
    desk: Any,
    request_of: Any,
    go_on: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Aborted between the step that tells of its load and the moment when vLLM hears it.

    What it stored before it was preempted is not over, either. That vLLM hears of the step before,
    with two steps under way, changes nothing.
    """
    at = desk(remote=True)
    at.run()  # the worker joins
    at.answer(request_of(PROMPT), BLOCKS)
    hanging(monkeypatch, go_on)
    longer = request_of(MORE, request_id="two")
    at.half.arrived(longer)
    at.admit(longer, [11, 12, 13, 14, 15, 16, 17, 18, 19, 20])
    while "two" not in at.run().received:
        pass
    at.run({longer: 120})
    held = at.held()
    at.preempt(longer)
    at.accept(at.begin(preempted=[longer]))
    assert at.admit(longer, [21, 22, 23, 24, 25, 26, 27, 28, 29, 30]) == 192
    under_way = [at.begin()]
    while "two" not in (step := under_way[-1]).received:
        if not ahead or len(under_way) > 1:
            at.accept(under_way.pop(0))
        under_way.append(at.begin())
    for before in under_way[:-1]:
        at.accept(before)
    at.finish(longer)
    at.accept(step)
    assert at.held() == held and held <= set(range(11, 21)) and held
    go_on.set()
    gathered(at)
    assert at.held() == set() and at.half.tracked == 0
    assert at.pool.get_num_free_blocks() == 63


def test_a_store_that_cannot_begin_holds_nothing(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk()
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, BLOCKS)

    def closed(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(at.half.portal, "submit", closed)
    with pytest.raises(RuntimeError, match="on purpose"):
        at.run({request: 200})
    gathered(at)
    assert at.held() == set()


# -- no more than a share --------------------------------------------------------------------------


def test_a_store_that_would_hold_too_much_is_cut_short_and_a_later_step_goes_on(
    desk: Any, request_of: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk(held_share=5 / 63)
    hanging(monkeypatch, go_on)
    request = request_of(PROMPT)
    computed(at, request)
    assert at.held() == {1, 2, 3, 4}  # two chunks of two blocks
    for _ in range(3):
        request.append_output_token_ids(11)
        at.run({request: 1})
    assert at.held() == {1, 2, 3, 4}  # a third has no room
    figures = at.half.figures()
    assert figures.data["gauges"][HELD_BLOCKS.name] == 4
    assert figures.total(CUT_STORES) == 1  # once, however often it is tried again
    go_on.set()
    gathered(at)
    request.append_output_token_ids(11)
    at.run({request: 1})
    at.finish(request)
    at.rest()
    assert at.found(PROMPT) == 192
    assert (rest := at.half.figures()) is None or rest.total(CUT_STORES) == 0


def test_a_chunk_has_room_whatever_the_share(desk: Any, request_of: Any) -> None:
    at = desk(held_share=1e-6)
    request = request_of(PROMPT)
    computed(at, request)
    for _ in range(3):
        gathered(at)
        request.append_output_token_ids(11)
        at.run({request: 1})
    at.finish(request)
    at.rest()
    assert at.found(PROMPT) == 192


def test_what_an_ended_request_had_no_room_for_is_stored_by_the_next(
    desk: Any, request_of: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk(held_share=5 / 63)
    hanging(monkeypatch, go_on)
    computed(at, request := request_of(PROMPT))
    at.finish(request)
    go_on.set()
    at.rest()
    assert at.found(PROMPT) == 128
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, [11, 12, 13, 14, 15, 16, 17]) == 128
    while "two" not in at.run().received:
        pass
    at.half.allocated(again, at.tables["two"], 0)
    at.run({again: 73})
    at.finish(again)
    at.rest()
    assert at.found(PROMPT) == 192


@pytest.mark.parametrize("share", [0, -0.5, 1.5, True, "half", None])
def test_a_share_that_is_none_is_refused_by_name(share: Any) -> None:
    with pytest.raises(ConfigError, match="held_share"):
        Settings.of({"tiers": [{"url": "cpu://?capacity=64MiB"}], "held_share": share})


# -- vLLM's own accounts ---------------------------------------------------------------------------


def test_vllm_waits_for_blocks_that_nobody_but_a_store_has(
    desk: Any, request_of: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would preempt a request instead. Where requests have them, too, that is right."""
    at = desk()
    hanging(monkeypatch, go_on)
    request = request_of(PROMPT)
    own = [at.pool.blocks[number] for number in BLOCKS]
    at.pool.touch(own)  # as the request has them
    computed(at, request)
    assert not at.half.will_free()
    at.finish(request)
    at.pool.free_blocks(own)
    assert at.half.will_free()
    go_on.set()
    for save in at.half._held._held:
        save.wait()
    assert at.half.will_free()  # some came back this moment
    assert not at.half.will_free() and at.held() == set()


def test_before_vllm_counts_blocks_for_a_reset_all_are_read_and_let_go_of(
    desk: Any, request_of: Any, go_on: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk()
    hanging(monkeypatch, go_on)
    manager = SimpleNamespace(reset_prefix_cache=at.pool.reset_prefix_cache)
    computed(at, request := request_of(PROMPT))
    at.finish(request)
    assert not manager.reset_prefix_cache()  # as vLLM is
    wait = Save.wait

    def begins_to_wait(save: Save) -> None:
        go_on.set()
        wait(save)

    monkeypatch.setattr(Save, "wait", begins_to_wait)
    engine.before_reset(manager, at.half.before_reset)
    assert manager.reset_prefix_cache() and at.held() == set()
    at.rest()
    assert at.found(PROMPT) == 192


def test_what_workers_elsewhere_read_is_let_go_of_with_the_steps_under_way(
    desk: Any, request_of: Any
) -> None:
    """The scheduler cannot wait for them: vLLM's reset fails, and succeeds after the step."""
    at = desk(remote=True)
    at.run()  # the worker joins
    computed(at, request := request_of(PROMPT))
    at.finish(request)
    ranks = at.half._hands._ranks
    with ranks._changed:
        assert ranks._changed.wait_for(lambda: ranks._outbox, HANG)
    step = at.begin()
    at.half.before_reset()
    assert not at.pool.reset_prefix_cache()
    at.accept(step)
    gathered(at)
    assert at.pool.reset_prefix_cache()


@pytest.mark.parametrize("remote", [False, True])
def test_a_reset_of_the_cache_gives_up_what_is_not_read_yet(
    remote: bool,
    desk: Any,
    request_of: Any,
    go_on: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = desk(remote=remote)
    hanging(monkeypatch, go_on)
    computed(at, request := request_of(PROMPT))
    at.finish(request)
    assert at.held()
    assert at.half.reset()
    assert at.held() == set()
    go_on.set()
    at.rest()
    assert at.found(PROMPT) == 0


def test_where_the_device_refuses_an_event_nothing_is_held(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_: EngineStream) -> Any:
        raise RuntimeError("no event is left")

    at = desk()
    monkeypatch.setattr(EngineStream, "queued", refuses)
    at.half.arrived(request := request_of(PROMPT))
    at.admit(request, BLOCKS)
    with pytest.raises(RuntimeError, match="no event"):
        at.run({request: 200})
    assert at.held() == set() and not at.half.holds_blocks()


def test_a_request_that_cannot_be_stored_costs_no_other_one(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, new = desk(), Stores.new

    def fails(stores: Stores, tracked: Any, table: Any) -> None:
        if tracked.request.request_id == "one":
            raise RuntimeError("it has no name")
        new(stores, tracked, table)

    monkeypatch.setattr(Stores, "new", fails)
    other = [n + 1 for n in PROMPT]
    requests = [request_of(PROMPT), request_of(other, request_id="two")]
    for first, request in zip((1, 11), requests, strict=True):
        at.half.arrived(request)
        at.admit(request, range(first, first + 7))
    with pytest.raises(RuntimeError, match="no name"):  # which vLLM's hook logs
        at.run(dict.fromkeys(requests, 200))
    for request in requests:
        at.finish(request)
    at.rest()
    assert (at.found(PROMPT), at.found(other)) == (0, 192)
