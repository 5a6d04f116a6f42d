"""ARC: it keeps what is asked for again, learns from what it evicted, and remembers no more."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from policies import calls, play

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.abc.rows import Rows
from kvlayer.eviction.arc import ARC
from kvlayer.eviction.lru import LRU
from kvlayer.testing.suites.policy import PlayedPolicy


class Replay(PlayedPolicy):
    """A cache of ``capacity`` objects that asks a policy as a tier does."""

    def __init__(self, policy: type[EvictionPolicy], capacity: int) -> None:
        super().__init__(policy)
        self.capacity = capacity
        self.fresh = itertools.count(1000)

    @property
    def arc(self) -> ARC:
        assert isinstance(self.policy, ARC)
        return self.policy

    def request(self, path: Sequence[int]) -> int:
        """Use what is there, store the rest; how much was there."""
        there = [name for name in path if name in self.resident]
        self.pin(there)
        self.unpin(there, used=True)
        new = len(path) - len(there)
        while len(self.resident) + new > self.capacity:
            victim = self.victim()
            assert victim is not None
            self.lose(victim, evicted=True)
            new = len([name for name in path if name not in self.resident])
        self.store(path)
        return len(there)

    def delete(self, name: int) -> None:
        self.lose(name, evicted=False)

    def survivors(self, count: int) -> set[int]:
        """What is left after ``count`` more evictions."""
        for _ in range(count):
            victim = self.victim()
            assert victim is not None
            self.lose(victim, evicted=True)
        return set(self.resident)


def names(policy: ARC) -> int:
    return len(policy._once_gone) + len(policy._often_gone)


def remembered(names: Any) -> list[int]:
    """The names that are remembered, the oldest first."""
    return [names._names[place] for place in names._order.rows()]


def test_a_scan_does_not_push_out_what_is_asked_for_again() -> None:
    hot = range(5)
    for policy, kept in ((ARC, True), (LRU, False)):
        cache = Replay(policy, 10)
        cache.request(hot)
        cache.request(hot)
        for name in range(100, 200):
            cache.request([name])
        assert (set(hot) <= cache.resident.keys()) is kept


def test_storing_a_prompt_in_steps_is_no_use_of_its_beginning() -> None:
    cache = Replay(ARC, 10)
    for stop in range(1, 5):
        cache.store(range(stop))
    cache.store([9])
    cache.use([9])
    cache.store(range(4))  # the most recent of all, and still asked for by no one
    assert cache.survivors(4) == {9}


def test_a_lease_is_a_use_but_not_for_who_brought_the_object_up() -> None:
    cache = Replay(ARC, 10)
    for name, used in ((0, False), (1, True)):
        cache.store([name])
        cache.pin([name])
        cache.unpin([name], used=used)
    assert cache.survivors(1) == {1}


def test_what_comes_back_soon_after_it_was_evicted_counts_as_used_before() -> None:
    cache = Replay(ARC, 10)
    cache.store(range(4))
    victim = cache.victim()
    assert victim is not None
    cache.lose(victim, evicted=True)
    cache.store([victim])
    cache.store([9])
    assert cache.survivors(4) == {victim}


def test_what_was_deleted_is_not_remembered() -> None:
    cache = Replay(ARC, 10)
    cache.store(range(4))
    named = cache.victim()
    deleted = next(name for name in range(4) if name != named)
    cache.delete(deleted)
    assert names(cache.arc) == 0
    cache.store([deleted])
    cache.use([1])
    assert deleted not in cache.survivors(3)


def test_what_comes_back_and_is_pinned_counts_as_used_before_too() -> None:
    cache = Replay(ARC, 10)
    cache.store(range(4))
    assert cache.victim() == 3
    cache.lose(3, evicted=True)
    cache.store([3])
    cache.pin([3])
    cache.unpin([3], used=False)
    cache.store([9])
    assert cache.survivors(4) == {3}


def test_what_was_used_often_is_still_known_for_it_after_it_was_pinned() -> None:
    cache = Replay(ARC, 10)
    cache.store([0, 1])
    cache.use([0])
    cache.pin([0])
    cache.unpin([0], used=False)
    cache.store([9])
    assert cache.survivors(2) == {0}


def chase(cache: Replay, requests: int) -> float:
    """Ask again for what just left the list of those used once, or else for something new."""
    for _ in range(requests):
        cache.request(remembered(cache.arc._once_gone)[-1:] or [next(cache.fresh)])
    return cache.arc._share


def test_what_was_used_often_and_was_pinned_leaves_the_list_of_those() -> None:
    cache = Replay(ARC, 8)
    cache.request(range(4))
    cache.request(range(4))
    share = chase(cache, 7)
    gone = next(name for name in range(4) if name in cache.resident)
    cache.lose(gone, evicted=True)
    cache.request([gone])
    assert cache.arc._share < share


def test_the_share_of_one_list_is_at_most_everything() -> None:
    cache = Replay(ARC, 8)
    cache.request(range(4))
    cache.request(range(4))
    shares = [chase(cache, 1) for _ in range(30)]
    assert max(shares) == 8


def test_the_list_whose_objects_are_missed_gets_more_room() -> None:
    cache = Replay(ARC, 10)
    often = range(8)
    cache.request(often)
    cache.request(often)
    for n in range(100, 104):  # more are stored once than there is room for, and asked for again
        cache.request([n])
    for n in range(100, 108):
        cache.request([n])
    assert not set(often) <= cache.resident.keys()
    for n in often:  # now those are missed
        cache.request([n])
        cache.request([n])
    for n in range(200, 220):
        cache.request([n])
    assert set(often) <= cache.resident.keys()


def textbook(trace: Sequence[int], capacity: int) -> int:
    """Hits of the algorithm as the paper prints it (figure 4)."""
    t1: OrderedDict[int, None] = OrderedDict()
    t2, b1, b2 = t1.copy(), t1.copy(), t1.copy()
    share, hits = 0.0, 0

    def replace(x: int) -> None:
        if t1 and (len(t1) > share or (x in b2 and len(t1) == share)):
            b1[t1.popitem(last=False)[0]] = None
        else:
            b2[t2.popitem(last=False)[0]] = None

    for x in trace:
        if x in t1 or x in t2:
            hits += 1
            t1.pop(x, None)
        elif x in b1:
            share = min(capacity, share + max(1, len(b2) / len(b1)))
            replace(x)
            del b1[x]
        elif x in b2:
            share = max(0, share - max(1, len(b1) / len(b2)))
            replace(x)
            del b2[x]
        else:
            if len(t1) + len(b1) == capacity:
                if len(t1) < capacity:
                    b1.popitem(last=False)
                    replace(x)
                else:
                    t1.popitem(last=False)
            elif len(t1) + len(t2) + len(b1) + len(b2) >= capacity:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * capacity:
                    b2.popitem(last=False)
                if len(t1) + len(t2) >= capacity:
                    replace(x)
            t1[x] = None
            continue
        t2[x] = None
        t2.move_to_end(x)
    return hits


def test_it_hits_as_often_as_the_algorithm_of_the_paper() -> None:
    rng = random.Random(7)
    trace: list[int] = []
    for n in range(400):  # some are popular, some come once, some come again after a while
        trace += [int(rng.paretovariate(0.7)) % 500 for _ in range(20)]
        trace += range(10_000 + 30 * n, 10_030 + 30 * n)
        trace += range(10_000 + 30 * max(n - 3, 0), 10_005 + 30 * max(n - 3, 0))
    for capacity in (40, 100, 250):
        cache, other = Replay(ARC, capacity), Replay(LRU, capacity)
        hits = sum(cache.request([n]) for n in trace)
        expected = textbook(trace, capacity)
        assert abs(hits - expected) < 0.02 * expected, (capacity, hits, expected)
        assert hits > sum(other.request([n]) for n in trace)
        assert names(cache.arc) <= capacity


class Slow(EvictionPolicy):
    """The rules of ``ARC`` with lists, oldest first, and nothing clever."""

    name = "slow"

    def __init__(self, rows: Rows, /) -> None:
        super().__init__(rows)
        self.once: list[int] = []
        self.often: list[int] = []
        self.once_gone: list[int] = []
        self.often_gone: list[int] = []
        self.pinned: dict[int, str] = {}
        self.resident = 0
        self.size = 0
        self.share = 0.0
        self.is_asked = False

    def admit(self, path: Sequence[int], /) -> None:
        for row in path[::-1]:
            self._arrive(row).append(row)

    def _arrive(self, row: int) -> list[int]:
        self.resident += 1
        self.size = max(self.size, self.resident)
        self.is_asked = False
        once, often, name = len(self.once_gone), len(self.often_gone), self.rows.names[row]
        if name in self.once_gone:
            self.share = min(self.share + max(1, often / once), self.size)
            self.once_gone.remove(name)
        elif name in self.often_gone:
            self.share = max(self.share - max(1, once / often), 0)
            self.often_gone.remove(name)
        else:
            self._forget()
            return self.once
        return self.often

    def _forget(self) -> None:
        while self.once_gone and len(self.once + self.once_gone) > self.size:
            del self.once_gone[0]
        while self.resident + len(self.once_gone + self.often_gone) > 2 * self.size:
            if not self.often_gone + self.once_gone:
                break
            del (self.often_gone or self.once_gone)[0]

    def refresh(self, path: Sequence[int], /) -> None:
        self.pin(path)
        self.unpin(path, used=False)

    def touch(self, path: Sequence[int], /) -> None:
        self.pin(path)
        self.unpin(path, used=True)

    def pin(self, path: Sequence[int], /) -> None:
        for row in path:
            self.pinned[row] = "once" if row in self.once else "often"
            getattr(self, self.pinned[row]).remove(row)

    def unpin(self, path: Sequence[int], /, *, used: bool) -> None:
        for row in path[::-1]:
            was = self.pinned.pop(row)
            getattr(self, "often" if used else was).append(row)

    def remove(self, row: int, /, *, evicted: bool) -> None:
        was = self.pinned.pop(row)
        if evicted and not self.is_asked:
            self.is_asked = True
            self.size = self.resident
            self.share = min(self.share, self.size)
        self.resident -= 1
        if evicted:
            (self.once_gone if was == "once" else self.often_gone).append(self.rows.names[row])
        else:
            self.size = max(self.size - 1, self.resident)
        self._forget()

    def victim(self) -> int | None:
        size = self.size if self.is_asked else self.resident
        if self.once and len(self.once) + size - self.resident > min(self.share, size):
            return self.once[0]
        return next(iter(self.often or self.once), None)


@given(calls=calls)
@settings(max_examples=200)
def test_it_names_the_victims_of_the_same_rules_written_with_lists(
    calls: list[tuple[Any, ...]],
) -> None:
    def same(real: Any, slow: Any) -> None:
        assert real._resident == slow.resident
        assert real._share == slow.share
        assert (real._once, real._often) == (len(slow.once), len(slow.often))
        assert remembered(real._once_gone) == slow.once_gone
        assert remembered(real._often_gone) == slow.often_gone

    play(ARC, Slow, calls, same)


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("request"), st.lists(st.integers(0, 60), max_size=6, unique=True)),
            st.tuples(st.just("delete"), st.integers(0, 60)),
            st.tuples(st.just("demote"), st.integers(0, 60)),
        ),
        max_size=150,
    )
)
def test_no_more_names_are_remembered_than_there_were_objects(
    steps: list[tuple[str, Any]],
) -> None:
    cache = Replay(ARC, 8)
    policy = cache.arc
    for what, argument in steps:
        if what == "request":
            cache.request(argument)
        elif what == "delete":
            cache.delete(argument)
        elif argument in cache.resident:  # for a policy, what was demoted is pinned
            cache.pin([argument])
            cache.unpin([argument], used=False)
        assert len(cache.resident) == policy._resident
        assert names(policy) + policy._resident <= 16
        gone = remembered(policy._once_gone) + remembered(policy._often_gone)
        assert not set(gone) & cache.resident.keys()
        assert 0 <= policy._share <= 8
    for name in list(cache.resident):
        cache.delete(name)
    assert names(policy) <= 1  # what was evicted last may still be waited for


def test_a_thousand_cold_names_make_way_for_larger_objects() -> None:
    """Capacity is bytes: the same tier holds fewer objects when they are larger."""
    cache = Replay(ARC, 1000)
    for n in range(3000):
        cache.request([n])
    assert names(cache.arc) <= 1000
    cache.capacity = 100
    for n in range(5000, 6000):
        cache.request([n])
    assert names(cache.arc) <= 100
