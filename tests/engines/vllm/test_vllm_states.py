"""States that vLLM offers: held until a store has taken them, and no longer than they are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvlayer_vllm.kept_states import KeptStates
from kvlayer_vllm.moves import state_slots
from kvlayer_vllm.token_ids import TokenIds
from kvlayer_vllm.tracked import Tracked

SIZES = {1: 32, 2: 32}


class Keeping:
    """A pool of vLLM's, and what is kept of it."""

    def __init__(self) -> None:
        from vllm.v1.core.block_pool import BlockPool

        self.pool = BlockPool(32, enable_caching=True, hash_block_size=32)
        self.cuts = 0
        self.kept = KeptStates(SIZES, self._cut)
        self.kept.bind(self.pool)

    def _cut(self) -> None:
        self.cuts += 1

    @property
    def held(self) -> dict[int, int]:
        return {each.block_id: each.ref_cnt for each in self.pool.blocks[1:] if each.ref_cnt}


@pytest.fixture
def at() -> Keeping:
    return Keeping()


@pytest.fixture
def one(request_of: Any) -> Tracked:
    request = request_of([*range(300)])
    return Tracked(request, TokenIds(request.all_token_ids), None, has_states=True)


@pytest.fixture
def two(request_of: Any) -> Tracked:
    request = request_of([*range(300)], request_id="two")
    return Tracked(request, TokenIds(request.all_token_ids), None, has_states=True)


def test_a_boundary_is_held_until_a_store_takes_it(at: Keeping, one: Tracked) -> None:
    at.kept.offered(one, [(1, 5, 64), (2, 6, 64), (1, 7, 96), (2, 8, 96)], 10)
    assert one.states == {64: {1: 5, 2: 6}, 96: {1: 7, 2: 8}}
    assert at.held == {5: 1, 6: 1, 7: 1, 8: 1} and at.kept.blocks == 4
    at.kept.taken(one, 95)
    assert one.states == {96: {1: 7, 2: 8}} and at.held == {7: 1, 8: 1}
    at.kept.taken(one, 96)
    assert not one.states and not at.held and not at.kept.blocks and not at.cuts


def test_half_a_set_is_not_kept_nor_what_lies_inside_of_a_block(at: Keeping, one: Tracked) -> None:
    at.kept.offered(one, [(1, 5, 64), (1, 6, 70), (2, 7, 70), (3, 8, 64)], 10)
    assert not one.states and not at.held and not at.cuts


def test_what_there_is_no_room_for_is_not_kept_and_is_counted(at: Keeping, one: Tracked) -> None:
    at.kept.offered(one, [(1, 5, 64), (2, 6, 64), (1, 7, 96), (2, 8, 96)], 3)
    assert one.states == {64: {1: 5, 2: 6}} and at.cuts == 1
    at.kept.offered(one, [(1, 9, 128), (2, 10, 128)], 1)
    assert one.states == {64: {1: 5, 2: 6}} and at.cuts == 2 and at.kept.blocks == 2


def test_the_same_boundary_again_is_the_later_one(at: Keeping, one: Tracked) -> None:
    at.kept.offered(one, [(1, 5, 64), (2, 6, 64)], 10)
    at.kept.offered(one, [(1, 7, 64), (2, 6, 64)], 10)
    assert one.states == {64: {1: 7, 2: 6}} and at.held == {6: 1, 7: 1} and at.kept.blocks == 2


def test_a_request_that_is_over_lets_go_of_its_own(at: Keeping, one: Tracked, two: Tracked) -> None:
    at.kept.offered(one, [(1, 5, 64), (2, 6, 64)], 10)
    at.kept.offered(two, [(1, 5, 64), (2, 8, 64)], 10)  # they share one of vLLM's blocks
    at.kept.dropped(one)
    at.kept.dropped(one)
    assert at.held == {5: 1, 8: 1} and not one.states and at.cuts == 0
    at.kept.dropped(two)
    assert not at.held


def test_giving_up_says_whether_vllm_gets_a_block_back(
    at: Keeping, one: Tracked, two: Tracked
) -> None:
    assert not at.kept.give_up()
    (mine, other) = at.pool.get_new_blocks(2)
    at.kept.offered(one, [(1, mine.block_id, 64), (2, other.block_id, 64)], 10)
    assert not at.kept.give_up()  # the request has them still
    assert at.cuts == 1 and at.held == {mine.block_id: 1, other.block_id: 1}
    at.kept.offered(one, [(1, mine.block_id, 64), (2, other.block_id, 64)], 10)
    at.kept.offered(two, [(1, mine.block_id, 96), (2, other.block_id, 96)], 10)
    at.pool.free_blocks([mine])
    assert at.kept.give_up()
    assert at.cuts == 3 and at.held == {other.block_id: 1} and not at.kept.blocks


def test_a_states_slot_is_its_last_tokens() -> None:
    slots = state_slots({64: 3, 96: 5, 160: 7}, 32, 64, 128)
    assert slots.tolist() == [-1] * 31 + [5 * 32 + 31] + [-1] * 32
    assert (state_slots({64: 3}, 32, 0, 64) == np.array([-1] * 63 + [127])).all()
    assert (state_slots({}, 32, 0, 32) == -1).all()


def test_a_request_of_such_a_model_leaves_one_token_to_compute(
    one: Tracked, request_of: Any
) -> None:
    assert one.wanted() == 299
    request = request_of([*range(300)], request_id="other")
    assert Tracked(request, TokenIds(request.all_token_ids), None).wanted() == 300
    one.reach = 100
    assert one.wanted() == 100
