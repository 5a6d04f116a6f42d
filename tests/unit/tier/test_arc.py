"""ARC: it keeps what is asked for again, learns from what it evicted, and remembers no more."""

from __future__ import annotations

import itertools
import random
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.keys import ObjectKey, Part
from kvlayer.tier.arc import ARC
from kvlayer.tier.evict import LRU

PART = Part(0, (0, 4), (0, 8))


def key(number: int) -> ObjectKey:
    return ObjectKey.of("ab" * 32, "0", sha256(b"%d" % number).digest(), 16, PART)


class Replay:
    """A cache of ``capacity`` objects that asks a policy as a tier does."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.resident: set[ObjectKey] = set()
        self.fresh = itertools.count(1000)

    def store(self, path: Sequence[ObjectKey]) -> None:
        new = [k for k in path if k not in self.resident]
        while len(self.resident) + len(new) > self.capacity:
            victim = self.policy.victim()
            assert victim is not None
            self.policy.remove(victim)
            self.resident.remove(victim)
        self.resident |= set(new)
        self.policy.admit(path)

    def request(self, path: Sequence[ObjectKey]) -> int:
        """Use what is there, store the rest; how much was there."""
        there = [k for k in path if k in self.resident]
        for k in there:
            self.policy.pin(k)
        self.policy.unpin(there)
        self.store(path)
        return len(there)


def names(policy: ARC) -> int:
    return len(policy._once_gone) + len(policy._often_gone)


def survivors(policy: EvictionPolicy, count: int) -> set[ObjectKey]:
    """What is left after ``count`` more evictions."""
    replay = Replay(policy, 0)
    for _ in range(count):
        victim = policy.victim()
        assert victim is not None
        policy.remove(victim)
        replay.resident.add(victim)
    left: set[ObjectKey] = set()
    while (victim := policy.victim()) is not None:
        left.add(victim)
        policy.remove(victim)
    return left


def test_a_scan_does_not_push_out_what_is_asked_for_again() -> None:
    hot, scan = [key(n) for n in range(5)], [key(n) for n in range(100, 200)]
    for policy, kept in ((ARC(), True), (LRU(), False)):
        cache = Replay(policy, 10)
        cache.request(hot)
        cache.request(hot)
        for k in scan:
            cache.request([k])
        assert (set(hot) <= cache.resident) is kept


def test_storing_a_prompt_in_steps_is_no_use_of_its_beginning() -> None:
    policy, prompt = ARC(), [key(n) for n in range(4)]
    for stop in range(1, 5):
        policy.admit(prompt[:stop])
    asked = key(9)
    policy.admit([asked])
    policy.touch([asked])
    policy.admit(prompt)  # the most recent of all, and still asked for by no one
    assert survivors(policy, 4) == {asked}


def test_a_lease_is_a_use_but_not_for_who_brought_the_object_up() -> None:
    policy = ARC()
    brought, leased = key(0), key(1)
    policy.admit([leased])
    policy.pin(leased)
    policy.unpin([leased])
    policy.pin(brought)
    policy.admit([brought])
    policy.unpin([brought])
    assert survivors(policy, 1) == {leased}


def test_what_comes_back_soon_after_it_was_evicted_counts_as_used_before() -> None:
    policy = ARC()
    policy.admit([key(n) for n in range(4)])
    victim = policy.victim()
    assert victim is not None
    policy.remove(victim)
    policy.admit([victim])
    policy.admit([key(9)])
    assert survivors(policy, 4) == {victim}


def test_what_was_deleted_is_not_remembered() -> None:
    policy, keys = ARC(), [key(n) for n in range(4)]
    policy.admit(keys)
    named = policy.victim()
    deleted = next(k for k in keys if k != named)
    policy.remove(deleted)
    policy.admit([deleted])
    policy.touch([keys[1]])
    assert deleted not in survivors(policy, 3)


def test_a_demoted_object_that_goes_was_evicted() -> None:
    policy, keys = ARC(), [key(n) for n in range(4)]
    policy.admit(keys)
    policy.demote(keys[2])
    policy.remove(keys[2])
    policy.admit([keys[2]])
    policy.admit([key(9)])
    assert survivors(policy, 4) == {keys[2]}


def test_what_comes_back_while_it_is_pinned_counts_as_used_before_too() -> None:
    policy, back = ARC(), key(3)
    policy.admit([key(n) for n in range(4)])
    assert policy.victim() == back
    policy.remove(back)
    policy.pin(back)
    policy.admit([back])
    policy.unpin([back])
    policy.admit([key(9)])
    assert survivors(policy, 4) == {back}


def test_what_was_used_often_is_still_known_for_it_after_it_was_pinned_and_demoted() -> None:
    policy, often, other = ARC(), key(0), key(1)
    policy.admit([often, other])
    policy.touch([often])
    policy.pin(often)
    policy.demote(often)
    policy.unpin([often])
    policy.admit([often])  # stored again: back where it was
    policy.admit([key(9)])
    assert survivors(policy, 2) == {often}


def chase(cache: Replay, policy: ARC, requests: int) -> float:
    """Ask again for what just left the list of those used once, or else for something new."""
    for _ in range(requests):
        cache.request(list(policy._once_gone)[-1:] or [key(next(cache.fresh))])
    return policy._share


def test_what_was_used_often_and_demoted_leaves_the_list_of_those() -> None:
    policy, often = ARC(), [key(n) for n in range(4)]
    cache = Replay(policy, 8)
    cache.request(often)
    cache.request(often)
    share = chase(cache, policy, 7)
    gone = next(k for k in often if k in cache.resident)
    policy.demote(gone)
    cache.request([key(50)])
    assert gone not in cache.resident
    cache.request([gone])
    assert policy._share < share


def test_the_share_of_one_list_is_at_most_everything() -> None:
    policy, often = ARC(), [key(n) for n in range(4)]
    cache = Replay(policy, 8)
    cache.request(often)
    cache.request(often)
    shares = [chase(cache, policy, 1) for _ in range(30)]
    assert max(shares) == 8


def test_the_list_whose_objects_are_missed_gets_more_room() -> None:
    policy = ARC()
    cache = Replay(policy, 10)
    often = [key(n) for n in range(8)]
    cache.request(often)
    cache.request(often)
    for n in range(100, 104):  # more are stored once than there is room for, and asked for again
        cache.request([key(n)])
    for n in range(100, 108):
        cache.request([key(n)])
    assert not set(often) <= cache.resident
    for k in often:  # now those are missed
        cache.request([k])
        cache.request([k])
    for n in range(200, 220):
        cache.request([key(n)])
    assert set(often) <= cache.resident


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
        arc = ARC()
        cache, other = Replay(arc, capacity), Replay(LRU(), capacity)
        hits = sum(cache.request([key(n)]) for n in trace)
        expected = textbook(trace, capacity)
        assert abs(hits - expected) < 0.02 * expected, (capacity, hits, expected)
        assert hits > sum(other.request([key(n)]) for n in trace)
        assert names(arc) <= capacity


class Slow:
    """The rules of ``ARC`` with lists, oldest first, and nothing clever."""

    def __init__(self) -> None:
        self.once: list[ObjectKey] = []
        self.often: list[ObjectKey] = []
        self.once_gone: list[ObjectKey] = []
        self.often_gone: list[ObjectKey] = []
        self.first: list[tuple[ObjectKey, bool]] = []
        self.pinned: dict[ObjectKey, str] = {}
        self.demoted: set[ObjectKey] = set()
        self.resident: set[ObjectKey] = set()
        self.size = 0
        self.share = 0.0
        self.is_asked = False
        self.named: ObjectKey | None = None

    def _take(self, k: ObjectKey) -> str:
        """Take a key out of wherever it is; what it was."""
        for name in ("once", "often"):
            if k in getattr(self, name):
                getattr(self, name).remove(k)
                return name
        for entry in self.first:
            if entry[0] == k:
                self.first.remove(entry)
                return "often" if entry[1] else "once"
        return ""

    def _arrive(self, k: ObjectKey) -> str:
        self.resident.add(k)
        self.size = max(self.size, len(self.resident))
        self.is_asked = False
        once, often = len(self.once_gone), len(self.often_gone)
        if k in self.once_gone:
            self.share = min(self.share + max(1, often / once), self.size)
            self.once_gone.remove(k)
        elif k in self.often_gone:
            self.share = max(self.share - max(1, once / often), 0)
            self.often_gone.remove(k)
        else:
            self._forget()
            return "once"
        return "often"

    def _forget(self) -> None:
        if self.once_gone and len(self.once + self.once_gone) > self.size:
            del self.once_gone[0]
        elif len(self.resident) + len(self.once_gone + self.often_gone) > 2 * self.size:
            if self.often_gone:
                del self.often_gone[0]
            elif self.once_gone:
                del self.once_gone[0]

    def admit(self, path: list[ObjectKey]) -> None:
        for k in path[::-1]:
            if k in self.pinned:
                if self.pinned[k] == "unknown":
                    self.pinned[k] = "arrived " + self._arrive(k)
            else:
                getattr(self, self._take(k) or self._arrive(k)).append(k)

    def touch(self, path: list[ObjectKey]) -> None:
        for k in path[::-1]:
            if self._take(k):
                self.often.append(k)

    def pin(self, k: ObjectKey) -> None:
        self.pinned.setdefault(k, self._take(k) or "unknown")

    def unpin(self, path: list[ObjectKey]) -> None:
        for k in path[::-1]:
            was = self.pinned.pop(k, None)
            if was is None:
                self.touch([k])
            elif k in self.demoted:
                self.demoted.remove(k)
                self.first.append((k, "often" in was))
            elif was == "arrived once":
                self.once.append(k)
            elif was != "unknown":
                self.often.append(k)

    def demote(self, k: ObjectKey) -> None:
        if k in self.pinned:
            if self.pinned[k] != "unknown":
                self.demoted.add(k)
        elif k in self.once or k in self.often:
            self.first.append((k, self._take(k) == "often"))

    def remove(self, k: ObjectKey) -> None:
        was_evicted = k == self.named or k in [f for f, _ in self.first]
        was = self._take(k)
        if self.pinned.pop(k, "unknown") == "unknown" and not was:
            return
        self.demoted.discard(k)
        self.named = None
        self.resident.remove(k)
        if was and was_evicted:
            (self.once_gone if was == "once" else self.often_gone).append(k)
        else:
            self.size = max(self.size - 1, len(self.resident))
        self._forget()

    def victim(self) -> ObjectKey | None:
        if not self.is_asked:
            self.is_asked = True
            self.size = len(self.resident)
            self.share = min(self.share, self.size)
        self.named = None
        if self.first:
            self.named = self.first[0][0]
        elif self.once and len(self.once) + self.size - len(self.resident) > self.share:
            self.named = self.once[0]
        elif self.often or self.once:
            self.named = (self.often or self.once)[0]
        return self.named


some_paths = st.lists(st.integers(0, 11).map(key), max_size=3, unique=True)
one_key = st.integers(0, 11).map(key)


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["admit", "admit", "touch", "unpin"]), some_paths),
            st.tuples(st.sampled_from(["pin", "demote", "remove"]), one_key),
            st.tuples(st.sampled_from(["evict", "evict", "evict"]), st.integers(1, 3)),
        ),
        max_size=80,
    )
)
@settings(max_examples=400)
def test_it_names_the_victims_of_the_same_rules_written_with_lists(
    steps: list[tuple[str, Any]],
) -> None:
    real, slow = ARC(), Slow()
    for what, argument in steps:
        if what == "evict":
            for _ in range(argument):
                victim = real.victim()
                assert victim == slow.victim()
                if victim is not None:
                    real.remove(victim)
                    slow.remove(victim)
        else:
            getattr(real, what)(argument)
            getattr(slow, what)(argument)
        assert real._resident == len(slow.resident)
        assert real._share == slow.share
        assert [*real._once_gone] == slow.once_gone
        assert [*real._often_gone] == slow.often_gone
    while (victim := slow.victim()) is not None:
        assert real.victim() == victim
        real.remove(victim)
        slow.remove(victim)


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
    policy = ARC()
    cache = Replay(policy, 8)
    for what, argument in steps:
        if what == "request":
            cache.request([key(n) for n in argument])
        elif what == "delete":
            policy.remove(key(argument))
            cache.resident.discard(key(argument))
        else:
            policy.demote(key(argument))
        assert len(cache.resident) == policy._resident
        assert names(policy) + policy._resident <= 16
        assert not (policy._once_gone.keys() | policy._often_gone.keys()) & cache.resident
        assert 0 <= policy._share <= 8
    policy.touch(list(cache.resident))  # nothing is demoted any more
    for k in list(cache.resident):
        policy.remove(k)
    assert names(policy) <= 1  # the one that was named last


def test_a_thousand_cold_names_make_way_for_larger_objects() -> None:
    """Capacity is bytes: the same tier holds fewer objects when they are larger."""
    policy = ARC()
    small, large = Replay(policy, 1000), Replay(policy, 100)
    for n in range(3000):
        small.request([key(n)])
    assert names(policy) <= 1000
    large.resident = small.resident
    for n in range(5000, 6000):
        large.request([key(n)])
    assert names(policy) <= 100
