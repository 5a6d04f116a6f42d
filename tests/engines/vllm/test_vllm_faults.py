"""Whatever breaks under vLLM, answers stay right, no request fails and nobody waits for long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvlayer import Cache, Cause, RetrieveReport
from kvlayer.bench.sick import Sickness
from kvlayer.identity.keys import Span
from kvlayer.results import Failure
from kvlayer_vllm.bench.settled import settled
from kvlayer_vllm.moves import Load

pytestmark = pytest.mark.any_device

ANSWER = 12


@pytest.fixture
def prompt(engine: Any, prompts: Any, request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """A prompt of its own, stored, and in the lower tier alone."""
    number = sum(map(ord, request.node.name)) % 400
    start = prompts["chunked"][number % 3]
    found = [*start[number % 7 :][:150], 3 + number % 200, *start[200:290]]
    engine.serving.ask([found], ANSWER, salt=request.node.name)
    engine.leave_memory(found, request.node.name)
    yield found
    engine.tier.sickness = Sickness.HEALTHY
    while engine.portal.cache.control.stats().tiers[1].reads != "closed":
        engine.portal.call(Cache.flush)  # the tier is probed in the background, and serves again


class Asking:
    """One prompt under the test's own salt: answers, and what came of loading."""

    def __init__(self, engine: Any, prompt: list[int], salt: str) -> None:
        self.engine, self.prompt, self.salt = engine, prompt, salt

    def __call__(self) -> Any:
        self.engine.forget()
        (answer,) = self.engine.serving.ask([self.prompt], ANSWER, salt=self.salt)
        return answer

    def objects(self) -> list[Any]:
        """The tier's objects of this prompt, in its order."""
        cache = self.engine.portal.cache
        from kvlayer import Scope

        chain = cache.chain(self.prompt, Scope.private(self.salt))
        hashes = [*chain.hashes, chain.tails(len(chain))[0].hash]
        named = {key.end_hash: key for key in self.engine.tier.objects}
        return [named[each] for each in hashes if each in named]


@pytest.fixture
def asking(engine: Any, prompt: list[int], request: pytest.FixtureRequest) -> Asking:
    return Asking(engine, prompt, request.node.name)


@pytest.fixture
def truth(asking: Asking) -> tuple[int, ...]:
    """What the engine answers when it computes everything: another salt finds nothing."""
    asking.engine.forget()
    (answer,) = asking.engine.serving.ask([asking.prompt], ANSWER, salt=f"{asking.salt} cold")
    assert answer.cached == 0
    found: tuple[int, ...] = answer.tokens
    return found


def test_what_lies_below_memory_is_brought_up_first(asking: Asking, truth: Any) -> None:
    answer = asking()
    assert answer.cached == len(asking.prompt) // 32 * 32 and answer.tokens == truth


@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_a_damaged_object_ends_the_prefix_before_it(
    damage: str, asking: Asking, truth: Any
) -> None:
    objects = asking.engine.tier.objects
    second = asking.objects()[1]
    raw = bytearray(objects[second])
    if damage == "truncated":
        objects[second] = bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 4
        objects[second] = bytes(raw)
    else:
        del objects[second]  # the directory has been told that it is there
    answer = asking()
    assert answer.cached == 64 and answer.tokens == truth
    again = asking()  # what was computed anew is stored anew
    assert again.cached == len(asking.prompt) // 32 * 32 and again.tokens == truth


@pytest.mark.parametrize("sickness", [Sickness.DEAD, Sickness.SLOW, Sickness.FLAPPING])
def test_a_sick_tier_costs_a_deadline_and_then_nothing(
    sickness: Sickness, asking: Asking, truth: Any
) -> None:
    asking.engine.tier.sickness = sickness
    for _ in range(4):
        assert asking().tokens == truth
        if sickness is not Sickness.FLAPPING:  # which may pass a probe meanwhile
            # The first has waited for the deadline: the others do not ask, so they do not wait.
            assert asking.engine.portal.cache.control.stats().tiers[1].reads != "closed"
    asking.engine.tier.sickness = Sickness.HEALTHY
    assert asking().tokens == truth


def test_a_tier_that_dies_between_lookup_and_load_shortens_the_prefix(
    asking: Asking, truth: Any
) -> None:
    promote = Cache.promote

    async def dies(cache: Cache, hit: Any, **how: Any) -> Any:
        asking.engine.tier.sickness = Sickness.DEAD
        return await promote(cache, hit, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "promote", dies)
        answer = asking()
    assert answer.cached == 0 and answer.tokens == truth


# -- loads that fail although they were promised ---------------------------------------------------


def failing(keep: int) -> Any:
    """``Cache.retrieve`` that writes nonsense into every block and then says so."""

    async def retrieve(
        cache: Cache, hit: Any, kv: Any, *, first_token: int = 0, **_: Any
    ) -> RetrieveReport:
        held = [int(slot) for slot in kv.slots[0][keep - first_token :]]
        for layer in kv.caches[0]:
            layer[sorted({slot // 32 for slot in held})] = 7.5
        span = Span(keep, hit.tokens, b"")
        return RetrieveReport(keep, (Failure(span, Cause.RANK_DOWN, "cpu", "injected"),))

    return retrieve


@pytest.mark.parametrize("keep", [0, 64])
def test_a_promised_load_that_fails_is_computed_and_never_stored(
    keep: int, asking: Asking, truth: Any
) -> None:
    asking()  # in memory now
    whole = Cache.retrieve

    async def partly(cache: Cache, hit: Any, kv: Any, **how: Any) -> RetrieveReport:
        if keep:
            await whole(cache, hit, kv, **how)
        return await failing(keep)(cache, hit, kv, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "retrieve", partly)
        answer = asking()
    assert answer.tokens == truth  # vLLM's count of cached tokens is not reduced by a failure
    before = asking.engine.loaded
    again = asking()
    assert asking.engine.loaded > before and again.tokens == truth


def test_requests_that_share_the_blocks_of_a_failed_load_are_right_too(
    engine: Any, prompts: Any, expected: Any
) -> None:
    batch = prompts["shared"][:4]
    engine.forget()
    engine.ask(batch)
    engine.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "retrieve", failing(0))
        answers = engine.ask(batch)
    assert answers == [expected[tuple(each)] for each in batch]
    engine.forget()
    before = engine.loaded
    assert engine.ask(batch) == answers and engine.loaded > before


def test_without_reporting_failures_the_answer_is_wrong(engine: Any, prompts: Any) -> None:
    """The negative control: what the failing load above leaves in the blocks is attended to."""
    prompt = prompts["control"][2]
    (right,) = engine.ask([prompt])
    engine.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "retrieve", failing(0))
        patch.setattr(Load, "is_whole", True)
        patch.setattr(Load, "tokens", 10**6)
        (wrong,) = engine.ask([prompt])
    assert wrong != right
    engine.leave_memory(prompt)


def test_a_hook_that_raises_is_a_miss(
    engine: Any, prompts: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts["single"][7]
    connector = engine.serving.connector

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connector, "troubles", 1)  # one is logged, with its traceback
        for name in ("arrived", "matched", "heard", "finished"):
            patch.setattr(connector.scheduler, name, broken)
        assert engine.ask([prompt]) == [expected[tuple(prompt)]]
        assert connector.troubles > 4


@pytest.mark.parametrize(
    ("half", "hook"),
    [
        ("scheduler", "allocated"),
        ("scheduler", "step"),
        ("hands", "fill"),  # within a step, whose loads no worker was told of yet
        ("promises", "land"),  # and with the loads in it
        ("hands", "view"),  # within the allocation, once the load is promised
        ("load", "begin"),
        ("worker", "before_step"),
        ("worker", "load"),
        ("worker", "layer"),
        ("worker", "_end_loads"),
        ("worker", "invalid_blocks"),
        ("worker", "answers"),
    ],
)
def test_a_hook_that_raises_after_a_promise_is_computed(
    half: str, hook: str, asking: Asking, truth: Any
) -> None:
    """Each of them while a prompt in memory is loaded into blocks that hold nonsense."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    asking()  # in memory now
    asking.engine.forget()
    for layer in asking.engine.half._hands.tensors.caches[0]:
        layer.fill_(7.5)
    worker = get_kv_transfer_group()
    owners = {
        "scheduler": asking.engine.half,
        "hands": type(asking.engine.half._hands),
        "promises": asking.engine.half._promises,
        "load": Load,
        "worker": worker._worker,
    }
    connectors = asking.engine.serving.connector, worker
    raised: list[None] = []
    whole = getattr(owners[half], hook)

    def broken_once(*args: Any, **how: Any) -> Any:
        if raised:
            return whole(*args, **how)
        raised.append(None)
        raise RuntimeError("broken on purpose")

    with pytest.MonkeyPatch.context() as patch:
        for connector in connectors:
            patch.setattr(connector, "troubles", 1)  # one is logged, with its traceback
        patch.setattr(owners[half], hook, broken_once)
        assert asking().tokens == truth
        assert raised and sum(connector.troubles for connector in connectors) == 3
    asking.engine.forget()
    assert asking.engine.half.tracked == 0 and not asking.engine.serving.core.scheduler.requests
    before = asking.engine.loaded
    again = asking()  # nothing wrong was stored, and the prompt is found
    assert again.tokens == truth and again.cached == len(asking.prompt) // 32 * 32
    assert asking.engine.loaded - before >= again.cached


def test_an_aborted_request_leaves_nothing_behind(engine: Any, prompts: Any) -> None:
    from vllm import SamplingParams

    llm = engine.serving.engine
    for step_count in range(4):
        engine.forget()
        llm.add_request(
            "aborted",
            {"prompt_token_ids": prompts["chunked"][0]},
            SamplingParams(temperature=0, max_tokens=50, ignore_eos=True),
        )
        for _ in range(step_count):
            llm.step()
        llm.abort_request(["aborted"])
        engine.serving.rest()
        settled(engine.half)  # what is still written to the tier is pinned
        assert engine.half.tracked == 0
        assert engine.portal.cache.control.stats().tiers[0].pinned_nbytes == 0
    engine.forget()
