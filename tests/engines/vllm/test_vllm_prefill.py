"""How fast the engine computes prompts, and what a tier that is slower costs: in a clock's time.

Time passes when a test says so, for the engine's steps and on the cache's loop alike.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvlayer import Cache, Portal
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import ConfigError
from kvlayer.testing.faults import Injected, Slow, given
from kvlayer.testing.memory import MemoryBackend
from kvlayer_vllm.settings import Settings

RATE = 1000.0  # tokens a second
COUNT = 200  # three chunks of 64 and 8 tokens: a fifth of a second
BLOCKS = [1, 2, 3, 4, 5, 6, 7]
TURNS = 50  # of the cache's loop, after each moment: what can happen by then has


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self._runs_since: float | None = None

    def __call__(self) -> float:
        ran = 0.0 if self._runs_since is None else time.monotonic() - self._runs_since
        return self.now + ran

    def runs(self) -> None:
        """By itself from now on: what closes may wait."""
        self._runs_since = time.monotonic()

    def passes(self, seconds: float, at: Any) -> None:
        """The cache's loop sees it, and does what is due."""
        self.now += seconds
        at.half.portal.call(_turns)


async def _turns(_: Cache) -> None:
    for _turn in range(TURNS):
        await asyncio.sleep(0)


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hand]:
    """The time of this process's loops."""
    moved = Hand()
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda _: moved())
    yield moved
    moved.runs()


def prompt(number: int) -> list[int]:
    rng = random.Random(number)
    return [rng.randrange(3, 500) for _ in range(COUNT)]


def rate_of(at: Any) -> float | None:
    """As the cache has heard it by now."""

    async def read(cache: Cache) -> float | None:
        return cache.control.stats().prefill_tokens_per_second

    found: float | None = at.half.portal.call(read)
    return found


def admitted(at: Any, request: Any, blocks: list[int] = BLOCKS, computed: int = 0) -> Any:
    at.half.arrived(request)
    at.admit(request, blocks, computed)
    return request


# -- what steps tell -------------------------------------------------------------------------------


def test_a_step_over_a_prompt_tells_how_fast_prompts_are_computed(
    desk: Any, request_of: Any, hand: Hand
) -> None:
    at = desk(report_prefill=True, clock=hand)
    one = admitted(at, request_of(prompt(1)))
    hand.passes(5.0, at)  # nothing was asked of the engine
    step = at.begin({one: COUNT})
    hand.passes(COUNT / RATE, at)
    at.accept(step, {one: COUNT})
    assert rate_of(at) == pytest.approx(RATE)


def test_of_steps_under_way_each_has_the_time_it_was_computed_in(
    desk: Any, request_of: Any, hand: Hand
) -> None:
    """The second is scheduled while the first computes: 0.4 s in all, and not 0.2 and 0.3."""
    at = desk(report_prefill=True, clock=hand)
    one = admitted(at, request_of(prompt(1)))
    two = admitted(at, request_of(prompt(2), request_id="two"), [11, 12, 13, 14, 15, 16, 17])
    first = at.begin({one: COUNT})
    hand.passes(0.1, at)
    second = at.begin({two: COUNT})
    hand.passes(0.1, at)
    at.accept(first, {one: COUNT})
    hand.passes(0.2, at)
    at.accept(second, {two: COUNT})
    assert rate_of(at) == pytest.approx(RATE)


def test_steps_that_are_heard_of_together_count_as_one(
    desk: Any, request_of: Any, hand: Hand
) -> None:
    at = desk(report_prefill=True, clock=hand)
    one = admitted(at, request_of(prompt(1)))
    at.begin({one: 100})
    hand.passes(0.1, at)
    last = at.begin({one: 100})
    hand.passes(0.1, at)
    one.num_in_flight_tokens -= 100  # the first one's answer was lost
    at.accept(last, {one: 100})
    assert rate_of(at) == pytest.approx(RATE)


@pytest.mark.parametrize("kind", ["answers", "the end of a hit", "many answers beside"])
def test_steps_that_tell_little_of_prompts_are_left_out(
    kind: str, desk: Any, request_of: Any, hand: Hand
) -> None:
    at = desk(report_prefill=True, clock=hand)
    one = admitted(at, request_of(prompt(1)), computed=0 if kind == "many answers beside" else 160)
    others = {
        admitted(at, request_of(prompt(9)[:32], request_id=f"other-{n}"), [n], 31): 1
        for n in range(20, 43)
    }
    scheduled: dict[Any, int] = {one: 40}
    if kind == "answers":
        scheduled = others
    if kind == "many answers beside":
        scheduled = {one: COUNT} | others
    step = at.begin(scheduled)
    hand.passes(0.5, at)
    at.accept(step, scheduled)
    assert rate_of(at) is None


def test_an_engine_may_keep_it_to_itself(desk: Any, request_of: Any, hand: Hand) -> None:
    at = desk(report_prefill=False, clock=hand)
    one = admitted(at, request_of(prompt(1)))
    step = at.begin({one: COUNT})
    hand.passes(COUNT / RATE, at)
    at.accept(step, {one: COUNT})
    assert rate_of(at) is None
    with pytest.raises(ConfigError, match="report_prefill must be true or false, found 'no'"):
        Settings.of({"tiers": [{"url": "cpu://?capacity=64MiB"}], "report_prefill": "no"})


# -- what a slow tier costs ------------------------------------------------------------------------


class Ward:
    """A desk above host memory and a tier that answers as late as it is told to."""

    def __init__(self, at: Any, tier: Slow, hand: Hand) -> None:
        self.at = at
        self.tier = tier
        self.hand = hand
        self.loaded = 0

    def answer(self, request: Any) -> float:
        """One request, alone; the seconds that passed until it was computed."""
        at, hand, began = self.at, self.hand, self.hand.now
        at.half.arrived(request)
        while (found := at.half.matched(request, 0))[0] is None:
            hand.passes(0.002, at)
        more = at.admit(request, BLOCKS)
        assert more == found[0]
        while at.half._tracked[request.request_id].load is not None:
            at.run()
        left = request.num_tokens - more
        step = at.begin({request: left})
        hand.passes(left / RATE, at)
        at.accept(step, {request: left})
        took = hand.now - began
        at.finish(request)
        at.rest()
        self.loaded += more
        return took

    def leave_memory(self) -> None:
        async def clear(cache: Cache) -> None:
            await cache.control.clear("cpu")

        self.at.half.portal.call(clear)

    @property
    def reads(self) -> int:
        return sum(each.call == "get" for each in self.tier.log)


REQUESTS = 40


@pytest.fixture
def ward(desk: Any, hand: Hand, request_of: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``ward(seconds, **how)``: the tier takes so long, and alone has 40 prompts."""

    def make(seconds: float, **how: Any) -> Ward:
        log: list[Injected] = []
        tier = Slow(MemoryBackend(), random.Random(1), log, seconds=(seconds, seconds))
        tier.is_ill = False
        opened = Portal.open
        backends = BACKENDS.extended({"slow": given(tier, "slow")})
        monkeypatch.setattr(
            Portal, "open", lambda *args, **how: opened(*args, backends=backends, **how)
        )
        tiers = [
            {"url": "cpu://?capacity=64MiB"},
            {"url": "slow://", "write": "through", "deadline_seconds": 30.0},
        ]
        found = Ward(desk(tiers=tiers, clock=hand, **how), tier, hand)
        for number in range(REQUESTS):
            assert found.answer(request_of(prompt(number))) == pytest.approx(COUNT / RATE)
        found.leave_memory()
        tier.is_ill = True
        return found

    return make


def seconds_lost(ward: Ward, request_of: Any) -> tuple[float, list[int]]:
    """Of all prompts asked again: the share of computing them that was lost, and the reads."""
    took, reads = 0.0, []
    for number in range(REQUESTS):
        before = ward.reads
        took += ward.answer(request_of(prompt(number)))
        reads.append(ward.reads - before)
    return took / (REQUESTS * COUNT / RATE) - 1, reads


def test_a_tier_that_is_slower_than_computing_costs_one_trial(ward: Any, request_of: Any) -> None:
    slow = ward(1.0, report_prefill=True)
    lost, reads = seconds_lost(slow, request_of)
    assert reads[0] > 0 and not any(reads[1:]) and slow.loaded == 0
    assert 0.0 < lost <= 0.05


def test_control_an_engine_that_does_not_say_how_fast_it_is_waits_each_time(
    ward: Any, request_of: Any
) -> None:
    slow = ward(1.0, report_prefill=False)
    lost, reads = seconds_lost(slow, request_of)
    assert all(reads) and slow.loaded == REQUESTS * 192
    assert lost > 3.0


def test_a_tier_that_is_faster_than_computing_is_read_each_time(ward: Any, request_of: Any) -> None:
    fast = ward(0.02, report_prefill=True)
    lost, reads = seconds_lost(fast, request_of)
    assert all(reads) and fast.loaded == REQUESTS * 192
    assert lost < -0.5
