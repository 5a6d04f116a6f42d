"""The order of hooks decides: what is loaded, stored and let go of, without an engine around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm_desk import LAYERS

from kvlayer import Cache, RetrieveReport
from kvlayer.api.rank_worker import RankWorker

PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens
MORE = [*PROMPT[:192], *range(300, 420)]


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Cache.retrieve`` that loads nothing."""

    async def nothing(cache: Cache, hit: Any, kv: Any, *, first_token: int, **_: Any) -> Any:
        return RetrieveReport(first_token)

    monkeypatch.setattr(Cache, "retrieve", nothing)


@pytest.mark.parametrize("how", [{"loads": "sync"}, {}, {"remote": True}, {"windows": True}])
def test_what_one_request_computed_another_loads(how: Any, desk: Any, request_of: Any) -> None:
    at = desk(**how)
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    was = at.rows([1, 2, 3, 4, 5, 6])
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, [11, 12, 13, 14, 15, 16, 17]) == 192
    steps = [at.run()]
    while at.half._promises.is_async and "two" not in steps[-1].received:
        steps.append(at.run())
    for name, before, now in zip(at.tensors, was, at.rows([11, 12, 13, 14, 15, 16]), strict=True):
        last = 2 if how.get("windows") and name == LAYERS[1] else 6  # what a window needs
        assert torch.equal(before[-last:], now[-last:]), name


# -- a load that fails -----------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [False, True])
def test_a_request_whose_load_failed_is_computed_and_does_not_ask_again(
    windows: bool, desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM asks anew for a request of which nothing was loaded: it would never be computed."""
    at = desk(loads="async", windows=windows)
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    failing(monkeypatch)
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, [11, 12, 13, 14, 15, 16, 17]) == 192
    while "two" not in (step := at.run()).received:
        pass
    assert step.failed == {"two"} if windows else step.invalid == {11, 12, 13, 14, 15, 16}
    again.num_computed_tokens = 0  # as vLLM counts from here on
    assert at.asked(again) == (0, False)


def test_a_request_that_ends_in_the_step_after_its_load_is_stored(
    desk: Any, request_of: Any
) -> None:
    """With one token to answer it is over before vLLM tells of the step."""
    at = desk(loads="async")
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    longer = request_of(MORE, request_id="two")
    at.half.arrived(longer)
    assert at.admit(longer, [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]) == 192
    while "two" not in at.run().received:
        pass
    assert at.asked(longer, 192)[0] == 0
    at.half.allocated(longer, at.tables["two"], 0)
    step = at.begin({longer: 120})
    longer.num_in_flight_tokens = 0
    at.finish(longer)
    at.accept(step)
    at.rest()
    assert at.found(MORE) == 288


def test_a_worker_that_cannot_join_tries_once_and_its_orders_are_given_up(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, tried = desk(remote=True), []

    def cannot(*_: Any, **__: Any) -> Any:
        tried.append(None)
        raise OSError("no such process")

    monkeypatch.setattr(RankWorker, "open", cannot)
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [1, 2, 3, 4, 5, 6, 7])
    at.run({request: 200})
    at.finish(request)
    at.rest()  # nothing is owed
    assert len(tried) == 1 and at.found(PROMPT) == 0


# -- counting --------------------------------------------------------------------------------------


def test_an_answer_that_stops_within_accepted_drafts_is_stored(desk: Any, request_of: Any) -> None:
    """vLLM counts the drafts beyond its end as computed, and has no tokens for them."""
    at = desk()
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [1, 2, 3, 4, 5, 6, 7, 8])
    at.run({request: 200})
    request.append_output_token_ids(list(range(400, 430)))
    step = at.begin({request: 56})
    request.num_in_flight_tokens = 0
    at.finish(request)
    at.accept(step)
    at.rest()
    assert at.found([*PROMPT, *range(400, 430)]) == 224


def test_the_load_begins_where_vllm_ends_whatever_it_takes_of_what_was_found(
    desk: Any, request_of: Any
) -> None:
    at = desk()
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    was = at.rows([3, 4])
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    assert at.asked(again, 64) == (128, True)
    at.tables["two"] = [[11, 12, 13, 14, 15, 16, 17]]
    before = at.rows([11, 12, 15, 16])
    at.half.allocated(again, at.tables["two"], 64)  # half of it
    while "two" not in at.run().received:
        pass
    for wanted, now in zip(was, at.rows([13, 14]), strict=True):
        assert torch.equal(wanted, now)
    for untouched, now in zip(before, at.rows([11, 12, 15, 16]), strict=True):
        assert torch.equal(untouched, now)


def test_a_request_that_wants_all_its_logits_is_given_nothing(desk: Any, request_of: Any) -> None:
    at = desk()
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    again = request_of([*PROMPT, 7], request_id="two")
    again.skip_reading_prefix_cache = True
    at.half.arrived(again)
    assert at.asked(again) == (0, False)


def test_a_load_lets_go_of_its_lease_where_it_was_copied(desk: Any, request_of: Any) -> None:
    """Not in the scheduler's thread, which hears of it later."""
    at = desk(loads="sync")
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, [11, 12, 13, 14, 15, 16, 17]) == 192
    leases = at.half.portal.cache.stack.planner.leases
    assert len(leases) == 1
    step = at.begin()  # waits for the load
    assert at.half._tracked["two"].load is not None and len(leases) == 0
    at.accept(step)


# -- reset -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("remote", [False, True])
def test_after_a_reset_nothing_is_found_whatever_was_under_way(
    remote: bool, below: Any, desk: Any, request_of: Any
) -> None:
    at = desk(tiers=below, remote=remote)
    for number in range(8):
        request = request_of([n + 10 * number for n in PROMPT], request_id=str(number))
        at.half.arrived(request)
        at.admit(request, [1, 2, 3, 4, 5, 6, 7])
        at.run({request: 200})
        at.finish(request)
    assert at.half.reset()
    at.rest()
    at.half.portal.call(Cache.flush)
    assert [at.found([n + 10 * number for n in PROMPT]) for number in range(8)] == [0] * 8
    stats = at.half.portal.cache.control.stats()
    assert [tier.objects for tier in stats.tiers] == [0, 0] and stats.leases == 0


def test_a_request_that_a_reset_interrupts_is_not_stored(desk: Any, request_of: Any) -> None:
    """The model's weights may be others from here on."""
    at = desk()
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [1, 2, 3, 4, 5, 6, 7])
    at.run({request: 128})
    assert at.half.reset()
    at.run({request: 72})
    at.finish(request)
    at.rest()
    assert at.found(PROMPT) == 0


def test_a_request_that_waits_during_a_reset_finds_nothing_old_and_is_stored(
    desk: Any, request_of: Any
) -> None:
    at = desk()
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    waiting = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(waiting)
    assert at.asked(waiting) == (192, True)  # and no blocks for it yet
    assert at.half.reset()
    assert at.admit(waiting, [11, 12, 13, 14, 15, 16, 17]) == 0
    at.run({waiting: 201})
    at.finish(waiting)
    at.rest()
    assert at.found(PROMPT) == 192


def test_a_reset_says_that_a_load_still_holds_something(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk(loads="async")
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    again = request_of([*PROMPT, 7], request_id="two")
    at.half.arrived(again)
    at.admit(again, [11, 12, 13, 14, 15, 16, 17])
    assert not at.half.reset()
    while "two" not in at.run().received:
        pass
    assert at.half.reset() and at.found(PROMPT) == 0
