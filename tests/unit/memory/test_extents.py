"""Free space: nothing overlaps, nothing is lost, and size never costs time."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvlayer.memory import extents as module
from kvlayer.memory.extents import Extents

PAGE = 4096


def pages_of(nbytes: int) -> int:
    return -(-max(nbytes, 1) // PAGE)


class ExtentsMachine(RuleBasedStateMachine):
    """Random requests against a map of single pages."""

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 97 * PAGE + 123
        self.extents = Extents(self.capacity)
        self.taken: dict[int, int] = {}  # offset -> pages

    @rule(nbytes=st.integers(0, 40 * PAGE))
    def allocate(self, nbytes: int) -> None:
        before = self.extents.used
        offset = self.extents.allocate(nbytes)
        if offset is None:
            assert self.extents.used == before
            assert self.largest_gap() < pages_of(nbytes), "room for it was there"
            return
        assert offset % PAGE == 0
        assert self.extents.used == before + pages_of(nbytes) * PAGE
        self.taken[offset] = pages_of(nbytes)

    @rule(choice=st.randoms(use_true_random=False))
    def release(self, choice: random.Random) -> None:
        if self.taken:
            offset = choice.choice(sorted(self.taken))
            del self.taken[offset]
            self.extents.release(offset)

    @rule(offset=st.integers(0, 97).map(lambda page: page * PAGE))
    def release_what_is_not_taken(self, offset: int) -> None:
        if offset not in self.taken:
            with pytest.raises(KeyError):
                self.extents.release(offset)

    def largest_gap(self) -> int:
        """Pages of the longest free run, page by page."""
        used = {
            page
            for offset, count in self.taken.items()
            for page in range(offset // PAGE, offset // PAGE + count)
        }
        best = run = 0
        for page in range(self.capacity // PAGE):
            run = 0 if page in used else run + 1
            best = max(best, run)
        return best

    @invariant()
    def nothing_overlaps_and_all_is_inside(self) -> None:
        at = 0
        for offset, count in sorted(self.taken.items()):
            assert offset >= at
            at = offset + count * PAGE
        assert at <= self.capacity

    @invariant()
    def accounts_are_exact(self) -> None:
        assert self.extents.used == sum(self.taken.values()) * PAGE
        assert len(self.extents) == len(self.taken)

    @invariant()
    def neighbours_are_merged(self) -> None:
        free = sorted(self.extents._free.items())
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(free))

    def teardown(self) -> None:
        for offset in list(self.taken):
            self.extents.release(offset)
        assert self.extents.used == 0
        whole = self.extents.capacity
        assert whole == self.capacity // PAGE * PAGE
        assert self.extents.allocate(whole) == 0  # one extent again


TestExtentsMachine = ExtentsMachine.TestCase


@given(
    sizes=st.lists(st.integers(1, 300 * PAGE), min_size=1, max_size=30),
    choice=st.randoms(use_true_random=False),
)
def test_releasing_everything_in_any_order_leaves_one_extent(
    sizes: list[int], choice: random.Random
) -> None:
    extents = Extents(10_000 * PAGE)
    offsets = [extents.allocate(n) for n in sizes]
    assert None not in offsets
    choice.shuffle(offsets)
    for offset in offsets:
        assert offset is not None
        extents.release(offset)
    assert extents._free == {0: 10_000}


@pytest.mark.parametrize("nbytes", [1, PAGE, 15 * PAGE, 16 * PAGE, 33 * PAGE, 1025 * PAGE])
def test_a_freed_extent_is_found_again_by_the_next_request_of_its_size(nbytes: int) -> None:
    """However many extents of the same size class, and smaller ones, were freed before it."""
    extents = Extents(1 << 30)
    smaller = max(pages_of(nbytes) - 1, 1) * PAGE
    taken = []
    for _ in range(40):  # same class, separated so that nothing merges
        taken.append(extents.allocate(smaller))
        extents.allocate(1)
    mine = extents.allocate(nbytes)
    extents.allocate(1)
    rest = extents.capacity - extents.used
    assert extents.allocate(rest) is not None
    for offset in taken:
        assert offset is not None
        extents.release(offset)
    assert mine is not None
    extents.release(mine)
    assert extents.allocate(nbytes) == mine


def test_an_exact_fit_is_taken_before_a_larger_extent_is_split() -> None:
    extents = Extents(1000 * PAGE)
    first = extents.allocate(10 * PAGE)
    extents.allocate(PAGE)
    assert first is not None
    extents.release(first)
    assert extents.allocate(10 * PAGE) == first


@pytest.mark.parametrize("capacity", [0, 1, PAGE - 1])
def test_less_than_a_page_holds_nothing(capacity: int) -> None:
    extents = Extents(capacity)
    assert extents.capacity == 0
    assert extents.allocate(1) is None


def test_more_than_the_capacity_is_refused() -> None:
    extents = Extents(8 * PAGE)
    assert extents.allocate(8 * PAGE + 1) is None
    assert extents.allocate(8 * PAGE) == 0
    assert extents.allocate(0) is None


def test_a_range_cannot_be_given_back_twice() -> None:
    extents = Extents(8 * PAGE)
    offset = extents.allocate(PAGE)
    assert offset is not None
    extents.release(offset)
    with pytest.raises(KeyError):
        extents.release(offset)
    assert extents.used == 0


class Counted(OrderedDict[Any, Any]):
    """A mapping that counts what is asked of it, iteration included."""

    steps = 0

    def __getitem__(self, key: Any) -> Any:
        Counted.steps += 1
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        Counted.steps += 1
        super().__setitem__(key, value)

    def __iter__(self) -> Any:
        for key in super().__iter__():
            Counted.steps += 1
            yield key

    def __reversed__(self) -> Any:
        for key in super().__reversed__():
            Counted.steps += 1
            yield key


def _most_steps(count: int, request: Callable[[random.Random], int]) -> int:
    """The dearest call among many, in an allocator of ``count`` fragments."""
    rng = random.Random(7)
    extents = Extents(count * 64 * PAGE)
    offsets = [extents.allocate(request(rng)) for _ in range(count)]
    for offset in offsets[::2]:
        assert offset is not None
        extents.release(offset)
    extents._free = Counted(extents._free)
    extents._free_ends = Counted(extents._free_ends)
    extents._taken = Counted(extents._taken)
    assert all(type(v) is OrderedDict for v in extents._classes.values())  # no entry outlives it
    extents._classes = {k: Counted(v) for k, v in extents._classes.items()}
    live = [o for o in offsets[1::2] if o is not None]
    dearest = 0
    for _ in range(500):
        Counted.steps = 0
        taken = extents.allocate(request(rng))
        dearest = max(dearest, Counted.steps)
        Counted.steps = 0
        extents.release(live.pop() if taken is None else taken)
        dearest = max(dearest, Counted.steps)
    return dearest


@pytest.mark.parametrize("sizes", ["one", "mixed"])
def test_a_call_costs_the_same_with_a_hundred_thousand_extents(sizes: str) -> None:
    def request(rng: random.Random) -> int:
        return 33 * PAGE if sizes == "one" else rng.randrange(32, 64) * PAGE

    assert _most_steps(100_000, request) <= _most_steps(1_000, request) + 4 <= 60


@given(pages=st.integers(1, 1 << 24))
def test_a_larger_size_class_holds_only_larger_extents(pages: int) -> None:
    assert module._size_class(pages) <= module._size_class(pages + 1)
    assert module._size_class(pages + pages // 8 + 1) > module._size_class(pages)
