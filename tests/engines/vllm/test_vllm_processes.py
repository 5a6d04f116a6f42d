"""KV outlives the engine's process: restarts, other models, a process killed while it writes.

Each engine is a process of its own, and one runs at a time.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import damage_file
from vllm_process import EngineProcess
from vllm_processor import packing
from zygote import Zygote

ANSWER = 12
TINY_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_batched_tokens": 512,
    "max_model_len": 2048,
    "num_gpu_blocks_override": 200,  # what starting an engine takes is zeroing its memory
}


def prompt_of(tokens: int, seed: int) -> list[int]:
    from kvlayer_vllm.bench.serving import prompt_of as random_ids

    return random_ids(tokens, seed, 512)


def cache_in(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "tokens_per_chunk": 64,
        "tokens_per_tail": 32,
        "held_share": 1.0,  # few blocks, and what is stored is counted
        "tiers": [
            {"url": "cpu://?capacity=256MiB"},
            {"url": f"file://{directory}", "write": "back", "deadline_seconds": 60.0},
        ],
        **more,
    }


INSTRUCTIONS, DIGESTS = 25_000, 400
"""Of a call: together about a millisecond of a slow processor."""

PROMPTS = [prompt_of(700, 1), prompt_of(300, 1), prompt_of(410, 2), prompt_of(95, 3)]
USABLE = [672, 288, 384, 64]


@pytest.fixture(scope="session")
def cold(tiny: Path, zygote: Zygote) -> list[list[int]]:
    """What the engine answers without kvlayer."""
    process = EngineProcess(zygote, tiny, None, **TINY_OPTIONS)
    answers = [process("ask", [prompt], ANSWER)[0][0] for prompt in PROMPTS]
    process.close()
    return answers


@pytest.fixture(scope="session")
def stored(tiny: Path, zygote: Zygote, cold: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that another engine has filled, and left."""
    directory = tmp_path_factory.mktemp("stored")
    process = EngineProcess(zygote, tiny, cache_in(directory), **TINY_OPTIONS)
    answers = [process("ask", [prompt], ANSWER)[0] for prompt in PROMPTS]
    assert [tokens for tokens, _ in answers] == cold
    assert answers[0][1] == 0
    process("rest")
    process.close()
    return directory


@pytest.mark.any_device
def test_a_restarted_engine_loads_what_the_first_has_stored(
    tiny: Path, stored: Path, cold: Any, engine_process: Any
) -> None:
    process = engine_process(tiny, cache_in(stored), **TINY_OPTIONS)
    for prompt, usable, answer in zip(PROMPTS, USABLE, cold, strict=True):
        assert process("ask", [prompt], ANSWER) == [[answer, usable]]
    process("rest")
    found = process("state")
    assert (found["on"], found["troubles"], found["leases"]) == (True, 0, 0)
    process.close()


@pytest.mark.parametrize(
    ("loads", "form"), [("async", "native"), ("layerwise", "native"), ("sync", "canonical")]
)
def test_each_way_of_loading_gives_the_same_answers(
    loads: str, form: str, tiny: Path, cold: Any, tmp_path: Path, engine_process: Any
) -> None:
    """Also with tails inside a block, where the form is canonical."""
    cache = cache_in(tmp_path, loads=loads, form=form)
    if form == "canonical":
        cache |= {"tokens_per_chunk": 48, "tokens_per_tail": 12}
    process = engine_process(tiny, cache, **TINY_OPTIONS)
    for prompt, answer in zip(PROMPTS, cold, strict=True):
        process("ask", [prompt], ANSWER)
        process("leave_memory", prompt)
        ((tokens, cached),) = process("ask", [prompt], ANSWER)
        step = 12 if form == "canonical" else 32
        assert tokens == answer
        assert cached == min(len(prompt) // step * step, len(prompt) - 1)
    batch = process("ask", PROMPTS, ANSWER)
    assert [tokens for tokens, _ in batch] == cold and all(cached for _, cached in batch)
    process("rest")
    found = process("state")
    assert (found["troubles"], found["leases"], found["pinned"], found["tracked"]) == (0, 0, 0, 0)
    process.close()


@pytest.mark.any_device
def test_other_weights_never_hit(
    tiny: Path, stored: Path, tmp_path: Path, engine_process: Any
) -> None:
    """One bit of them differs, the served name is the same."""
    other = tmp_path / tiny.name
    shutil.copytree(tiny, other)
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    options = {**TINY_OPTIONS, "served_model_name": "tiny"}
    never_hits(engine_process(other, cache_in(stored), **options), "weights")


def test_another_dtype_never_hits(tiny: Path, stored: Path, engine_process: Any) -> None:
    # Packed another way there is not even an object of the same kind to point at.
    is_alike = packing("bfloat16") == packing("float32")
    options = {**TINY_OPTIONS, "served_model_name": "tiny", "dtype": "bfloat16"}
    process = engine_process(tiny, cache_in(stored), **options)
    never_hits(process, "dtype" if is_alike else "never-stored")


def never_hits(process: EngineProcess, reason: str) -> None:
    assert process("ask", [PROMPTS[0]], 1)[0][1] == 0
    assert reason in process("explain", PROMPTS[2])
    process.close()


@pytest.mark.any_device
def test_a_process_killed_while_it_writes_leaves_nothing_wrong(
    tiny: Path, cold: Any, tmp_path: Path, engine_process: Any
) -> None:
    process = engine_process(tiny, cache_in(tmp_path), **TINY_OPTIONS)
    process("ask", [PROMPTS[2]], 1)
    process.begin("ask", [PROMPTS[0]], ANSWER)
    while not any(".raw" in name for *_, names in os.walk(tmp_path) for name in names):
        pass  # something is written: more of it follows
    process.kill()
    again = engine_process(tiny, cache_in(tmp_path), **TINY_OPTIONS)
    for prompt, answer in zip(PROMPTS, cold, strict=True):
        assert again("ask", [prompt], ANSWER)[0][0] == answer
    again.close()


def mends(process: EngineProcess, cold: list[list[int]]) -> None:
    """Damage is found one object at a time, and stored anew: until every prompt is whole again."""
    for prompt, answer, usable in zip(PROMPTS, cold, USABLE, strict=True):
        found = -1
        while found < usable:
            ((tokens, cached),) = process("ask", [prompt], ANSWER)
            assert tokens == answer and cached > found
            found = cached
            process("leave_memory", prompt)
        assert found == usable


@pytest.mark.any_device
@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_damaged_files_are_misses(
    damage: str, tiny: Path, stored: Path, cold: Any, tmp_path: Path, engine_process: Any
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(stored, directory)
    files = sorted(path for path in directory.rglob("*.raw") if path.is_file())
    assert len(files) > 10
    for path in files[::2]:
        damage_file(path, damage)
    process = engine_process(tiny, cache_in(directory), **TINY_OPTIONS)
    mends(process, cold)
    process.close()


@pytest.mark.any_device
@pytest.mark.parametrize("damage", ["truncated", "flipped", "deleted"])
def test_files_damaged_between_lookup_and_load_are_misses(
    damage: str, tiny: Path, stored: Path, cold: Any, tmp_path: Path, engine_process: Any
) -> None:
    """The second process has found the whole prompt when every other file changes under it."""
    directory = tmp_path / "copy"
    shutil.copytree(stored, directory)
    process = engine_process(tiny, cache_in(directory), **TINY_OPTIONS)
    assert process("damage_before_load", str(directory), damage) > 10
    ((tokens, cached),) = process("ask", [PROMPTS[0]], ANSWER)
    assert process("damaged") > 5
    assert tokens == cold[0] and cached < USABLE[0]
    process("leave_memory", PROMPTS[0])
    mends(process, cold)
    state = process("state")
    assert (state["troubles"], state["leases"], state["pinned"]) == (0, 0, 0)
    process.close()


@pytest.mark.parametrize(("count", "seeds"), [(2000, [11, 12]), (32_016, [11])])
def test_the_scheduler_is_never_held(
    count: int, seeds: list[int], tiny_long: Path, engine_process: Any, figures: Any
) -> None:
    """With 100,000 resident chunks no hook has more than a millisecond's work for its thread.

    Work is counted, since a clock would also measure what else the machine does. Milliseconds of
    CPU time are figures only.
    """
    cache = {"tokens_per_chunk": 32, "tiers": [{"url": "cpu://?capacity=16GiB"}]}
    room = {"max_model_len": 33_000, "num_gpu_blocks_override": 2200}
    process = engine_process(tiny_long, cache, **{**TINY_OPTIONS, **room})
    made, known = process("resident", 100_000)
    assert made == 100_000 and known >= made
    prompts = [prompt_of(count, seed) for seed in seeds]  # the answer fills its last chunk
    process("ask", prompts, 4)
    process("rest")
    longest: dict[bool, dict[str, Any]] = {}
    for counts in (True, False):
        work, answers = process("hook_work", prompts, 20, counts)
        assert [cached for _, cached in answers] == [count - 16] * len(seeds)
        process("rest")
        longest[counts] = {name: max(calls) for name, calls in work.items()}
    assert len(longest[True]) == 6
    for name, (instructions, digests) in longest[True].items():
        assert 0 < instructions <= INSTRUCTIONS and digests <= DIGESTS, (name, longest[True])
    figures("vllm.hooks", tokens=count, **{f"{k}_ms": v for k, v in longest[False].items()})
    process.close()


@pytest.mark.any_device
def test_a_reset_forgets_everything(tiny: Path, tmp_path: Path, engine_process: Any) -> None:
    process = engine_process(tiny, cache_in(tmp_path), **TINY_OPTIONS)
    process("ask", [PROMPTS[0]], 1)
    process("rest")
    assert process("ask", [PROMPTS[0]], 1)[0][1] == USABLE[0]
    process("rest")
    assert process("reset") is True
    assert process("ask", [PROMPTS[0]], 1)[0][1] == 0
    process.close()
