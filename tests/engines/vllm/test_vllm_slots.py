"""A request's block table as slots: where tokens lie, and which lie nowhere any more."""

from __future__ import annotations

from kvlayer_vllm.moves import slots_of


def test_tokens_lie_in_their_blocks() -> None:
    assert slots_of([7, 3], 4, 0, 8).tolist() == [28, 29, 30, 31, 12, 13, 14, 15]
    assert slots_of([7, 3], 4, 2, 7).tolist() == [30, 31, 12, 13, 14]


def test_blocks_that_have_left_a_window_have_no_slots() -> None:
    """vLLM puts its null block, number 0, in their place."""
    found = slots_of([0, 0, 5, 2], 4, 2, 16).tolist()
    assert found == [-1] * 6 + [20, 21, 22, 23, 8, 9, 10, 11]


def test_a_table_that_ends_earlier_gives_fewer_slots() -> None:
    assert slots_of([7], 4, 1, 12).tolist() == [29, 30, 31]
