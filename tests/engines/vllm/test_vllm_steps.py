"""Several steps under way: what a request has computed counts once its own step was heard of."""

from __future__ import annotations

from typing import Any

from kvlayer_vllm.messages import Step

PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens


def test_what_a_request_finds_counts_once_its_own_step_was_heard(
    desk: Any, request_of: Any
) -> None:
    """The step that writes what it found in vLLM's prefix cache may still be under way."""
    at = desk()
    one, two = request_of(PROMPT), request_of(PROMPT, request_id="two")
    for request in (one, two):
        at.half.arrived(request)
    at.admit(one, [1, 2, 3, 4, 5, 6, 7])
    at.admit(two, [1, 2, 3, 4, 5, 6, 8], computed=192)
    first, second = at.begin({one: 200}), at.begin({two: 8})
    assert at.half._tracked["two"].computed == 0
    at.finish(two)  # it is aborted, and stores nothing
    assert not at.held()
    at.accept(first, {one: 200})
    assert at.half._tracked["one"].computed == 200
    at.accept(second)
    at.finish(one)
    at.rest()
    assert at.found(PROMPT) == 192


def test_a_step_without_an_answer_is_heard_of_with_the_next(desk: Any, request_of: Any) -> None:
    at = desk()
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [1, 2, 3, 4, 5, 6, 7])
    at.begin({request: 200})
    request.num_in_flight_tokens = 0
    at.half.heard(None)
    assert at.half._tracked["one"].computed == 0
    at.run()
    assert at.half._tracked["one"].computed == 200


def test_a_step_that_computed_into_blocks_that_are_gone_counts_no_more(
    desk: Any, request_of: Any
) -> None:
    at = desk()
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [1, 2, 3, 4, 5, 6, 7])
    step = at.begin({request: 200})
    at.preempt(request)
    between = at.begin(preempted=[request])
    at.admit(request, [11, 12, 13, 14, 15, 16, 17], computed=192)  # found, not written yet
    again = at.begin({request: 8})
    at.accept(step, {request: 200})
    at.accept(between)
    assert at.half._tracked["one"].computed == 0
    at.accept(again, {request: 8})
    assert at.half._tracked["one"].computed == 200
    at.finish(request)
    at.rest()
    assert at.found(PROMPT) == 192


def test_after_a_step_that_could_not_be_prepared_nothing_older_counts(
    desk: Any, request_of: Any
) -> None:
    """Whom vLLM has preempted with it is not known: it may have said so in that step."""
    at = desk()
    request = request_of(PROMPT)
    at.half.arrived(request)
    at.admit(request, [1, 2, 3, 4, 5, 6, 7])
    at.run({request: 200})
    at.preempt(request)
    step = Step()
    at.half.rest_of(step)
    at.accept(step)
    at.admit(request, [11, 12, 13, 14, 15, 16, 17], computed=192)  # found, not written yet
    assert at.half._tracked["one"].computed == 0
