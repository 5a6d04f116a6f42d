"""vLLM answers the same with kvlayer, token for token, and has really loaded KV.

A small random model, in this process: looked into at every step. A trained one in every mode is in
``test_vllm_trained.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvlayer_vllm.bench.settled import settled

pytestmark = pytest.mark.any_device

CHUNK, BLOCK = 64, 32


def right(prompts: list[list[int]], answers: list[tuple[int, ...]], expected: Any) -> list[bool]:
    return [
        answer == expected[tuple(prompt)] for prompt, answer in zip(prompts, answers, strict=True)
    ]


def usable(prompt: list[int]) -> int:
    """Tokens of a prompt that is stored, tail included; the last one is always computed."""
    return min(len(prompt) // BLOCK * BLOCK, len(prompt) - 1)


def test_single_prompts(engine: Any, prompts: Any, expected: Any) -> None:
    for prompt in prompts["single"]:
        engine.forget()
        assert engine.ask([prompt]) == [expected[tuple(prompt)]]
        engine.forget()
        before = engine.loaded
        (answer,) = engine.serving.ask([prompt], 12)
        assert answer.tokens == expected[tuple(prompt)]
        assert answer.cached == usable(prompt)
        assert engine.loaded - before >= answer.cached


def test_batches_that_share_a_prefix(engine: Any, prompts: Any, expected: Any) -> None:
    for at in range(0, 12, 4):
        batch = prompts["shared"][at : at + 4]
        engine.forget()
        assert all(right(batch, engine.ask(batch), expected))
        engine.forget()
        before = engine.loaded
        assert all(right(batch, engine.ask(batch), expected))
        assert engine.loaded - before >= 160 // CHUNK * CHUNK


def test_prompts_that_are_computed_in_steps(engine: Any, prompts: Any, expected: Any) -> None:
    """A step computes 256 tokens at most: what is stored comes from several."""
    for prompt in prompts["chunked"]:
        engine.forget()
        assert engine.ask([prompt]) == [expected[tuple(prompt)]]
        engine.forget()
        (answer,) = engine.serving.ask([prompt], 12)
        assert answer.tokens == expected[tuple(prompt)] and answer.cached == usable(prompt)


def test_a_whole_prompt_that_is_stored_computes_its_last_token(
    engine: Any, prompts: Any, expected: Any
) -> None:
    prompt = prompts["chunked"][2]
    assert len(prompt) % CHUNK == 0
    engine.ask([prompt])
    engine.forget()
    (answer,) = engine.serving.ask([prompt], 12)
    assert answer.cached == len(prompt) - 1 and answer.tokens == expected[tuple(prompt)]


def test_prompts_that_were_preempted(engine: Any, prompts: Any, expected: Any) -> None:
    """Four prompts do not fit: the engine takes blocks away from some and computes them again."""
    batch = prompts["preempted"]
    scheduler = engine.serving.core.scheduler
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def noted(request: Any, *args: Any, **how: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "_preempt_request", noted)
        engine.forget()
        long = engine.serving.ask(batch, 24)
        assert preempted
    assert [answer.tokens[:12] for answer in long] == [expected[tuple(each)] for each in batch]
    engine.forget()
    before = engine.loaded
    assert all(right(batch, engine.ask(batch), expected))
    assert engine.loaded - before >= sum(map(usable, batch))


def test_a_conversation_finds_its_own_answers(engine: Any, prompts: Any) -> None:
    """Answers are stored, too: a prompt that goes on where an answer ended need not compute it."""
    prompt = prompts["single"][3]
    (first,) = engine.serving.ask([prompt], 120)
    engine.forget()
    (second,) = engine.serving.ask([[*prompt, *first.tokens, 5, 6, 7]], 4)
    assert second.cached >= (len(prompt) + 119) // BLOCK * BLOCK


def test_altered_kv_changes_the_answer(engine: Any, prompts: Any, expected: Any) -> None:
    """The negative control of everything above: what is loaded is what is attended to."""
    changed = 0
    for prompt in prompts["control"]:
        engine.forget()
        engine.ask([prompt])
        engine.forget()
        settled(engine.half)  # or the tier would get what is altered here
        planner, objects = engine.portal.cache.stack.planner, engine.portal.cache.stack.objects
        from kvlayer import Scope

        for record in planner.match(engine.portal.cache.chain(prompt, Scope())).path():
            slot = objects.slab.view(record.offset, record.nbytes)
            slot[:] = bytes(slot.nbytes)
        (answer,) = engine.serving.ask([prompt], 12)
        assert answer.cached == usable(prompt)
        changed += answer.tokens != expected[tuple(prompt)]
        engine.leave_memory(prompt)  # the tier has it as it was
    assert changed == len(prompts["control"])


def test_another_salt_never_hits(engine: Any, prompts: Any, expected: Any) -> None:
    prompt = prompts["single"][5]
    engine.ask([prompt])
    for salt in ("alice", "bob"):
        engine.forget()
        cold, warm = (engine.serving.ask([prompt], 12, salt=salt)[0] for _ in range(2))
        engine.forget()
        (loaded,) = engine.serving.ask([prompt], 12, salt=salt)
        assert cold.cached == 0 and loaded.cached == usable(prompt)
        assert {each.tokens for each in (cold, warm, loaded)} == {expected[tuple(prompt)]}


def test_nothing_is_held_when_nothing_runs(engine: Any) -> None:
    """No block, lease, pin or request outlives the requests, and no hook has failed."""
    engine.forget()
    settled(engine.half)  # what is still written to the tier is pinned
    scheduler = engine.serving.core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert engine.half.tracked == 0 and not scheduler.requests
    stats = engine.portal.cache.control.stats()
    assert (stats.leases, stats.tiers[0].pinned_nbytes) == (0, 0)
    assert engine.serving.connector.troubles == 0
