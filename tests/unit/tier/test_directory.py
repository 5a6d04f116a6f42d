"""The directory: what is where, and nothing that is nowhere."""

from __future__ import annotations

import gc
import tracemalloc
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvlayer.identity.keys import ObjectKey, Part, Span
from kvlayer.retention import Retention
from kvlayer.tier.planner import plan
from kvlayer.tier.planner.copies import Copy, copy_of, of_tier
from kvlayer.tier.planner.directory import Directory
from kvlayer.tier.planner.records import HostState, ObjectRecord

NAMESPACE = "ab" * 32
WHOLE, LOW, HIGH = Part(0, (0, 4), (0, 2)), Part(0, (0, 4), (0, 1)), Part(0, (0, 4), (1, 2))
STATE = Part(1, (0, 1), None)
NEEDS = [WHOLE, STATE]


def span(number: int) -> Span:
    return Span(0, 16, sha256(b"%d" % number).digest())


def key(number: int, part: Part = WHOLE) -> ObjectKey:
    return ObjectKey.of(NAMESPACE, "0", span(number).hash, 16, part)


@pytest.fixture
def directory() -> Directory:
    return Directory(NEEDS)


def host(directory: Directory, number: int, part: Part) -> ObjectRecord:
    found = directory.ensure(NAMESPACE, span(number), "0", part)
    directory.fill(found, 0, 4096)
    directory.ready(found)
    return found


def test_an_object_is_served_only_once_its_bytes_are_there(directory: Directory) -> None:
    found = directory.ensure(NAMESPACE, span(1), "0", WHOLE)
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0") == [None, None]
    directory.fill(found, 8192, 4096)
    assert not found.is_ready
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0") == [None, None]
    directory.ready(found)
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0") == [(found,), None]
    assert directory.drop_host(found) == 8192
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0") == [None, None]


def test_a_record_that_nothing_refers_to_is_forgotten(directory: Directory) -> None:
    found = host(directory, 1, WHOLE)
    directory.drop_host(found)
    assert len(directory) == 0
    assert directory.chunk(NAMESPACE, span(1).hash, 16, "0") is None
    assert directory.ensure(NAMESPACE, span(1), "0", WHOLE) is not found


@pytest.mark.parametrize("why", ["pins", "writing", "tiers"])
def test_a_record_that_something_refers_to_is_kept(directory: Directory, why: str) -> None:
    found = host(directory, 1, WHOLE)
    setattr(found, why, 2)
    directory.drop_host(found)
    assert directory.find(key(1)) is found
    setattr(found, why, 0)
    directory.forget(found)
    assert len(directory) == 0


def test_forgetting_an_old_record_leaves_the_new_one_alone(directory: Directory) -> None:
    """Someone held a record while it was forgotten and made anew."""
    old = host(directory, 1, WHOLE)
    directory.drop_host(old)
    new = host(directory, 1, WHOLE)
    directory.forget(old)
    directory.drop_tier(old, 1)
    assert directory.find(key(1)) is new
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0")[0] == (new,)


def test_the_nearest_tier_serves(directory: Directory) -> None:
    directory.note(key(1), 3)
    found = directory.find(key(1))
    assert found is not None
    assert found.tier == 3
    directory.note(key(1), 1)
    assert found.tier == 1
    directory.fill(found, 0, 4096)
    assert found.tier == 1
    directory.ready(found)
    assert found.tier == 0
    directory.drop_host(found)
    directory.drop_tier(found, 1)
    assert found.tier == 3
    directory.drop_tier(found, 3)
    assert found.tier == -1
    assert not found.is_ready


def test_two_halves_cover_one_need_and_losing_one_uncovers_it(directory: Directory) -> None:
    low, high = host(directory, 1, LOW), host(directory, 1, HIGH)
    cover = directory.covers(NAMESPACE, span(1).hash, 16, "0")[0]
    assert cover is not None
    assert set(cover) == {low, high}
    directory.drop_host(low)
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0")[0] is None
    directory.note(key(1, LOW), 2)
    cover = directory.covers(NAMESPACE, span(1).hash, 16, "0")[0]
    assert cover is not None
    assert {o.tier for o in cover} == {0, 2}


def test_of_two_that_serve_the_nearer_is_chosen_and_chosen_again_when_it_moves(
    directory: Directory,
) -> None:
    wide = Part(0, (0, 4), (0, 4))
    directory.note(key(1, wide), 1)
    near = host(directory, 1, WHOLE)
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0")[0] == (near,)
    directory.add_tier(near, 2)
    directory.drop_host(near)
    far = directory.find(key(1, wide))
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0")[0] == (far,)


def test_an_unknown_chunk_covers_nothing_and_is_not_remembered(directory: Directory) -> None:
    assert directory.covers(NAMESPACE, bytes(32), 16, "0") == [None, None]
    assert directory.find(key(9)) is None
    assert len(directory) == 0


@pytest.mark.parametrize("text", ["", "a/b", "a/b/c/d/e"])
def test_what_is_no_key_cannot_be_noted(directory: Directory, text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # whichever of the key's fields is missing
        directory.note(ObjectKey(text), 1)
    assert len(directory) == 0


PARTS = st.sampled_from([WHOLE, LOW, HIGH, STATE])
NUMBERS = st.integers(0, 2)
TIERS = st.integers(1, 3)
COPIES = st.one_of(
    st.just(0), st.builds(copy_of, st.integers(0, 255), st.integers(1, (1 << 48) - 1))
)


class DirectoryMachine(RuleBasedStateMachine):
    """Random state changes against plain dicts; covers are always as if computed anew."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(NEEDS)
        self.host: dict[tuple[int, Part], HostState] = {}
        self.tiers: dict[tuple[int, Part], set[int]] = {}
        self.copies: dict[tuple[int, Part, int], int] = {}

    def record(self, number: int, part: Part) -> ObjectRecord | None:
        return self.directory.find(key(number, part))

    @rule(number=NUMBERS, part=PARTS)
    def fill(self, number: int, part: Part) -> None:
        if (number, part) not in self.host:
            self.directory.fill(self.directory.ensure(NAMESPACE, span(number), "0", part), 0, 4096)
            self.host[number, part] = HostState.FILLING

    @rule(number=NUMBERS, part=PARTS)
    def ready(self, number: int, part: Part) -> None:
        if self.host.get((number, part)) is HostState.FILLING:
            found = self.record(number, part)
            assert found is not None
            self.directory.ready(found)
            self.host[number, part] = HostState.READY

    @rule(number=NUMBERS, part=PARTS)
    def drop_host(self, number: int, part: Part) -> None:
        if self.host.pop((number, part), None) is not None:
            found = self.record(number, part)
            assert found is not None
            self.directory.drop_host(found)

    @rule(number=NUMBERS, part=PARTS, tier=TIERS, copy=COPIES)
    def note(self, number: int, part: Part, tier: int, copy: int) -> None:
        self.directory.note(key(number, part), tier, copy)
        self.tiers.setdefault((number, part), set()).add(tier)
        self._copied(number, part, tier, copy)

    def _copied(self, number: int, part: Part, tier: int, copy: int) -> None:
        """What is known of a copy stays known when somebody who does not know it speaks of it."""
        self.copies[number, part, tier] = copy or self.copies.get((number, part, tier), 0)

    @rule(number=NUMBERS, part=PARTS, tier=TIERS, copy=COPIES)
    def add_tier(self, number: int, part: Part, tier: int, copy: int) -> None:
        found = self.record(number, part)
        if found is not None:
            self.directory.add_tier(found, tier, copy)
            self.tiers.setdefault((number, part), set()).add(tier)
            self._copied(number, part, tier, copy)

    @precondition(lambda self: bool(self.tiers))
    @rule(number=NUMBERS, part=PARTS, tier=TIERS)
    def drop_tier(self, number: int, part: Part, tier: int) -> None:
        found = self.record(number, part)
        if found is not None:
            self.directory.drop_tier(found, tier)
            self.tiers.get((number, part), set()).discard(tier)
            self.copies.pop((number, part, tier), None)

    @rule()
    def nobody_holds_a_record(self) -> None:
        gc.collect(1)

    @invariant()
    def records_are_exactly_what_is_somewhere(self) -> None:
        expected = {*self.host, *(k for k, tiers in self.tiers.items() if tiers)}
        found = {(o.chunk.hash, o.part) for o in self.directory.objects()}
        assert found == {(span(n).hash, part) for n, part in expected}
        assert len(self.directory) == len({n for n, _ in expected})

    @invariant()
    def what_each_tier_holds_is_counted(self) -> None:
        for tier in range(1, 4):
            assert self.directory.held(tier) == sum(tier in t for t in self.tiers.values())
            nbytes = sum(Copy.read(c).nbytes for (_, _, t), c in self.copies.items() if t == tier)
            assert self.directory.held_nbytes(tier) == nbytes

    @invariant()
    def how_an_object_lies_is_known(self) -> None:
        for number, part in self.tiers:
            found = self.record(number, part)
            for tier in range(1, 4):
                copy = 0 if found is None else of_tier(found.copies, tier)
                assert copy == self.copies.get((number, part, tier), 0)

    @invariant()
    def covers_are_fresh(self) -> None:
        for number in range(3):
            ready = {
                part
                for (n, part), state in self.host.items()
                if n == number and state is HostState.READY
            }
            ready |= {part for (n, part), tiers in self.tiers.items() if n == number and tiers}
            for need, cover in zip(
                NEEDS, self.directory.covers(NAMESPACE, span(number).hash, 16, "0"), strict=True
            ):
                assert (cover is None) == (plan.cover(need, ready) is None)
                for one in cover or ():
                    assert one is self.record(number, one.part)
                    assert one.is_ready


DirectoryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestDirectoryMachine = DirectoryMachine.TestCase


# -- what only lower tiers hold ------------------------------------------------------------------


def known(directory: Directory, number: int) -> ObjectRecord:
    found = directory.find(key(number))
    assert found is not None
    return found


def test_what_is_below_costs_some_bytes_and_the_garbage_collector_nothing() -> None:
    count = 5_000
    directory = Directory([WHOLE])
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    try:
        for number in range(count):
            directory.note(key(number), 1, copy_of(2, 5000 + number))
            directory.covers(NAMESPACE, span(number).hash, 16, "0")
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(directory) == directory.held(1) == count
    assert used / count < 330
    assert len(gc.get_objects()) - before < 100


def test_whoever_asks_for_what_is_below_is_given_the_same_record(directory: Directory) -> None:
    directory.note(key(1), 1)
    found = known(directory, 1)
    gc.collect()
    assert known(directory, 1) is found
    directory.note(key(1), 2)
    assert found.tiers == 0b110
    assert directory.covers(NAMESPACE, span(1).hash, 16, "0")[0] == (found,)


def test_what_left_host_memory_is_known_as_before(directory: Directory) -> None:
    found = directory.ensure(NAMESPACE, span(1), "0", WHOLE)
    found.chunk.span = Span(32, 48, span(1).hash)
    found.retention = Retention(2, 50.0)
    directory.fill(found, 0, 4096)
    directory.ready(found)
    directory.add_tier(found, 2)
    directory.drop_host(found)
    del found
    gc.collect()
    again = known(directory, 1)
    assert (again.tiers, again.retention) == (0b100, Retention(2, 50.0))
    assert (again.chunk.span, again.is_whole) == (Span(32, 48, span(1).hash), True)
    assert list(directory.active()) == []
    directory.fill(again, 0, 4096)
    assert list(directory.active()) == [again]


def test_who_holds_a_record_holds_the_one_that_others_find(directory: Directory) -> None:
    """A lease on what is below: its pins are seen by whoever brings the object up."""
    directory.note(key(1), 1)
    leased = known(directory, 1)
    leased.pins += 1
    gc.collect()
    brought = known(directory, 1)
    directory.fill(brought, 0, 4096)
    directory.ready(brought)
    assert brought is leased
    directory.drop_tier(brought, 1)
    directory.drop_host(brought)
    assert known(directory, 1) is leased  # pinned, and nowhere
    leased.pins -= 1
    directory.forget(leased)
    assert len(directory) == 0


def test_what_is_below_is_bounded_and_the_least_recent_goes_first() -> None:
    directory = Directory(NEEDS, most_below=4)
    for number in range(4):
        directory.note(key(number), 1)
    del_later = [known(directory, 0)]
    del_later.clear()
    gc.collect()
    directory.note(key(4), 1)
    assert (len(directory), directory.held(1), directory.forgotten) == (4, 4, 1)
    assert [directory.find(key(n)) is None for n in range(5)] == [False, True, False, False, False]


def test_what_is_held_is_not_forgotten_and_what_was_forgotten_is_nowhere() -> None:
    directory = Directory(NEEDS, most_below=2)
    directory.note(key(0), 1)
    directory.note(key(1), 1)
    pinned, seen = known(directory, 0), known(directory, 1)
    pinned.pins += 1
    directory.note(key(2), 1)
    assert (known(directory, 0) is pinned, directory.find(key(1))) == (True, None)
    assert not seen.is_ready
    directory.drop_tier(seen, 1)
    directory.forget(seen)
    directory.note(key(1), 1)
    assert known(directory, 1) is not seen
    assert (len(directory), directory.held(1), directory.forgotten) == (2, 2, 2)


def test_a_span_of_which_a_part_is_in_host_memory_is_active(directory: Directory) -> None:
    directory.note(key(1, LOW), 1)
    high = host(directory, 1, HIGH)
    assert {found.part for found in directory.active()} == {LOW, HIGH}
    directory.add_tier(high, 1)
    directory.drop_host(high)
    assert list(directory.active()) == []
    assert {found.part for found in directory.objects()} == {LOW, HIGH}
    assert len(directory) == 1


def test_what_is_being_written_does_not_rest(directory: Directory) -> None:
    found = host(directory, 1, WHOLE)
    found.writing = 0b10
    directory.add_tier(found, 2)
    directory.drop_host(found)
    assert list(directory.active()) == [found]
    found.writing = 0
    directory.forget(found)
    assert list(directory.active()) == []


def test_spans_of_one_end_rest_one_by_one(directory: Directory) -> None:
    short = ObjectKey.of(NAMESPACE, "0", span(1).hash, 4, WHOLE)
    other = ObjectKey.of(NAMESPACE, "1" * 32, span(1).hash, 16, WHOLE)
    for one in (key(1), short, other):
        directory.note(one, 1)
    assert len(directory) == 3
    assert {(r.tokens, r.zone) for r in directory.ending(NAMESPACE, span(1).hash)} == {
        (16, "0"),
        (4, "0"),
        (16, "1" * 32),
    }
    found = directory.find(short)
    assert found is not None
    directory.drop_tier(found, 1)
    assert [directory.find(one) is None for one in (key(1), short, other)] == [False, True, False]
    assert len(directory) == 2
    for one in (key(1), other):
        record = directory.find(one)
        assert record is not None
        directory.drop_tier(record, 1)
    assert (len(directory), directory.held(1)) == (0, 0)
    below = directory._below
    assert not (below._first or below._kinds or below._kind_of or below._kind_uses)


def test_what_is_forgotten_takes_nothing_and_a_row_that_is_used_again_knows_nothing() -> None:
    directory = Directory([WHOLE], most_below=2)
    for number in range(5):
        directory.note(key(number), 1, copy_of(1, 100 + number))
    assert directory.held_nbytes(1) == 103 + 104
    directory.drop_tier(known(directory, 4), 1)
    directory.note(key(9), 2)
    assert known(directory, 9).copies == 0 and directory.held_nbytes(1) == 103


@given(st.integers(), st.integers())
def test_a_copy_says_what_fits_whatever_others_say(encoding: int, nbytes: int) -> None:
    found = Copy.read(copy_of(encoding, nbytes))
    assert found.encoding == (encoding if 0 <= encoding < 256 else 0)
    assert found.nbytes == min(max(nbytes, 0), (1 << 48) - 1)
    assert copy_of(1, "many") == copy_of(1, 0)
