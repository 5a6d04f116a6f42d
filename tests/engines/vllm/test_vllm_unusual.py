"""Prompts given as embeddings and sessions are stored and loaded, each under what names it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlayer import Content, Scope
from kvlayer.identity.chain import ChunkChain
from kvlayer_vllm import scopes
from kvlayer_vllm.engine import event_extra_keys
from kvlayer_vllm.scopes import Digests, scope_of
from kvlayer_vllm.token_ids import TokenIds

ANSWER = 12
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

# -- embeddings ------------------------------------------------------------------------------------


def hashes(request: Any) -> list[bytes]:
    """What its chunks are called."""
    digests = Digests()
    while (scope := scope_of(request, digests)) is None:
        pass  # made on a thread: the scheduler asks again in its next step
    digests.close()
    tokens = list(request.all_token_ids)
    return ChunkChain(tokens, scope, tokens_per_chunk=64, tokens_per_tail=8).hashes


def test_embeddings_are_named_by_their_rows_as_far_as_they_are_alike(request_of: Any) -> None:
    def names(rows: Any, **more: Any) -> list[bytes]:
        return hashes(request_of(more.pop("tokens", None), prompt_embeds=rows, **more))

    rows = torch.randn(256, 8)
    changed = rows.clone()
    changed[130, 3] += 1e-6
    plain = ChunkChain([0] * 256, Scope(), tokens_per_chunk=64, tokens_per_tail=8).hashes
    one, two = names(rows), names(changed)
    assert names(rows.clone()) == one and names(rows[:192]) == one[:3]
    assert one[:2] == two[:2] and one[2] != two[2] and one[3] != two[3]
    assert one[0] != plain[0] and one[0] != names(rows.to(torch.bfloat16))[0]


def test_rows_that_stand_for_tokens_are_told_from_embeddings(request_of: Any) -> None:
    """Where a prompt has both, a row beside a token is not what is computed."""
    rows, tokens = torch.randn(128, 8), [0] * 128
    masks = [[True] * 128, [False] * 128, [True] * 127 + [False], None]
    found = [
        hashes(request_of(tokens, prompt_embeds=rows, prompt_is_token_ids=mask)) for mask in masks
    ]
    assert len({names[0] for names in found}) == 3  # the third begins like the first
    assert len({names[1] for names in found}) == 4


def test_embeddings_are_digested_off_the_schedulers_thread_and_once(
    request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    digest = scopes._embeddings

    def counted(rows: Any, *more: Any) -> Any:
        made.append(len(rows))
        return digest(rows, *more)

    monkeypatch.setattr(scopes, "_embeddings", counted)
    request, digests = request_of(None, prompt_embeds=torch.zeros(64, 8)), Digests()
    digests._threads.submit(lambda: None).result()
    while (scope := scope_of(request, digests)) is None:
        pass
    assert scope_of(request, digests) == scope and made == [64]
    assert [content.first_token for content in scope.contents] == [0, 32]
    digests.close()


PROMPTS = [[[1, 130], [2, 70]], [[1, 130], [3, 70]], [[4, 200]]]
"""The first 130 rows of two of them are the same."""


@pytest.fixture
def alone(tiny: Path, engine_process: Any) -> Any:
    """The engine without kvlayer."""
    return engine_process(tiny, None, **OPTIONS, enable_prompt_embeds=True)


def test_prompts_of_embeddings_are_stored_and_loaded(
    tiny: Path, alone: Any, engine_process: Any
) -> None:
    cold = [answer for answer, _ in alone("embedded", PROMPTS, ANSWER)]
    alone.close()
    assert len({tuple(answer) for answer in cold}) == 3

    engine = engine_process(tiny, CACHE, **OPTIONS, enable_prompt_embeds=True)
    cached = []
    for prompt, answer in zip([*PROMPTS, *PROMPTS], [*cold, *cold], strict=True):
        ((found, hit),) = engine("embedded", [prompt], ANSWER)
        assert found == answer
        cached.append(hit)
        engine("rest")
        engine("forget")
    assert cached == [0, 128, 0, 192, 192, 192]
    state = engine("state")
    assert (state["troubles"], state["leases"], state["tracked"]) == (0, 0, 0)
    engine.close()


def test_control_embeddings_of_one_name_are_served_for_each_other(
    desk: Any, request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = desk()
    at.answer(request_of(None, prompt_embeds=torch.zeros(200, 8)), [1, 2, 3, 4, 5, 6, 7])
    other = request_of(None, prompt_embeds=torch.ones(200, 8), request_id="two")
    at.half.arrived(other)
    assert at.asked(other)[0] == 0
    at.half.finished(other, [[]])
    named = (Content(b"x" * 32, 0),)
    monkeypatch.setattr(scopes, "_embeddings", lambda *_: named)
    at.answer(
        request_of(None, prompt_embeds=torch.zeros(200, 8), request_id="three"),
        [1, 2, 3, 4, 5, 6, 7],
    )
    other = request_of(None, prompt_embeds=torch.ones(200, 8), request_id="four")
    at.half.arrived(other)
    assert at.asked(other)[0] == 192


def test_events_have_the_keys_that_vllm_mixes_into_the_hashes_of_rows(request_of: Any) -> None:
    from vllm.v1.core import kv_cache_utils

    request = request_of(None, prompt_embeds=torch.randn(96, 8))
    found = event_extra_keys(request, 32, 1, 3)
    assert found is not None and len(found) == 2 and None not in found
    keys = [
        kv_cache_utils.generate_block_hash_extra_keys(request, at, at + 32, 0) for at in (32, 64)
    ]
    assert found == kv_cache_utils.to_event_extra_keys([each for each, _ in keys])
    assert event_extra_keys(request_of([1] * 96), 32, 1, 3) is None


# -- sessions --------------------------------------------------------------------------------------


def turns() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(300, 512) for _ in range(count)] for count in (150, 61, 90)]


def test_a_session_is_loaded_and_its_turns_are_stored(
    tiny: Path, alone: Any, engine_process: Any
) -> None:
    answers, text = alone("converse", turns(), ANSWER)
    (after, _) = alone("ask", [[*text, 7]], ANSWER)[0]
    alone.close()
    # What the end of a turn samples last is not computed, and no part of the text.
    assert text[:161] == [*turns()[0], *answers[0][:-1]] and text[161:222] == turns()[1]

    engine = engine_process(tiny, CACHE, **OPTIONS)
    assert engine("converse", turns(), ANSWER) == [answers, text]
    engine("rest")
    engine("forget")
    before = engine("state")
    assert engine("ask", [[*text, 7]], ANSWER)[0] == [after, len(text) // 32 * 32]
    engine("rest")
    engine("forget")
    assert engine("converse", turns(), ANSWER) == [answers, text]
    engine("rest")
    state = engine("state")
    # The first turn is all that a session asks for: 128 tokens, and a tail with them or not.
    loaded = (state["loaded"] - before["loaded"]) / state["token_nbytes"]
    assert loaded >= len(text) // 32 * 32 + 128
    assert (state["troubles"], state["leases"], state["tracked"]) == (0, 0, 0)
    engine.close()


def test_a_text_that_is_rewritten_is_read_anew() -> None:
    """And control: a text that only grows is not."""
    text = list(range(100))
    session, prompt = TokenIds(text, is_rewritten=True), TokenIds(text)
    assert list(session.upto(100)) == list(prompt.upto(100)) == text
    text[60:] = range(500, 560)
    assert list(session.upto(120)) == text
    assert list(prompt.upto(120)) != text
