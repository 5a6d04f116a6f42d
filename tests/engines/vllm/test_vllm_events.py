"""KV cache events name blocks as vLLM does, and tell of kvlayer's tiers what is true of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from vllm_desk import BLOCK, LAYERS, Desk

PROMPT = list(range(3, 203))


@pytest.fixture
def desk(desk: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of an engine that publishes KV events."""
    from vllm.config import KVEventsConfig

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    monkeypatch.setattr(vllm_config, "kv_events_config", events)
    return desk


@pytest.fixture
def hashed(request_of: Any) -> Any:
    """``hashed(tokens, ...)``: a request whose blocks the engine has hashed."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return lambda tokens, **fields: request_of(tokens, block_hasher=hasher, **fields)


class Router:
    """What a router knows of an engine's tiers, from its events."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str | None, int], dict[bytes, Any]] = {}

    def hears(self, events: list[Any]) -> list[Any]:
        for event in events:
            place = (event.medium, event.ownership, event.group_idx)
            held = self.held.setdefault(place, {})
            if type(event).__name__ == "BlockRemoved":
                for each in event.block_hashes:
                    del held[each]  # nothing is removed that was not stored
                continue
            parent = event.parent_block_hash
            for number, each in enumerate(event.block_hashes):
                assert each not in held  # nothing is stored twice
                at = number * event.block_size
                held[each] = parent, tuple(event.token_ids[at : at + event.block_size])
                parent = each
        return events

    def names(self) -> dict[Any, set[bytes]]:
        return {place: set(held) for place, held in self.held.items() if held}


def told(block_hashes: Any) -> list[Any]:
    """Hashes as events have them."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    return [maybe_convert_block_hash(each) for each in block_hashes]


HOST, DISK = ("CPU", None, 0), ("STORAGE", "file", 0)


def test_blocks_are_named_as_vllm_names_them(desk: Any, hashed: Any, below: Any) -> None:
    """As the engine's own block pool does for the same prompt."""
    from vllm.v1.core.block_pool import BlockPool

    at, request = desk(tiers=below), hashed(PROMPT, cache_salt="a salt")
    at.answer(request, [1, 2, 3, 4, 5, 6, 7])
    pool = BlockPool(16, True, BLOCK, enable_kv_cache_events=True)
    pool.cache_full_blocks(request, pool.get_new_blocks(6), 0, 6, BLOCK, 0)
    (whole,) = pool.take_events()
    events = at.half.take_events()
    for medium, ownership, locality in (("CPU", None, "LOCAL"), ("STORAGE", "file", None)):
        mine = [event for event in events if event.medium == medium]
        mine.sort(key=lambda event: whole.block_hashes.index(event.block_hashes[0]))
        assert [each for event in mine for each in event.block_hashes] == whole.block_hashes
        assert [each for event in mine for each in event.token_ids] == whole.token_ids
        assert [each for event in mine for each in event.extra_keys] == whole.extra_keys
        assert whole.extra_keys[0] == ("a salt",)
        parents = [None, whole.block_hashes[1], whole.block_hashes[3]]
        assert [event.parent_block_hash for event in mine] == parents
        for event in mine:
            assert (event.ownership, event.locality) == (ownership, locality)
            assert (event.block_size, event.group_idx, event.lora_name) == (BLOCK, 0, None)
            assert event.kv_cache_spec_kind == "full_attention"
    assert at.half.take_events() == []


def test_events_and_tiers_agree_until_nothing_is_left(desk: Any, hashed: Any, below: Any) -> None:
    at, router = desk(tiers=below), Router()
    one, two = hashed(PROMPT), hashed([*PROMPT[:100], *range(300, 400)], request_id="two")
    at.answer(one, [1, 2, 3, 4, 5, 6, 7])
    at.answer(two, [11, 12, 13, 14, 15, 16, 17])
    router.hears(at.half.take_events())
    blocks = {*told(one.block_hashes), *told(two.block_hashes)}
    assert len(blocks) == 9  # three of each are the other's, too
    assert router.names() == {HOST: blocks, DISK: blocks}
    # Evicted from memory: the two that both prompts begin with are the other's, and stay.
    at.half.portal.call(lambda cache: cache.control.evict(PROMPT, tier="cpu"))
    router.hears(at.half.take_events())
    left = set(told(two.block_hashes[2:]))
    assert router.names() == {HOST: left, DISK: blocks}
    # Brought up again by a request that finds them below.
    at.answer(hashed([*PROMPT, 7], request_id="three"), [11, 12, 13, 14, 15, 16, 17])
    router.hears(at.half.take_events())
    assert router.names() == {HOST: blocks, DISK: blocks}
    assert at.half.reset()
    gone = router.hears(at.half.take_events())
    assert router.names() == {}
    assert Counter(type(event).__name__ for event in gone) == {"BlockRemoved": len(gone)}


def test_a_tail_and_the_chunk_that_takes_its_place_are_told_once(desk: Any, hashed: Any) -> None:
    at, router = desk(), Router()
    short, long = hashed(PROMPT[:100]), hashed(PROMPT[:130], request_id="two")
    at.answer(short, [1, 2, 3, 4])
    events = router.hears(at.half.take_events())
    assert sorted(len(event.block_hashes) for event in events) == [1, 2]  # gathered in any order
    at.answer(long, [11, 12, 13, 14, 15])
    (event,) = router.hears(at.half.take_events())
    assert event.block_hashes == told(long.block_hashes)[3:]
    assert event.parent_block_hash == told(short.block_hashes)[2]
    at.half.portal.call(lambda cache: cache.control.evict(PROMPT[:100]))
    router.hears(at.half.take_events())
    # The tail went, and the first chunk; of the second its block is still there.
    assert router.names() == {HOST: {*told(long.block_hashes[2:])}}


def test_what_another_process_has_left_is_told_when_it_is_found(
    desk: Any, hashed: Any, below: Any
) -> None:
    first, router = desk(tiers=below), Router()
    first.answer(hashed(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    first.close()
    at = desk(tiers=below)
    request = hashed([*PROMPT, 7])
    at.half.arrived(request)
    assert at.asked(request) == (192, True)
    router.hears(at.half.take_events())
    blocks = set(told(request.block_hashes))
    assert router.names() == {HOST: blocks, DISK: blocks}


def test_windows_say_of_which_group_they_are(desk: Any, hashed: Any) -> None:
    at = desk(windows=True)
    request = hashed(PROMPT)
    at.answer(request, [1, 2, 3, 4, 5, 6, 7])
    events = at.half.take_events()
    assert {event.group_idx for event in events} == {0, 1}
    for event in events:
        kind = ("full_attention", None) if event.group_idx == 0 else ("sliding_window", 64)
        assert (event.kv_cache_spec_kind, event.kv_cache_spec_sliding_window) == kind


def test_without_hashes_of_the_engines_nothing_is_told_and_everything_is_stored(
    desk: Any, request_of: Any
) -> None:
    at = desk()
    at.answer(request_of(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    assert at.half.take_events() == [] and at.found(PROMPT) == 192


def test_an_event_that_cannot_be_told_costs_nothing_else(
    desk: Any, hashed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlayer_vllm import block_events

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(block_events, "resolved_hashes", broken)
    at = desk()
    at.answer(hashed(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    assert at.half.take_events() == [] and at.found(PROMPT) == 192


def test_without_a_router_nothing_is_kept(
    vllm_config: Any, spec: Any, kv_cache_config: Any, hashed: Any, no_cache_home: None
) -> None:
    at = Desk(vllm_config, kv_cache_config((LAYERS, spec("FullAttentionSpec"))))
    at.answer(hashed(PROMPT), [1, 2, 3, 4, 5, 6, 7])
    assert at.half.take_events() == [] and at.half._events is None
    at.close()


def test_chunks_that_no_tier_holds_are_forgotten(
    desk: Any, hashed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvlayer_vllm import block_events

    monkeypatch.setattr(block_events, "_MOST_ELSEWHERE", 2)
    at = desk()
    for number in range(5):
        at.answer(
            hashed([n + 10 * number for n in PROMPT], request_id=str(number)),
            [1, 2, 3, 4, 5, 6, 7],
        )
        at.half.portal.call(lambda cache: cache.control.clear())
    events = at.half._events
    assert len(events._named) == len(events._elsewhere) == 2
    assert not any(events._counts.values())
