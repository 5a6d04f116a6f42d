"""Tier 0: pins hold, accounts are exact, and no byte has two owners."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.eviction.arc import ARC
from kvlayer.eviction.lru import LRU, PrefixLRU
from kvlayer.identity.keys import ObjectKey, Part, Span
from kvlayer.payload import align
from kvlayer.tier.planner.directory import Directory
from kvlayer.tier.planner.host import HostTier
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.strand import Held, flat

PAGE = 4096
PART = Part(0, (0, 4), (0, 2))


def span(number: int) -> Span:
    return Span(0, 16, sha256(b"%d" % number).digest())


class Small:
    """A host tier of a few pages."""

    def __init__(self, pages: int = 4, policy: type[EvictionPolicy] = PrefixLRU) -> None:
        self.directory = Directory([PART])
        self.host = HostTier(pages * PAGE, policy, self.directory)
        self.evicted: list[ObjectRecord] = []

    def reserve(self, number: int, nbytes: int = PAGE) -> ObjectRecord | None:
        found = self.directory.ensure("ab" * 32, span(number), "0", PART)
        if self.host.reserve(found, nbytes, self.evicted, 0.0):
            return found
        self.directory.forget(found)
        return None

    def add(self, number: int, nbytes: int = PAGE) -> ObjectRecord:
        """A ready object that nobody holds."""
        found = self.reserve(number, nbytes)
        assert found is not None
        self.host.commit([found])
        self.host.let_go([found])
        return found

    def named(self) -> ObjectRecord | None:
        """Whom the order names, held or not."""
        row = self.host.order.victim(0.0)
        return None if row is None else self.host._records[row]

    def order(self) -> list[ObjectRecord]:
        """What goes, in this order, until nothing may go any more; it is gone then."""
        gone: list[ObjectRecord] = []
        while (victim := self.host.victim(0.0)) is not None:
            self.host.drop(victim)
            gone.append(victim)
        return gone


def test_the_least_recently_used_object_goes_first() -> None:
    small = Small()
    records = [small.add(n) for n in range(4)]
    small.host.pin(records[:1])
    small.host.unpin(records[:1])  # a use
    small.add(4)
    assert small.evicted == [records[1]]
    assert records[1].host is HostState.ABSENT
    assert small.directory.find(span_key(1)) is None


def test_a_pinned_object_is_never_evicted() -> None:
    small = Small()
    records = [small.add(n) for n in range(4)]
    small.host.pin(records)
    assert small.reserve(4) is None
    assert small.evicted == []
    small.host.unpin(records[2:3])
    assert small.reserve(4) is not None
    assert small.evicted == [records[2]]


def test_a_reserved_object_is_never_evicted() -> None:
    small = Small(pages=2)
    first, second = small.reserve(0), small.reserve(1)
    assert first is not None
    assert second is not None
    assert small.reserve(2) is None
    small.host.commit([first])
    assert small.reserve(2) is None  # ready, but still held by its writer
    small.host.let_go([first])
    assert small.reserve(2) is not None


def test_nothing_is_given_up_for_what_cannot_fit_anyway() -> None:
    small = Small()
    records = [small.add(n) for n in range(4)]
    assert small.reserve(9, 5 * PAGE) is None
    small.host.pin(records[:2])
    assert small.reserve(9, 3 * PAGE) is None  # two pages are pinned: no eviction can help
    assert small.evicted == []
    assert all(r.host is HostState.READY for r in records)


def test_a_pin_on_an_absent_object_holds_its_record_until_it_is_let_go() -> None:
    small = Small()
    found = small.directory.ensure("ab" * 32, span(1), "0", PART)
    small.host.pin([found])
    assert small.host.pinned_nbytes == 0
    assert small.directory.find(span_key(1)) is found
    small.host.unpin([found])
    assert small.directory.find(span_key(1)) is None


def test_bytes_that_arrive_for_a_pinned_absent_object_count_as_pinned() -> None:
    small = Small()
    found = small.directory.ensure("ab" * 32, span(1), "0", PART)
    small.host.pin([found])
    assert small.host.reserve(found, PAGE, [], 0.0)
    assert small.host.pinned_nbytes == PAGE
    small.host.commit([found])
    small.host.let_go([found])
    assert small.host.pinned_nbytes == PAGE
    small.host.unpin([found])
    assert small.host.pinned_nbytes == 0


def test_pins_outlive_bytes_that_never_came() -> None:
    """A fetch failed while someone else held the object: the record stays, the bytes do not."""
    small = Small()
    found = small.reserve(1)
    assert found is not None
    small.host.pin([found])
    small.host.drop(found)
    small.host.let_go([found])
    assert (small.host.pinned_nbytes, small.host.extents.used) == (0, 0)
    assert small.directory.find(span_key(1)) is found
    assert small.reserve(1) is found
    small.host.drop(found)
    small.host.let_go([found])
    small.host.unpin([found])
    assert small.directory.find(span_key(1)) is None


def test_pins_on_an_old_record_leave_the_new_one_alone() -> None:
    """A match held a record; it was evicted and stored again before the match was pinned."""
    small = Small()
    old = small.add(1)
    small.host.drop(old)
    small.host.hold([old])
    small.host.pin([old])
    assert small.host.pinned_nbytes == 0
    new = small.add(1)
    assert new is not old
    small.host.pin([new])
    small.host.unpin([old])
    assert small.directory.find(span_key(1)) is new
    assert new.host is HostState.READY
    assert small.named() is None  # still leased
    small.host.unpin([new])
    small.host.take(new)
    small.host.let_go([old])
    assert small.host.is_leaving(new)
    assert small.host.pinned_nbytes == PAGE
    small.host.let_go([new])
    assert small.named() is new


# -- holds: a move says nothing about an object's worth ------------------------------------------


def test_holding_an_object_is_no_use_of_it() -> None:
    small = Small()
    records = [small.add(n) for n in range(4)]
    small.host.hold(records[:2])
    small.host.let_go(records[:2])
    assert small.order() == records


def test_write_back_does_not_turn_a_prompt_round() -> None:
    """Each object is held until it is written; which write ends last must not matter."""
    small = Small()
    path = [small.add(n) for n in range(4)]
    small.host.refresh(path)
    small.host.hold(path)
    for found in path:
        small.host.let_go([found])
    assert small.order() == path[::-1]


@pytest.mark.parametrize("policy", [PrefixLRU, LRU, ARC])
def test_what_was_passed_over_while_it_was_held_goes_first_and_in_the_same_order(
    policy: type[EvictionPolicy],
) -> None:
    expected = Small(policy=policy)
    for n in range(4):
        expected.add(n)
    names = [found.key for found in expected.order()]

    small = Small(policy=policy)
    records = [small.add(n) for n in range(4)]
    held = [found for found in records if found.key in names[:3]]
    small.host.hold(held)
    assert small.host.victim(0.0) is next(f for f in records if f.key == names[3])
    assert small.host.aside_nbytes == 3 * PAGE
    late = small.reserve(9)
    assert late is not None
    small.host.commit([late])
    small.host.let_go([late])
    small.host.let_go(held[::-1])
    assert small.host.aside_nbytes == 0
    assert [found.key for found in small.order()][:3] == names[:3]


def test_a_lease_on_what_is_on_its_way_out_brings_it_back() -> None:
    small = Small()
    records = [small.add(n) for n in range(3)]
    small.host.take(records[0])
    assert small.host.is_leaving(records[0])
    small.host.pin(records[:1])
    assert not small.host.is_leaving(records[0])
    assert small.host.aside_nbytes == 0
    small.host.unpin(records[:1])
    assert not small.host.is_leaving(records[0])
    small.host.let_go(records[:1])
    assert small.order() == [records[1], records[2], records[0]]


def test_two_moves_hold_an_object_until_the_second_has_ended() -> None:
    small = Small(pages=2)
    records = [small.add(n) for n in range(2)]
    small.host.take(records[0])
    small.host.hold(records[:1])
    small.host.let_go(records[:1])
    assert small.host.is_leaving(records[0])
    assert small.order() == records[1:]
    small.host.let_go(records[:1])
    assert not small.host.is_leaving(records[0])
    assert small.order() == records[:1]


def test_a_lease_outlives_the_hold_beside_it() -> None:
    small = Small(pages=2)
    records = [small.add(n) for n in range(2)]
    small.host.hold(records[:1])
    small.host.pin(records[:1])
    small.host.let_go(records[:1])
    assert small.order() == records[1:]
    small.host.unpin(records[:1])
    assert small.order() == records[:1]


def test_who_waits_for_an_object_is_not_counted_as_its_second_user() -> None:
    """Under ARC an object that one request loaded and used was used once."""
    small = Small(pages=3, policy=ARC)
    waited = small.directory.ensure("ab" * 32, span(0), "0", PART)
    small.host.pin([waited])
    assert small.host.reserve(waited, PAGE, [], 0.0)
    small.host.commit([waited])
    small.host.let_go([waited])
    assert small.named() is None
    small.host.unpin([waited])
    asked = small.add(1)
    small.host.pin([asked])
    small.host.unpin([asked])
    late = small.add(2)
    assert small.order() == [waited, late, asked]


def test_a_path_of_which_a_part_was_waited_for_still_loses_its_end_first() -> None:
    small = Small()
    path = [small.directory.ensure("ab" * 32, span(n), "0", PART) for n in range(3)]
    small.host.pin(path)
    for found in (path[1], path[0], path[2]):
        assert small.host.reserve(found, PAGE, [], 0.0)
    small.host.commit([path[0], path[2]])
    small.host.let_go([path[0], path[2]])
    small.host.unpin([path[0], path[2]])  # their arrival is over; the middle is still to come
    small.host.pin([path[0], path[2]])
    small.host.commit([path[1]])
    small.host.let_go([path[1]])
    small.host.unpin(path)
    assert small.order() == path[::-1]


def test_what_is_dropped_while_it_is_held_is_not_on_its_way_any_more() -> None:
    small = Small()
    found = small.add(1)
    small.host.take(found)
    small.host.drop(found)
    assert not small.host.is_leaving(found)
    assert (small.host.aside_nbytes, small.host.pinned_nbytes, len(small.host)) == (0, 0, 0)
    small.host.let_go([found])
    assert small.directory.find(span_key(1)) is None
    assert small.named() is None


def test_a_store_of_a_prompt_refreshes_only_what_is_there() -> None:
    small = Small()
    ready = [small.add(n) for n in range(2)]
    filling = small.reserve(2)
    absent = small.directory.ensure("ab" * 32, span(3), "0", PART)
    assert filling is not None
    small.host.refresh([ready[0], filling, absent])
    assert small.named() is ready[1]
    assert small.order() == [ready[1], ready[0]]


def span_key(number: int) -> ObjectKey:
    return ObjectKey.of("ab" * 32, "0", span(number).hash, 16, PART)


class HostMachine(RuleBasedStateMachine):
    """Random pins, reservations, evictions and drops against a model."""

    policy: type[EvictionPolicy] = PrefixLRU
    pages = 9

    def __init__(self) -> None:
        super().__init__()
        self.small = Small(self.pages, self.policy)
        self.host = self.small.host
        self.leased: list[ObjectRecord] = []
        """One entry per pin that a test took."""
        self.paths: list[list[Held]] = []
        """Leases of whole paths; their objects are in ``leased``, too."""
        self.found: list[Held] = []
        self.held: list[ObjectRecord] = []
        """One entry per hold that a test took."""
        self.filling: dict[int, ObjectRecord] = {}
        self.known: dict[int, ObjectRecord] = {}

    @rule(number=st.integers(0, 7), pages=st.integers(1, 4), odd=st.booleans())
    def reserve(self, number: int, pages: int, odd: bool) -> None:
        found = self.small.directory.ensure("ab" * 32, span(number), "0", PART)
        self.known[number] = found
        if found.host is not HostState.ABSENT:
            return
        before = {
            r.key: r
            for r in self.small.directory.objects()
            if r.host is HostState.READY and not r.pins
        }
        evicted: list[ObjectRecord] = []
        made = self.host.reserve(found, pages * PAGE - (5 if odd else 0), evicted, 0.0)
        assert {r.key for r in evicted} <= set(before)
        assert all(r.host is HostState.ABSENT for r in evicted)
        if made:
            self.filling[number] = found
        else:
            self.small.directory.forget(found)

    @rule(choice=st.randoms(use_true_random=False), ok=st.booleans())
    def end(self, choice: random.Random, ok: bool) -> None:
        if self.filling:
            found = self.filling.pop(choice.choice(sorted(self.filling)))
            if ok:
                self.host.commit([found])
            else:
                self.host.drop(found)
            self.host.let_go([found])

    @rule(number=st.integers(0, 7))
    def pin(self, number: int) -> None:
        """Whatever record a test remembers, also one that was forgotten meanwhile."""
        found = self.known.get(number)
        if found is not None:
            self.host.pin([found])
            self.leased.append(found)

    @rule(choice=st.randoms(use_true_random=False))
    def unpin(self, choice: random.Random) -> None:
        own = list(self.leased)
        for found in flat([each for path in self.paths for each in path]):
            own.remove(found)
        if own:
            found = choice.choice(own)
            self.leased.remove(found)
            self.host.unpin([found])

    def leading(self, count: int) -> list[Held]:
        """What is ready of a prompt of numbers 0 to ``count - 1``."""
        hashes = [span(n).hash for n in range(count)]
        found, _, _ = self.small.directory.leading(
            "ab" * 32, hashes, 16, "0", range(count), most=count
        )
        return found

    @rule(count=st.integers(1, 8), late=st.booleans())
    def lease(self, count: int, late: bool) -> None:
        """Also what was found a while ago: strands may have been parted or dissolved since."""
        first = self.found if late else self.leading(count)
        assert late or flat(first) == [self.known[n] for n in range(len(flat(first)))], (
            "a strand is what its objects are"
        )
        held, nbytes = self.host.lease(first, [])
        assert flat(held) == flat(first)
        assert nbytes == sum(
            found.nbytes for found in flat(held) if found.host is not HostState.ABSENT
        )
        self.paths.append(held)
        self.leased += flat(held)

    @rule(count=st.integers(1, 8))
    def find(self, count: int) -> None:
        self.found = self.leading(count)

    @rule(count=st.integers(1, 8))
    def string(self, count: int) -> None:
        assert flat(self.host.string(self.leading(count))) == flat(self.leading(count))

    @rule(choice=st.randoms(use_true_random=False), apart=st.booleans())
    def unlease(self, choice: random.Random, apart: bool) -> None:
        """As a whole; or as pins of its objects, which others let go of one by one."""
        if not self.paths:
            return
        held = self.paths.pop(choice.randrange(len(self.paths)))
        if apart:
            assert self.host.taken_apart(held) == flat(held)
            return
        self.host.unlease(held)
        for found in flat(held):
            self.leased.remove(found)

    @invariant()
    def a_strand_counts_what_its_objects_have(self) -> None:
        for strand in {r.strand for r in self.resident() if r.strand is not None}:
            assert all(found.strand is strand for found in strand.records)
            assert strand.own == sum(found.own for found in strand.records)
            assert [*strand.rows] == [found.row for found in strand.records]
            assert strand.nbytes == sum(found.nbytes for found in strand.records)

    @rule(choice=st.randoms(use_true_random=False))
    def hold(self, choice: random.Random) -> None:
        ready = [r for r in self.resident() if r.host is HostState.READY]
        if ready:
            self.held.append(choice.choice(ready))
            self.host.hold(self.held[-1:])

    @rule()
    def take(self) -> None:
        victim = self.host.victim(0.0)
        if victim is not None:
            self.host.take(victim)
            self.held.append(victim)

    @rule(choice=st.randoms(use_true_random=False), count=st.integers(1, 3))
    def let_go(self, choice: random.Random, count: int) -> None:
        choice.shuffle(self.held)
        self.host.let_go(self.held[:count])
        del self.held[:count]

    @rule(path=st.lists(st.integers(0, 7), unique=True))
    def refresh(self, path: list[int]) -> None:
        records = [self.small.directory.find(span_key(number)) for number in path]
        self.host.refresh([found for found in records if found is not None])

    @rule(choice=st.randoms(use_true_random=False))
    def drop(self, choice: random.Random) -> None:
        idle = [
            r for r in self.small.directory.objects() if r.host is HostState.READY and not r.pins
        ]
        if idle:
            self.host.drop(choice.choice(idle))

    def resident(self) -> list[ObjectRecord]:
        return [r for r in self.small.directory.objects() if r.host is not HostState.ABSENT]

    @invariant()
    def pinned_objects_are_still_there(self) -> None:
        for found in self.filling.values():
            assert found.host is HostState.FILLING
        resident = {id(r) for r in self.resident()}
        assert all(id(r) in resident for r in self.filling.values())

    @invariant()
    def accounts_are_exact(self) -> None:
        resident = self.resident()
        assert len(self.host) == len(resident)
        assert self.host.extents.used == sum(align(r.nbytes) for r in resident)
        assert self.host.pinned_nbytes == sum(r.nbytes for r in resident if r.pins)
        for found in resident:
            holds = sum(found is r for r in self.held) + (found in self.filling.values())
            assert found.held == holds
            assert found.pins == holds + sum(found is r for r in self.leased)

    @invariant()
    def no_byte_has_two_owners(self) -> None:
        at = 0
        for found in sorted(self.resident(), key=lambda r: r.offset):
            assert found.offset >= at
            at = found.offset + align(found.nbytes)
        assert at <= self.pages * PAGE

    @invariant()
    def what_is_aside_is_held_and_not_leased(self) -> None:
        aside = [r for r in self.resident() if self.host.is_leaving(r)]
        assert all(r.held and r.pins == r.held and r.host is HostState.READY for r in aside)
        assert self.host.aside_nbytes == sum(align(r.nbytes) for r in aside)
        assert len(self.host._aside) == len(aside)

    @invariant()
    def the_policy_names_what_is_ready_and_not_leased(self) -> None:
        """What a move holds it may name: the host passes over it then."""
        free = [
            r
            for r in self.resident()
            if r.host is HostState.READY and r.pins == r.held and not self.host.is_leaving(r)
        ]
        victim = self.small.named()
        assert (victim in free) if free else (victim is None)

    @rule()
    def the_victim_is_ready_and_nobody_has_it(self) -> None:
        idle = [r for r in self.resident() if r.host is HostState.READY and not r.pins]
        victim = self.host.victim(0.0)
        assert (victim in idle) if idle else (victim is None)

    def teardown(self) -> None:
        for number in list(self.filling):
            found = self.filling.pop(number)
            self.host.commit([found])
            self.host.let_go([found])
        self.host.let_go(self.held)
        for path in self.paths:
            self.host.unlease(path)
            for found in flat(path):
                self.leased.remove(found)
        while self.leased:
            self.host.unpin([self.leased.pop()])
        assert self.host.pinned_nbytes == 0
        everything = self.pages * PAGE
        assert self.small.reserve(99, everything) is not None  # all of it can be had again


class LRUMachine(HostMachine):
    policy = LRU


class ARCMachine(HostMachine):
    policy = ARC


HostMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50)
LRUMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=50)
ARCMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=50)
TestHostMachine = HostMachine.TestCase
TestLRUMachine = LRUMachine.TestCase
TestARCMachine = ARCMachine.TestCase


@pytest.mark.parametrize("fail", [True, False])
def test_no_slot_is_used_twice_after_a_failed_fill(fail: bool) -> None:
    small = Small(pages=2)
    first, second = small.reserve(0), small.reserve(1)
    assert first is not None
    assert second is not None
    if fail:
        small.host.drop(first)
    else:
        small.host.commit([first])
    small.host.let_go([first])
    third = small.reserve(2)
    assert third is not None
    assert third.offset != second.offset
