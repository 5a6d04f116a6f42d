"""Requests that are not a list of tokens: embeddings, and sessions whose prompt goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvlayer_vllm.bench.serving import Serving

__all__ = ["converse", "embedded"]


def embedded(serving: Serving, prompts: Sequence[Sequence[Sequence[int]]], tokens: int) -> Any:
    """Greedy answers to prompts of embeddings, one after the other: token ids and cached rows.

    A prompt is pieces ``[seed, rows]``: those of one seed begin alike.
    """
    import torch

    width = serving.engine.vllm_config.model_config.get_hidden_size()

    def rows(seed: int, count: int) -> Any:
        return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) / 20

    found: list[Any] = []
    for pieces in prompts:
        (answer,) = serving.ask(
            [{"prompt_embeds": torch.cat([rows(*one) for one in pieces])}], tokens
        )
        found.append([list(answer.tokens), answer.cached])
    return found


def converse(serving: Serving, turns: Sequence[Sequence[int]], tokens: int) -> Any:
    """A session: each turn's input goes on where the answer to the last one ended.

    The answers, and the text that was computed.
    """
    core = serving.core
    answers: list[list[int]] = []
    for turn in turns:
        core.add_request(_input(core, turn, tokens))
        answer: list[int] = []
        while len(answer) < tokens:
            outputs, _ = core.step_fn()
            for each in outputs.values():
                answer += [token for output in each.outputs for token in output.new_token_ids]
        answers.append(answer)
    text = list(core.scheduler.requests[_NAME].all_token_ids)
    core.add_request(_input(core, [0], tokens, goes_on=False))
    return answers, text


_NAME = "session"


def _input(core: Any, tokens: Sequence[int], most: int, *, goes_on: bool = True) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    return Request(
        request_id=_NAME,
        prompt_token_ids=list(tokens),
        sampling_params=SamplingParams(temperature=0, max_tokens=most, ignore_eos=True),
        pooling_params=None,
        block_hasher=core.request_block_hasher,
        resumable=goes_on,
    )
