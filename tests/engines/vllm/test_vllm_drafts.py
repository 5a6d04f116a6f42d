"""Speculative decoding: drafts that are not accepted leave nothing behind, models that draft are
refused by name.

Drafts by n-grams come from the text itself. vLLM checks them in one step, keeps those that it would
have sampled, and computes over the rest.
"""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_drafts import NGRAM

from kvlayer.errors import UnsupportedError
from kvlayer_vllm.groups import refuse_parallel
from kvlayer_vllm.tracked import Tracked

ANSWER = 42
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 60,
    "max_model_len": 1024,
    "enable_prefix_caching": True,
}
CACHE = {
    "tokens_per_chunk": 64,
    "tokens_per_tail": 32,
    "held_share": 1.0,  # few blocks, and what is stored is counted
    "tiers": [{"url": "cpu://?capacity=256MiB"}],
}


def prompts() -> list[list[int]]:
    """Of few words each, so that much of it is drafted."""
    rng = random.Random(1)
    return [[rng.randrange(300, 340) for _ in range(118 + 9 * n)] for n in range(6)]


def test_answers_with_drafts_are_stored_and_loaded_like_others(
    tiny: Path, engine_process: Any
) -> None:
    """Turns of a conversation: what an answer's drafts computed is loaded for the next one."""
    alone = engine_process(tiny, None, **OPTIONS)
    first = [alone("ask", [prompt], ANSWER)[0][0] for prompt in prompts()]
    turns = [[*prompt, *answer, 7, 8, 9] for prompt, answer in zip(prompts(), first, strict=True)]
    second = [alone("ask", [turn], ANSWER)[0][0] for turn in turns]
    alone.close()

    drafting = engine_process(tiny, CACHE, **OPTIONS, speculative_config=NGRAM)
    assert drafting("state")["on"]
    found = drafting("ask", prompts(), ANSWER)  # at once, in one batch
    assert [answer for answer, _ in found] == first
    drafting("rest")
    drafting("forget")
    for prompt, turn, answer in zip(prompts(), turns, second, strict=True):
        (found,) = drafting("ask", [turn], ANSWER)
        assert found[0] == answer
        assert found[1] >= len(prompt) + ANSWER - 32  # the answer's KV, too
        drafting("rest")
        drafting("forget")
    drafted, accepted = drafting("fates")
    assert 0 < accepted < drafted
    assert drafting("state")["troubles"] == 0

    drafting("alter", turns)  # control: what was loaded is what they attend to
    altered = [drafting("ask", [turn], ANSWER)[0] for turn in turns]
    assert all(cached > 0 for _, cached in altered)
    assert [tokens for tokens, _ in altered] != second
    drafting.close()


# -- the rows of drafts ----------------------------------------------------------------------------


def draft_rejected(at: Any, request_of: Any) -> int:
    """Tokens that are stored of a request whose last three drafts were not accepted.

    It has 224 tokens, seven blocks; the last one was sampled and is not computed. In its row lies
    what the first draft left there.
    """
    tokens = list(range(3, 203))
    request = request_of(tokens)
    at.half.arrived(request)
    at.admit(request, [1, 2, 3, 4, 5, 6, 7, 8])
    at.run({request: 200})
    request.append_output_token_ids(list(range(400, 423)))
    at.run({request: 22})
    step = at.begin({request: 4})  # the last one that was sampled, and three drafts
    request.append_output_token_ids([423])
    request.num_computed_tokens -= 3
    at.accept(step, {request: 4})
    at.finish(request)
    at.rest()
    return int(at.found([*tokens, *range(400, 424), 9]))


def test_the_row_of_a_draft_is_not_stored_as_that_of_a_token(desk: Any, request_of: Any) -> None:
    assert draft_rejected(desk(), request_of) == 192


def test_control_all_that_a_step_has_written_is_taken_for_computed(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = property(lambda tracked: min(tracked.written, tracked.request.num_tokens))
    monkeypatch.setattr(Tracked, "computed", written)
    assert draft_rejected(desk(), request_of) == 224


# -- who drafts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["draft_model", "eagle3", "mtp", "medusa", "suffix"])
def test_who_drafts_otherwise_is_refused_by_name(method: str, vllm_config: Any) -> None:
    config = SimpleNamespace(
        parallel_config=vllm_config.parallel_config,
        speculative_config=SimpleNamespace(method=method),
    )
    with pytest.raises(UnsupportedError, match=f"speculative decoding by '{method}'"):
        refuse_parallel(config)
    config.speculative_config.method = "ngram"
    refuse_parallel(config)
