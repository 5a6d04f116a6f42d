"""kvlayer as a tier of vLLM's own offload, in whole engines."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import vllm_models
from vllm_tiering import folder_tier, tier_of

OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 256,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 64,
    "enable_prefix_caching": True,
    "dtype": "float32",
}
ANSWER = 12


def behind(folder: Path, **more: Any) -> dict[str, Any]:
    return {"behind_vllms_offload": tier_of(folder_tier(folder), **more)}


def test_engines_share_chunks_and_find_them_after_a_restart(
    tiny: Path, prompts: Any, expected: Any, tmp_path: Path, engine_process: Any
) -> None:
    asked = [*prompts["single"][4:8], *prompts["chunked"]]
    first = engine_process(tiny, None, **OPTIONS, **behind(tmp_path))
    second = engine_process(tiny, None, **OPTIONS, **behind(tmp_path))
    for prompt in asked:
        ((answer, cached),) = first("ask", [prompt], ANSWER)
        assert (tuple(answer), cached) == (expected[tuple(prompt)], 0)
    first("leave_offload")
    assert first("offload_state")["stored"][0] > 0

    def all_found(process: Any) -> None:
        for prompt in asked:
            ((answer, cached),) = process("ask", [prompt], ANSWER)
            assert tuple(answer) == expected[tuple(prompt)]
            assert cached == len(prompt) // 32 * 32
        process("leave_offload")

    all_found(second)  # it runs, and has stored nothing
    all_found(first)
    states = [first("offload_state"), second("offload_state")]
    assert states[0]["namespace"] == states[1]["namespace"]
    assert all(each["hits"][0] > 0 for each in states)
    assert all((each["verdicts"], each["running"]) == (0, 0) for each in states)
    first.close()
    second.close()
    third = engine_process(tiny, None, **OPTIONS, **behind(tmp_path))
    all_found(third)
    third.close()


def test_a_hybrid_is_found_after_a_restart_as_by_vllms_own_cache(
    tmp_path: Path, engine_process: Any
) -> None:
    model = vllm_models.hybrid("nemotron-h", tmp_path / "nemotron-h")
    options = {**OPTIONS, "splits_steps": True}
    numbers = random.Random(3)
    asked = [[numbers.randrange(300, 512) for _ in range(count)] for count in (700, 410)]
    alone = engine_process(model, None, **options)
    for prompt in asked:
        alone("answers", [prompt], ANSWER)
    own = [alone("answers", [prompt], ANSWER)[0] for prompt in asked]
    alone.close()
    first = engine_process(model, None, **options, **behind(tmp_path / "kv"))
    for prompt in asked:
        first("answers", [prompt], ANSWER)
    first("leave_offload")
    first.close()
    second = engine_process(model, None, **options, **behind(tmp_path / "kv"))
    for prompt, answer in zip(asked, own, strict=True):
        (found,) = second("answers", [prompt], ANSWER)
        assert found[:2] == answer[:2]
        drift = max(abs(a[0] - b[0]) for a, b in zip(found[2], answer[2], strict=True))
        assert drift < 1e-4
    second("leave_offload")
    assert second("offload_state")["hits"][0] > 0
    second.close()
