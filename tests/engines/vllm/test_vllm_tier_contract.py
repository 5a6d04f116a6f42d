"""What vLLM expects of a tier, asked of kvlayer's and of vLLM's own tier of files alike.

Where vLLM's own breaks a promise the test says so: what it answers then is what it is seen to do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_desk import LAYERS
from vllm_tiering import Offload, content_of, folder_tier, key_of, tier_of

OURS, THEIRS = "kvlayer", "vllm-fs"
TIERS = pytest.mark.parametrize("whose", [OURS, THEIRS])


class Place:
    """A folder and engines that keep chunks there."""

    def __init__(self, folder: Path, make: Callable[..., Offload]) -> None:
        self.folder, self._make = folder, make

    def open(self, whose: str, **options: Any) -> Offload:
        if whose == THEIRS:
            return self._make({"type": "fs", "root_dir": str(self.folder), **options})
        return self._make(tier_of(folder_tier(self.folder), **options))

    def with_one(self, whose: str) -> tuple[Offload, Path]:
        """An engine that has stored chunk 1 and holds it no more, and the file that it is in."""
        at = self.open(whose)
        at.store([1])
        at.forget()
        (path,) = self.files
        return at, path

    @property
    def files(self) -> list[Path]:
        """Of chunks."""
        found = [*self.folder.rglob("*.raw"), *self.folder.rglob("*.bin")]
        return [path for path in found if "quarantine" not in path.parts]


@pytest.fixture
def place(
    tmp_path: Path, vllm_config: Any, kv_cache_config: Any, spec: Any, no_cache_home: None
) -> Iterator[Place]:
    made: list[Offload] = []

    def make(tier: dict[str, Any]) -> Offload:
        groups = kv_cache_config((LAYERS, spec("FullAttentionSpec")))
        made.append(Offload(vllm_config, groups, tier))
        return made[-1]

    yield Place(tmp_path / "chunks", make)
    for each in made:
        each.close()


@TIERS
def test_what_was_stored_is_found_by_a_fresh_manager(whose: str, place: Place) -> None:
    first = place.open(whose)
    first.store([1, 2])
    second = place.open(whose)
    assert second.found(1) == content_of(1, second.nbytes)
    assert second.found(3) is None


@TIERS
def test_a_lookup_is_answered_in_the_end_and_a_job_once(whose: str, place: Place) -> None:
    at = place.open(whose)
    at.store([1])
    at.forget()
    own = at.request()
    assert at.found(1, own) is not None
    at.forget()
    at.over(own)
    at.tier.drain_jobs()
    assert [*at.tier.get_finished_jobs()] == []


@TIERS
def test_storing_again_changes_nothing(whose: str, place: Place) -> None:
    at = place.open(whose)
    at.store([1])
    (path,) = place.files
    before = path.read_bytes()
    at.forget()
    at.store([1])
    (path,) = place.files
    assert path.read_bytes() == before


@TIERS
def test_a_missing_chunk_is_a_miss_also_after_it_was_found(whose: str, place: Place) -> None:
    at, path = place.with_one(whose)
    assert at.found(1) is not None
    at.forget()
    path.unlink()
    assert at.found(1) is None


@TIERS
def test_a_truncated_chunk_is_a_miss(whose: str, place: Place) -> None:
    at, path = place.with_one(whose)
    path.write_bytes(path.read_bytes()[:1000])
    assert at.found(1) is None


@TIERS
def test_a_damaged_chunk_is_a_miss(whose: str, place: Place) -> None:
    """vLLM's own serves it."""
    at, path = place.with_one(whose)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    found = at.found(1)
    if whose == OURS:
        assert found is None
    else:
        assert found is not None and found != content_of(1, at.nbytes)


@TIERS
def test_a_chunk_under_another_ones_name_is_a_miss(whose: str, place: Place) -> None:
    """vLLM's own serves it."""
    at = place.open(whose)
    at.store([1])
    (first,) = place.files
    at.store([2])
    at.forget()
    (second,) = {*place.files} - {first}
    first.write_bytes(second.read_bytes())
    found = at.found(1)
    assert found == (None if whose == OURS else content_of(2, at.nbytes))


@TIERS
def test_a_damaged_chunk_is_replaced_when_it_is_stored_again(whose: str, place: Place) -> None:
    """vLLM's own replaces one that is too short, and goes on serving one that is not."""
    at = place.open(whose)
    for is_short in (True, False):
        at.store([1])
        at.forget()
        (path,) = place.files
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw[:1000] if is_short else raw)
        at.found(1)
        at.forget()
        at.store([1])
        at.forget()
        is_right = at.found(1) == content_of(1, at.nbytes)
        assert is_right is (whose == OURS or is_short)
        at.forget()


@TIERS
def test_chunks_of_other_weights_are_not_found(whose: str, place: Place) -> None:
    """vLLM's own knows the model by its name alone."""
    at = place.open(whose)
    at.store([1])
    stated = {"model": {"weights": "sha256:" + "2" * 64}}  # vLLM's own has no word for them
    other = place.open(whose, **(stated if whose == OURS else {}))
    found = other.found(1)
    assert (found is None) is (whose == OURS)


@TIERS
def test_a_folder_that_cannot_be_written_costs_no_answer(whose: str, place: Place) -> None:
    at = place.open(whose)
    at.store([1])
    shutil.rmtree(place.folder)
    place.folder.write_bytes(b"")  # where a folder was: root writes to whatever is one
    at.store([2])
    assert at.found(2) == content_of(2, at.nbytes)  # vLLM's host memory has it
    at.forget()
    assert at.found(2) is None


@TIERS
def test_draining_leaves_nothing_under_way_and_a_reset_forgets_host_memory_alone(
    whose: str, place: Place
) -> None:
    at = place.open(whose)
    own = at.request()
    keys = [key_of(n) for n in range(4)]
    out = at.manager.prepare_store(keys, own)
    for number, chunk in zip(range(4), out.store_spec.chunk_ids, strict=True):
        at.row(int(chunk))[:] = content_of(number, at.nbytes)
    at.manager.complete_store(keys, own)
    at.forget()  # with the jobs under way
    at.over(own)
    assert at.found(2) == content_of(2, at.nbytes)
