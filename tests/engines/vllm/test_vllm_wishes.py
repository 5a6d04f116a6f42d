"""What a request's ``kv_transfer_params`` ask for, under the names of vLLM's own connectors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvlayer import Cache
from kvlayer_vllm.wishes import Wishes

PROMPT = list(range(3, 203))  # three chunks of 64 and 8 tokens
BLOCKS = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture
def wishing(request_of: Any) -> Any:
    """``wishing(**params)``: a request for the prompt that says so."""

    def make(name: str = "two", **params: Any) -> Any:
        request = request_of(PROMPT, request_id=name)
        request.kv_transfer_params = params
        return request

    return make


def given(at: Any, request: Any, computed: int = 0) -> int:
    """Tokens that the request is promised beyond those that vLLM has."""
    at.half.arrived(request)
    more, _ = at.asked(request, computed)
    at.half.finished(request, [[]])
    return int(more)


# -- how much --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "computed", "more"),
    [(1000, 0, 192), (192, 0, 192), (191, 0, 128), (100, 0, 64), (100, 32, 96), (63, 0, 0)],
)
def test_no_more_is_loaded_than_a_request_asks_for(
    most: int, computed: int, more: int, desk: Any, request_of: Any, wishing: Any
) -> None:
    at = desk()
    at.answer(request_of(PROMPT), BLOCKS)
    assert given(at, wishing(max_load_tokens=most), computed) == more


def test_what_is_loaded_of_a_bounded_hit_is_right(desk: Any, request_of: Any, wishing: Any) -> None:
    at = desk()
    at.answer(request_of(PROMPT), BLOCKS)
    bounded = wishing(max_load_tokens=130)
    at.half.arrived(bounded)
    others = [11, 12, 13, 14, 15, 16, 17]
    assert at.admit(bounded, others) == 128
    while at.half._tracked["two"].load is not None:
        at.run()
    for mine, theirs in zip(at.rows(BLOCKS[:4]), at.rows(others[:4]), strict=True):
        assert mine.equal(theirs)
    at.finish(bounded)


def test_the_bound_follows_what_vllm_has_when_it_asks_again(
    desk: Any, request_of: Any, wishing: Any
) -> None:
    """Another request may have computed more of it, or its blocks may be gone."""
    at = desk()
    at.answer(request_of(PROMPT), BLOCKS)
    request = wishing(max_load_tokens=64)
    at.half.arrived(request)
    assert [at.asked(request, computed)[0] for computed in (0, 64, 128, 0)] == [64, 64, 64, 64]
    at.half.finished(request, [[]])


def test_who_wants_nothing_is_not_even_looked_up(desk: Any, request_of: Any, wishing: Any) -> None:
    at = desk()
    at.answer(request_of(PROMPT), BLOCKS)
    before = at.half.portal.call(_lookups)
    assert given(at, wishing(max_load_tokens=0)) == 0
    assert at.half.portal.call(_lookups) == before


async def _lookups(cache: Cache) -> int:
    return cache.control.stats().lookups


@pytest.mark.parametrize(("most", "found"), [(1000, 192), (130, 128), (100, 96), (31, 0), (0, 0)])
def test_no_more_is_stored_than_a_request_asks_for(
    most: int, found: int, desk: Any, wishing: Any
) -> None:
    at = desk()
    at.answer(wishing(max_offload_tokens=most), BLOCKS)
    assert at.found(PROMPT[: most or 200]) == found
    assert at.found(PROMPT) <= most


# -- from where ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiers", "more"),
    [
        (None, 192),
        ([{}], 192),
        ([{"medium": "storage"}], 192),
        ([{"medium": "CPU"}, {"locality": "REMOTE"}], 192),
        ([{"medium": "CPU"}], 64),
        ([], 64),
    ],
)
def test_tiers_that_a_request_leaves_out_are_left_alone(
    tiers: Any, more: int, desk: Any, below: Any, request_of: Any, wishing: Any
) -> None:
    """Host memory has the first chunk, the disk all of them."""
    at = desk(tiers=below)
    at.answer(request_of(PROMPT), BLOCKS)

    async def leave_memory(cache: Cache) -> None:
        await cache.control.clear("cpu")

    at.half.portal.call(leave_memory)
    first = request_of(PROMPT[:65], request_id="first")
    at.answer(first, BLOCKS)
    assert given(at, wishing(kv_load_tiers=tiers)) == more


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """The warnings."""
    logger = logging.getLogger("vllm.kvlayer")
    logger.addHandler(caplog.handler)  # vLLM's logger may keep its records to itself, or not
    yield lambda: list(dict.fromkeys(each.getMessage() for each in caplog.records))
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("params", "line"),
    [
        ({"max_load_tokens": -1}, "max_load_tokens must be a whole number of tokens, 0 or more"),
        ({"max_load_tokens": True}, "found True; ignored"),
        ({"max_offload_tokens": "9"}, "max_offload_tokens must be a whole number of tokens"),
        ({"kv_load_tiers": "CPU"}, "kv_load_tiers must be a list of objects, found 'CPU'; ignored"),
        ({"kv_load_tiers": [{"medium": "TAPE"}]}, "found {'medium': 'TAPE'}; ignored"),
        ({"kv_load_tiers": [7]}, 'must be like {"medium": "STORAGE"}'),
    ],
)
def test_a_wrong_wish_is_ignored_with_a_line(
    params: dict[str, Any], line: str, wishing: Any, told: Any
) -> None:
    assert Wishes.of(wishing(**params)) == Wishes()
    (said,) = told()
    assert said.startswith("request two: ") and line in said


def test_a_wrong_entry_does_not_undo_a_right_one(wishing: Any, told: Any) -> None:
    tiers = [{"medium": "TAPE"}, {"medium": "cpu", "locality": "local"}]
    assert Wishes.of(wishing(kv_load_tiers=tiers)) == Wishes(memory_only=True)
    assert len(told()) == 1


@pytest.mark.parametrize("params", [None, {}, [], "x", {"do_remote_prefill": True}])
def test_what_is_meant_for_others_is_no_wish(params: Any, told: Any) -> None:
    request = SimpleNamespace(request_id="two", kv_transfer_params=params)
    assert Wishes.of(request) == Wishes() and not told()
