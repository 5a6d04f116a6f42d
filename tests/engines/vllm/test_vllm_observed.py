"""What operators see of a real engine: log, metrics and KV events tell what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "observed_process.py"
FOUND = 672  # of 700 tokens: whole blocks
KEPT = 704  # with the answer's


@pytest.fixture(scope="session")
def seen(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """A prompt asked cold, loaded, and asked once more after a reset."""
    directory = tmp_path_factory.mktemp("observed")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tiny), str(directory)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


def test_the_answers_are_the_same_and_the_second_was_loaded(seen: Any) -> None:
    (cold, none), (warm, cached), (again, nothing) = seen["cold"], seen["warm"], seen["again"]
    assert cold == warm == again
    assert (none, cached, nothing) == (0, FOUND, 0)  # the last after everything was forgotten


def test_metrics_say_what_vllm_itself_counts(seen: Any) -> None:
    values = seen["values"]
    loaded = values["kvlayer_retrieve_tokens_total cpu"]
    assert loaded == values["external_prefix_cache_hits_total"] == seen["warm"][1] == FOUND
    assert values["kvlayer_lookup_hit_tokens_total cpu"] == FOUND
    assert (
        values["kvlayer_lookup_asked_tokens_total"] == values["external_prefix_cache_queries_total"]
    )
    assert values["kvlayer_lookups_total partial"] == 1
    assert values["kvlayer_retrieve_seconds_count"] == 1
    milliseconds = round(values["kvlayer_retrieve_seconds_sum"] * 1e3, 3)
    assert milliseconds > 0 and f"ms per load={milliseconds}," in seen["logged"][0]
    per_token = 2 * 2 * 2 * 64 * 4  # K and V of two layers and heads, 64 floats each
    assert values["kvlayer_retrieve_bytes_total cpu"] == FOUND * per_token
    assert values["kvlayer_store_spans_total stored"] == 12
    assert values["kvlayer_store_bytes_total"] == (KEPT + 32) * per_token  # a tail was superseded
    assert values["kvlayer_transfer_bytes_total file store"] == (KEPT + 32) * per_token
    assert {key: value for key, value in values.items() if "fail" in key and value} == {}
    assert seen["gauges"]["kvlayer_tier_capacity_bytes cpu"] == 256 << 20
    assert seen["gauges"]["kvlayer_tier_up file"] == 1


def test_the_log_has_them_in_one_line(seen: Any) -> None:
    (line,) = seen["logged"]
    assert f"tokens found={FOUND}, tokens loaded={FOUND}, MB loaded=1.376" in line


def tokens_of(stored: Sequence[Mapping[str, Any]]) -> list[int]:
    """What the events say lies in the prompt, each after the one that holds its parent."""
    following = {event["parent"]: event for event in stored}
    assert len(following) == len(stored)
    tokens: list[int] = []
    end = None
    while (event := following.get(end)) is not None:
        tokens += event["tokens"]
        end = event["hashes"][-1]
    return tokens


def test_events_tell_of_every_block_until_the_reset(seen: Any) -> None:
    kept = [*seen["prompt"], *seen["cold"][0]][:KEPT]
    gpu = [h for e in seen["stored"] if e["medium"] == "GPU" for h in e["hashes"]]
    for medium, owner in (("CPU", None), ("STORAGE", "file")):
        place = medium, owner
        stored = [e for e in seen["stored"] if (e["medium"], e["owner"]) == place]
        hashes = [h for event in stored for h in event["hashes"]]
        assert len(hashes) == len(set(hashes)) == KEPT // 32
        assert set(hashes) <= set(gpu) and {e["kind"] for e in stored} == {"BlockStored"}
        assert tokens_of(stored) == kept
        removed = [e for e in seen["removed"] if (e["medium"], e["owner"]) == place]
        assert {e["kind"] for e in removed} == {"BlockRemoved"}
        assert sorted(h for event in removed for h in event["hashes"]) == sorted(hashes)
