"""Finding a request's prefix: the scheduler's thread is never held, and nobody loses a turn."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvlayer import Cache, Scope
from kvlayer_vllm import search as search_module
from kvlayer_vllm.search import Search
from kvlayer_vllm.token_ids import TokenIds

PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens


def test_a_request_whose_adapter_cannot_be_named_in_time_is_computed(desk: Any) -> None:
    at, now = desk(), [0.0]
    search = Search(
        at.half.portal,
        TokenIds(PROMPT),
        lambda: pytest.fail("looked up without a name"),
        lambda: None,
        clock=lambda: now[0],
        lease_seconds=30.0,
    )
    assert search.poll() is None
    now[0] = 4.0
    assert search.poll() is None
    now[0] = 6.0
    assert search.poll() == 0


def test_what_a_long_prompt_costs_is_paid_off_the_schedulers_thread(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted and named on the loop; the scheduler converts what is answered."""
    prompt = [n % 509 for n in range(32_000)]
    blocks = range(1, 1002)
    at = desk(blocks=1002, tiers=[{"url": "cpu://?capacity=256MiB"}], held_share=1.0)
    converted: list[tuple[bool, int]] = []
    upto = TokenIds.upto

    def noted(ids: TokenIds, stop: int) -> Any:
        before = len(ids._known)
        found = upto(ids, stop)
        here = threading.current_thread() is threading.main_thread()
        converted.append((here, len(ids._known) - before))
        return found

    monkeypatch.setattr(TokenIds, "upto", noted)
    at.answer(request_of(prompt), blocks)
    again = request_of([*prompt[:-1], 7], request_id="two")
    at.half.arrived(again)
    assert at.admit(again, blocks) == 31_936
    assert sum(count for here, count in converted if not here) == 64_000
    assert sum(count for here, count in converted if here) == 0
    assert max(count for _, count in converted) <= 4096


def searching(at: Any, prompt: list[int], now: list[float]) -> Search:
    return Search(
        at.half.portal,
        TokenIds(prompt),
        lambda: len(prompt),
        Scope,
        clock=lambda: now[0],
        lease_seconds=30.0,
    )


@pytest.mark.parametrize("every", [1.0, 16.0, 40.0])
@pytest.mark.parametrize("long", [False, True])
def test_a_request_that_waits_for_blocks_never_has_to_ask_again(
    every: float,
    long: bool,
    below: Any,
    desk: Any,
    request_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However seldom it is asked for: who has to ask again loses its turn."""
    if long:
        monkeypatch.setattr(search_module, "_LONG", 0)
    at, now = desk(tiers=below), [0.0]
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    planner = at.half.portal.cache.stack.planner
    monkeypatch.setattr(planner, "_clock", lambda: now[0])
    prompt = [*PROMPT, 7]  # the tier is asked for its end
    search = searching(at, prompt, now)
    while search.poll() is None:
        pass  # a scheduler would go on with its step
    for _ in range(8):
        now[0] += every
        assert search.poll() == 192
        (lease,) = planner.leases._leases.values()
        assert lease.deadline >= now[0] + 15.0 - every * (every < 15.0)
    search.release()
    assert not planner.leases._leases


def test_what_is_gone_from_memory_again_is_not_waited_for_twice(
    below: Any, desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, now = desk(tiers=below), [0.0]
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    cache = at.half.portal.cache
    monkeypatch.setattr(cache.stack.planner, "_clock", lambda: now[0])
    search = searching(at, PROMPT, now)

    async def leave_memory(cache: Cache) -> None:
        await cache.control.clear("cpu")

    at.half.portal.call(leave_memory)
    while search.poll() is None:
        pass
    assert search.poll() == 192
    now[0] = 16.0
    assert search.poll() == 192  # in memory now
    now[0] = 50.0
    at.half.portal.lookup([1]).release()  # its lease has run out
    at.half.portal.call(leave_memory)
    assert search.poll() == 0
    search.release()
    assert at.found(PROMPT) == 192
