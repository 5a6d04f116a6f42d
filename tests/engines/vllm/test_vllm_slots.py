"""A request's numbers as the cache takes them: its block table as slots, its tokens as an array."""

from __future__ import annotations

from array import array

import pytest

from kvlayer_vllm.moves import slots_of
from kvlayer_vllm.token_ids import TokenIds


def test_tokens_lie_in_their_blocks() -> None:
    assert slots_of([7, 3], 4, 0, 8).tolist() == [28, 29, 30, 31, 12, 13, 14, 15]
    assert slots_of([7, 3], 4, 2, 7).tolist() == [30, 31, 12, 13, 14]


def test_blocks_that_have_left_a_window_have_no_slots() -> None:
    """vLLM puts its null block, number 0, in their place."""
    found = slots_of([0, 0, 5, 2], 4, 2, 16).tolist()
    assert found == [-1] * 6 + [20, 21, 22, 23, 8, 9, 10, 11]


def test_a_table_that_ends_earlier_gives_fewer_slots() -> None:
    assert slots_of([7], 4, 1, 12).tolist() == [29, 30, 31]


def test_tokens_are_converted_as_they_come_and_what_was_given_stays() -> None:
    source = list(range(10))
    ids = TokenIds(source)
    first = ids.upto(6)
    assert first == array("i", range(6)) and ids.upto(4) == array("i", range(4))
    source += [70, 71]
    assert ids.upto(12) == array("i", [*range(10), 70, 71]) == ids.upto(99)
    assert first == array("i", range(6))


@pytest.mark.asyncio
@pytest.mark.parametrize("stop", [0, 1, 4096, 4097, 9000, 10_000])
async def test_many_tokens_are_converted_in_slices(stop: int) -> None:
    assert await TokenIds(range(9500)).upto_in_slices(stop) == array("i", range(min(stop, 9500)))
