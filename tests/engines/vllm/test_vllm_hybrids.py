"""Models with recurrent states: restored at a boundary, with all of it, or not at all.

The engine answers alone, from its own prefix cache, and from what kvlayer has stored, in this
process and after a restart. A hit of kvlayer's is compared with one of vLLM's own: the same passes,
so that nothing but the KV can differ.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import vllm_models
from damage import damage_file

ANSWER = 12
OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 256,  # longer prompts are computed in steps
    "max_model_len": 2048,
    "num_gpu_blocks_override": 64,
    "enable_prefix_caching": True,
    "splits_steps": True,
}


@dataclass(frozen=True)
class Hybrid:
    """A model, and what vLLM makes of it."""

    dtype: str
    block: int
    """Tokens, as vLLM raises them until a page of attention holds a state."""
    hits: tuple[int, int, int, int]
    """Of the four prompts, in tokens: what is asked again is found up to its last state."""
    rules: tuple[str, ...]


HYBRIDS = {
    "nemotron-h": Hybrid("float32", 160, (640, 320, 0, 640), ("boundary", "every-chunk")),
    "qwen3-next": Hybrid("bfloat16", 96, (672, 384, 0, 576), ("boundary",) * 3 + ("every-chunk",)),
    "granite-4-h": Hybrid("float32", 160, (640, 320, 0, 640), ("boundary",) * 3 + ("every-chunk",)),
    "falcon-h1": Hybrid("float32", 160, (640, 320, 0, 640), ("boundary", "every-chunk")),
    "zamba-2": Hybrid("float32", 64, (640, 384, 64, 640), ("boundary",) * 2 + ("every-chunk",)),
    "mamba-2": Hybrid("float32", 32, (672, 384, 64, 640), ("boundary",)),
}
SAME, SEEN = 1e-4, 1e-3
"""Log-probabilities that differ by less are the same; by more, another text was gone on from."""
EVERY_RUN = ("nemotron-h", "qwen3-next")


def prompts() -> list[list[int]]:
    """Several blocks, a few, less than one, and one that begins as the first does."""
    numbers = random.Random(5)
    words = [numbers.randrange(300, 512) for _ in range(4000)]
    return [words[:700], words[1000:1410], words[2000:2095], words[:512] + words[3000:3150]]


def drift(left: Any, right: Any) -> float:
    """The largest difference of the chosen tokens' log-probabilities; infinite for other tokens."""
    if left[0] != right[0]:
        return float("inf")
    pairs = zip(left[2], right[2], strict=True)
    return float(max(abs(ours[0] - theirs[0]) for ours, theirs in pairs))


def cache(folder: Path) -> dict[str, Any]:
    return {
        "held_share": 1.0,  # few blocks, and what is stored is counted
        "tiers": [
            {"url": "cpu://?capacity=256MiB"},
            {"url": f"file://{folder}/kv", "write": "back", "deadline_seconds": 60.0},
        ],
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each, marks=() if each in EVERY_RUN else pytest.mark.campaign)
        for each in HYBRIDS
    ],
)
def test_a_hybrid_is_restored_as_by_vllms_own_cache(
    name: str, tmp_path: Path, engine_process: Any, figures: Any
) -> None:
    hybrid = HYBRIDS[name]
    model = vllm_models.hybrid(name, tmp_path / name)
    options = {**OPTIONS, "dtype": hybrid.dtype}

    alone = engine_process(model, None, **options)
    cold = [alone("answers", [prompt], ANSWER)[0] for prompt in prompts()]
    own = [alone("answers", [prompt], ANSWER)[0] for prompt in prompts()]
    alone.close()
    assert tuple(each[1] for each in own) == hybrid.hits

    largest = 0.0
    first = engine_process(model, cache(tmp_path), **options)
    for prompt, answer in zip(prompts(), cold, strict=True):
        (found,) = first("answers", [prompt], ANSWER)
        assert found[1] == answer[1]
        largest = max(largest, drift(answer, found))
    first("rest")
    first("forget")
    for prompt, answer in zip(prompts(), own, strict=True):
        (found,) = first("answers", [prompt], ANSWER)
        assert found[1] == answer[1]
        largest = max(largest, drift(answer, found))
    first("rest")
    first.close()

    second = engine_process(model, cache(tmp_path), **options)
    state = second("state")
    assert state["on"] and tuple(sorted(state["rules"])) == hybrid.rules
    for prompt, answer in zip(prompts(), own, strict=True):
        (found,) = second("answers", [prompt], ANSWER)
        assert found[1] == answer[1]
        largest = max(largest, drift(answer, found))
    second("rest")
    after = second("state")
    assert (after["troubles"], after["leases"], after["tracked"]) == (0, 0, 0)
    assert largest <= SAME, largest

    # The control: what is loaded is what the answer goes on from, states as well as the rest.
    controls: dict[str, str] = {}
    for in_states in (True, False):
        if not in_states and hybrid.rules == ("boundary",):
            continue
        second("forget")
        second("answers", [prompts()[0]], ANSWER)  # into host memory, as it was
        second("forget")
        assert second("noise", prompts()[0], in_states) > 0
        (found,) = second("answers", [prompts()[0]], ANSWER)
        assert found[1] == hybrid.hits[0]
        moved = drift(own[0], found)
        assert moved > SEEN, (name, in_states, moved)
        controls["states" if in_states else "attention"] = str(moved)
        second("leave_memory", prompts()[0])
    second.close()
    figures("vllm.hybrids", model=name, drift=largest, drift_of_noise=controls)


def test_half_a_set_or_a_wrong_one_is_no_hit(tmp_path: Path, engine_process: Any) -> None:
    """With the rule of states off, answers are others: this test would see it."""
    model = vllm_models.hybrid("nemotron-h", tmp_path / "nemotron-h")
    options = {**OPTIONS, "dtype": "float32"}
    numbers = random.Random(9)
    names = ("whole", "no state", "no attention", "swapped", "damaged")
    asked = {name: [numbers.randrange(300, 512) for _ in range(410)] for name in names}

    first = engine_process(model, cache(tmp_path), **options)
    cold = {name: first("answers", [asked[name]], ANSWER)[0] for name in names}
    ends = {name: first("ends", asked[name]) for name in names}
    first("rest")
    first.close()

    def file(name: str, chunk: int, group: int) -> Path:
        """Of the model's groups 0 has the states, and 1 the attention."""
        (found,) = (tmp_path / "kv").rglob(f"{ends[name][chunk]}-*.g{group}.*.raw")
        return found

    file("no state", 1, 0).unlink()
    file("no attention", 0, 1).unlink()
    file("swapped", 1, 0).write_bytes(file("whole", 1, 0).read_bytes())
    damage_file(file("damaged", 1, 0), "flipped")
    shutil.copytree(tmp_path / "kv", tmp_path / "again" / "kv")

    second = engine_process(model, cache(tmp_path), **options)
    told = second("explain", asked["no state"])
    assert "never-stored: attention is there to 320, there is no state" in told, told
    for name in names[1:]:
        (found,) = second("answers", [asked[name]], ANSWER)
        assert found[1] == 0 and drift(cold[name], found) <= SAME, name
    (found,) = second("answers", [asked["whole"]], ANSWER)
    assert found[1] == 320 and found[0] == cold["whole"][0]
    second("rest")
    state = second("state")
    assert (state["troubles"], state["leases"], state["tracked"]) == (0, 0, 0)
    assert {"corrupt", "misplaced"} <= second("misses").keys()
    second.close()

    third = engine_process(model, cache(tmp_path / "again"), **options)
    third("states_are_optional")
    (found,) = third("answers", [asked["no state"]], ANSWER)
    assert found[1] == 320 and drift(cold["no state"], found) > SEEN
    third.close()


def test_a_chat_hits_one_turn_behind(tmp_path: Path, engine_process: Any) -> None:
    """vLLM keeps a state at the last boundary of a prompt, and none of what it answers."""
    model = vllm_models.hybrid("nemotron-h", tmp_path / "nemotron-h")
    process = engine_process(model, cache(tmp_path), **OPTIONS, dtype="float32")
    numbers = random.Random(11)
    text: list[int] = []
    hits: list[int] = []
    for more in (200, 150, 170):
        text += [numbers.randrange(300, 512) for _ in range(more)]
        (found,) = process("answers", [text], ANSWER)
        hits.append(found[1])
        text += found[0]
        process("rest")
        process("forget")
    assert hits == [0, 160, 320]
    process.close()
